"""Random numbers that belong to a completion, whatever else is in its batch."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_WEYL = np.uint64(0x9E3779B97F4A7C15)


def uniforms(
    seed: int, prompt_index: NDArray[np.int64], sample_index: NDArray[np.int64], length: int
) -> NDArray[np.float64]:
    """One row of `length` numbers in (0, 1) for each pair of prompt and sample.

    A row is the SplitMix64 stream (Steele, Lea and Flood 2014) of a key hashed from the seed and
    the pair, so it is the same in any batch, and all rows are drawn by a few array operations.
    """
    key = _mix(np.full(prompt_index.shape, seed & 0xFFFF_FFFF_FFFF_FFFF, dtype=np.uint64) + _WEYL)
    for index in (prompt_index, sample_index):
        key = _mix((key ^ index.astype(np.uint64)) + _WEYL)
    steps = np.arange(1, length + 1, dtype=np.uint64) * _WEYL
    bits = _mix(key[:, None] + steps[None, :]) >> np.uint64(32)
    # The half keeps 0 and 1 out: a product with a total is then always inside the distribution.
    uniform: NDArray[np.float64] = (bits.astype(np.float64) + 0.5) * 2.0**-32
    return uniform


def _mix(bits: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64; array arithmetic wraps at 64 bits by definition."""
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: NDArray[np.uint64] = bits ^ (bits >> np.uint64(31))
    return mixed


def request_seed(seed: int, prompt_index: int) -> int:
    """A seed for an engine that seeds by prompt; far from that of any other prompt."""
    key = _mix(np.array([seed & 0xFFFF_FFFF_FFFF_FFFF], dtype=np.uint64) + _WEYL)
    key = _mix((key ^ np.uint64(prompt_index)) + _WEYL)
    # Room below 2**63 for the numbers of the samples, which are added.
    return int(key[0] >> np.uint64(2))
