"""Sequences into one row without padding, and batches into micro-batches.

A prompt with several completions is laid down once: its completions follow it, each a branch that
sees the prompt and itself.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional

_T = TypeVar("_T")

# A block pads its rows to the longest; rows shorter than this share of it go to another block.
_MIN_FILLED = 0.75
# A long row is filled up to a multiple of these tokens: at some of the numbers in between, matrix
# products take an eighth longer (oneDNN 3, Zen 5), and each number is a shape to make code for.
_MULTIPLE = 16
_LONG_ROW = 256


@dataclass(frozen=True)
class Block:
    """Sequences of like length that attend in one batch: `_N` rows of `_L` tokens.

    tokens, long [_N, _L], are positions in the packed row; a short row is filled up with its own
    first position, and padding, bool [_N, _L], tells where (None: nowhere). With a prefix, long
    [_N / _G, _P], the rows are branches, _G of each prefix, in order: each sees the whole of its
    prefix and, causally, itself. prefix_padding, bool [_N / _G, _P], is to the prefix what padding
    is to the rows.
    """

    tokens: Tensor
    padding: Tensor | None
    prefix: Tensor | None = None
    prefix_padding: Tensor | None = None


@dataclass
class Layout:
    """Who attends to whom in a packed row of `_T` tokens.

    restore, long [_T]: where each token stands in the blocks' rows, laid end to end; 0 for the
    row's last num_filling tokens, which stand nowhere: nobody sees them, nor should read them.
    """

    blocks: tuple[Block, ...]
    restore: Tensor
    longest: int
    """Most tokens that any token can see, itself included."""
    num_filling: int = 0
    num_calls: int = 0
    """How often an attention layer has asked; 0 after a forward pass means that none did."""
    plans: dict[tuple[int, int], Any] = field(default_factory=dict)
    """What attention has worked out for its layers, by numbers of heads and key heads."""


@dataclass(frozen=True)
class PackedBatch:
    """One row for the model: input_ids and position_ids, long [1, _T], and who sees whom."""

    input_ids: Tensor
    position_ids: Tensor
    layout: Layout
    prompt_starts: list[int]
    completion_starts: list[int]
    prompt_lengths: list[int]

    def position(self, sequence: int, index: int) -> int:
        """Where token `index` of a sequence, counted from its first prompt token, lies."""
        beyond = index - self.prompt_lengths[sequence]
        if beyond < 0:
            return self.prompt_starts[sequence] + index
        return self.completion_starts[sequence] + beyond


def pack(
    prompt_ids: Sequence[Sequence[int]],
    completion_ids: Sequence[Sequence[int]],
    *,
    device: torch.device,
) -> PackedBatch:
    """Every sequence in one row, like prompts once. A prompt may be empty, a sequence may not.

    A long row ends in filling, so that its length is a multiple of 16.
    """
    ids: list[int] = []
    positions: list[int] = []
    trunks: list[range] = []
    branches: list[tuple[range, list[range]]] = []
    prompt_starts = [0] * len(prompt_ids)
    completion_starts = [0] * len(prompt_ids)

    def lay(tokens: Sequence[int], first_position: int) -> range:
        span = range(len(ids), len(ids) + len(tokens))
        ids.extend(tokens)
        positions.extend(range(first_position, first_position + len(tokens)))
        return span

    for rows in like_prompts(prompt_ids):
        prompt = prompt_ids[rows[0]]
        if len(rows) == 1 or not prompt:
            for row in rows:
                trunk = lay([*prompt, *completion_ids[row]], 0)
                trunks.append(trunk)
                prompt_starts[row] = trunk.start
                completion_starts[row] = trunk.start + len(prompt)
            continue
        trunk = lay(prompt, 0)
        trunks.append(trunk)
        own = [lay(completion_ids[row], len(prompt)) for row in rows]
        for row, span in zip(rows, own, strict=True):
            prompt_starts[row], completion_starts[row] = trunk.start, span.start
        own = [span for span in own if span]
        if own:
            branches.append((trunk, own))
    num_filling = -len(ids) % _MULTIPLE if len(ids) >= _LONG_ROW else 0
    layout = _layout(trunks, branches, len(ids), num_filling, device)
    ids.extend(ids[:1] * num_filling)
    positions.extend([0] * num_filling)
    return PackedBatch(
        torch.tensor([ids], dtype=torch.long, device=device),
        torch.tensor([positions], dtype=torch.long, device=device),
        layout,
        prompt_starts,
        completion_starts,
        [len(prompt) for prompt in prompt_ids],
    )


def micro_batches(
    lengths: Sequence[int], max_tokens: int, prompt_ids: Sequence[Sequence[int]] | None = None
) -> Iterator[list[int]]:
    """Indices in micro-batches of at most max_tokens tokens, the longest sequences first.

    lengths: tokens of each sequence, with its prompt. prompt_ids: where given, sequences of like
    prompts stay together as far as they fit, and their prompt counts once. A sequence longer than
    max_tokens gets a micro-batch of its own. The result is fixed by the lengths, the prompts and
    their order alone, so a resumed run splits a batch as the first did.
    """
    if prompt_ids is None:
        prompt_ids = [[]] * len(lengths)
        groups = [[index] for index in range(len(lengths))]
    else:
        groups = like_prompts(prompt_ids)
    shared = [len(prompt) for prompt in prompt_ids]
    parts = [part for group in groups for part in _split(group, lengths, shared, max_tokens)]
    parts.sort(key=lambda part: (-max(lengths[index] for index in part.indices), part.indices[0]))
    batch: list[int] = []
    filled = 0
    for part in parts:
        if batch and filled + part.num_tokens > max_tokens:
            yield batch
            batch, filled = [], 0
        batch = batch + part.indices
        filled += part.num_tokens
    if batch:
        yield batch


def like_prompts(prompt_ids: Sequence[Sequence[int]]) -> list[list[int]]:
    """Indices of equal prompts, in the order in which the prompts first appear."""
    found: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for index, prompt in enumerate(prompt_ids):
        found[tuple(prompt)].append(index)
    return list(found.values())


@dataclass(frozen=True)
class _Part:
    """Sequences of one prompt that stay together, and the tokens they take."""

    indices: list[int]
    num_tokens: int


def _split(
    group: Sequence[int], lengths: Sequence[int], shared: Sequence[int], max_tokens: int
) -> Iterator[_Part]:
    indices: list[int] = []
    filled = 0
    for index in group:
        own = lengths[index] - shared[index]
        if indices and filled + own > max_tokens:
            yield _Part(indices, filled)
            indices, filled = [], 0
        filled += own if indices else lengths[index]
        indices.append(index)
    yield _Part(indices, filled)


def _layout(
    trunks: list[range],
    branches: list[tuple[range, list[range]]],
    num_tokens: int,
    num_filling: int,
    device: torch.device,
) -> Layout:
    blocks: list[Block] = []
    spans: list[list[range]] = []
    for bucket in _buckets(trunks, len):
        blocks.append(Block(*_rows(bucket, device)))
        spans.append(bucket)
    of_size: dict[int, list[tuple[range, list[range]]]] = defaultdict(list)
    for branch in branches:
        of_size[len(branch[1])].append(branch)
    for like in of_size.values():
        for some in _buckets(like, lambda branch: len(branch[0]) + max(map(len, branch[1]))):
            own = [span for _, branch in some for span in branch]
            prefix = [trunk for trunk, _ in some]
            blocks.append(Block(*_rows(own, device), *_rows(prefix, device)))
            spans.append(own)
    longest = [len(trunk) for trunk in trunks]
    longest += [len(trunk) + len(span) for trunk, own in branches for span in own]
    return Layout(
        tuple(blocks),
        functional.pad(_restore(spans, num_tokens, device), (0, num_filling)),
        max(longest),
        num_filling,
    )


def _buckets(items: Sequence[_T], length: Callable[[_T], int]) -> Iterator[list[_T]]:
    bucket: list[_T] = []
    for item in sorted(items, key=length, reverse=True):
        if bucket and length(item) < _MIN_FILLED * length(bucket[0]):
            yield bucket
            bucket = []
        bucket.append(item)
    if bucket:
        yield bucket


def _rows(spans: Sequence[range], device: torch.device) -> tuple[Tensor, Tensor | None]:
    starts = torch.tensor([span.start for span in spans], device=device)[:, None]
    lengths = torch.tensor([len(span) for span in spans], device=device)[:, None]
    columns = torch.arange(max(map(len, spans)), device=device)
    padding = columns >= lengths
    tokens = torch.where(padding, starts, starts + columns)
    return tokens, padding if bool(padding.any()) else None


def _restore(spans: Sequence[Sequence[range]], num_tokens: int, device: torch.device) -> Tensor:
    """Where each token stands in the padded rows of all blocks."""
    found = torch.empty(num_tokens, dtype=torch.long)
    offset = 0
    for rows in spans:
        width = max(map(len, rows))
        for span in rows:
            found[span.start : span.stop] = torch.arange(offset, offset + len(span))
            offset += width
    return found.to(device)
