"""Sequences into rows, and rows into micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PackedBatch:
    """Rows that hold one or several sequences each.

    input_ids, position_ids and segment_ids are long [_R, _L]; a segment is the number of the
    sequence within its row, from 1, and 0 is padding. starts [_B] are flat positions
    (row * _L + column) of the first token of each sequence.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_ids: Tensor
    starts: list[int]
    one_per_row: bool

    def attention_mask(self) -> Tensor | None:
        """Block-diagonal causal mask, bool [_R, 1, _L, _L]; None where plain causal is enough.

        With one right-padded sequence a row, causality alone keeps padding out of sight.
        """
        if self.one_per_row:
            return None
        same = self.segment_ids[:, :, None] == self.segment_ids[:, None, :]
        length = self.segment_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=same.device).tril()
        return (same & causal)[:, None]


def pack(
    sequences: Sequence[Sequence[int]],
    *,
    pad_token_id: int,
    device: torch.device,
    row_length: int | None = None,
) -> PackedBatch:
    """First-fit-decreasing packing into rows of row_length; without it, one sequence a row."""
    if row_length is None:
        rows = [[index] for index in range(len(sequences))]
    else:
        rows = _first_fit([len(sequence) for sequence in sequences], row_length)
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.long)
    position_ids = torch.zeros(len(rows), width, dtype=torch.long)
    segment_ids = torch.zeros(len(rows), width, dtype=torch.long)
    starts = [0] * len(sequences)
    for r, row in enumerate(rows):
        column = 0
        for segment, index in enumerate(row, start=1):
            end = column + len(sequences[index])
            input_ids[r, column:end] = torch.as_tensor(sequences[index])
            position_ids[r, column:end] = torch.arange(end - column)
            segment_ids[r, column:end] = segment
            starts[index] = r * width + column
            column = end
    return PackedBatch(
        input_ids.to(device),
        position_ids.to(device),
        segment_ids.to(device),
        starts,
        one_per_row=all(len(row) == 1 for row in rows),
    )


def micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[list[int]]:
    """Indices in micro-batches of at most max_tokens slots (rows times longest), by length.

    A sequence longer than max_tokens gets a micro-batch of its own. The order of the result is
    fixed by the lengths and positions alone, so a resumed run splits a batch as the first did.
    """
    order = sorted(range(len(lengths)), key=lambda index: (-lengths[index], index))
    batch: list[int] = []
    longest = 0
    for index in order:
        if batch and (len(batch) + 1) * longest > max_tokens:
            yield batch
            batch = []
        if not batch:
            longest = lengths[index]
        batch.append(index)
    if batch:
        yield batch


def _first_fit(lengths: Sequence[int], row_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        for r, free in enumerate(room):
            if lengths[index] <= free:
                rows[r].append(index)
                room[r] -= lengths[index]
                break
        else:
            rows.append([index])
            room.append(max(row_length - lengths[index], 0))
    return rows
