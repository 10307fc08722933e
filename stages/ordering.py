"""Which records come when: a new permutation each epoch, from the seed and the position alone."""

from __future__ import annotations

import torch


def records_at(position: int, count: int, num_records: int, seed: int) -> list[int]:
    """Indices of `count` records from `position` on, counted over epochs.

    The data cursor of a stage is therefore one number, and needs no loader state.
    """
    indices: list[int] = []
    while len(indices) < count:
        epoch, offset = divmod(position + len(indices), num_records)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_records, generator=generator)
        indices += order[offset : offset + count - len(indices)].tolist()
    return indices
