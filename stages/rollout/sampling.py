"""From logits to one token a row, and the log-probability of that token.

Shapes: `_B` rows, `_V` vocabulary, `_K` candidates, `_N` blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from schemas.rl import SamplingConfig

# Up to here one cumulative sum over the vocabulary is as fast as two levels of them.
_FLAT_VOCABULARY = 1024
_BLOCK = 256
# Top-p looks at this many of the likeliest tokens first, and at eight times more while they do
# not reach p: a sort of the whole vocabulary is the most expensive step of sampling.
_FIRST_CANDIDATES = 64
_MORE_CANDIDATES = 8


def sample(logits: Tensor, uniform: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Draw a token from each row of logits [_B, _V] with its number of uniform [_B] in (0, 1).

    Returns (tokens [_B] long, logprobs [_B] float32); the logprobs are of softmax(logits /
    temperature) before min-p, top-k and top-p, and of temperature 1 when the temperature is 0
    (greedy).
    """
    if sampling.temperature not in (0.0, 1.0):
        logits = logits.float() / sampling.temperature
    # One kernel for maximum, exponentials and sum, several times as fast as these one by one.
    weights = logits.softmax(dim=-1, dtype=torch.float32)
    if sampling.temperature == 0.0:
        tokens = logits.argmax(dim=-1)
    elif sampling.top_k or sampling.top_p < 1.0:
        kept, ids = _truncate(_likely(weights, sampling), sampling)
        drawn = _invert(kept, uniform).clamp(max=ids.shape[1] - 1)
        tokens = ids.gather(1, drawn[:, None]).squeeze(1)
    elif weights.shape[1] <= _FLAT_VOCABULARY:
        tokens = _invert(_likely(weights, sampling), uniform)
    else:
        tokens = _invert_in_blocks(_likely(weights, sampling), uniform)
    # Logits that are not numbers give an index past the end, which must not reach the gather (on a
    # GPU it would end the process); their log-probability says what happened.
    tokens = tokens.clamp(max=logits.shape[1] - 1)
    return tokens, weights.gather(1, tokens[:, None]).squeeze(1).log()


def _likely(weights: Tensor, sampling: SamplingConfig) -> Tensor:
    """The weights [_B, _V], those below min-p of the highest set to 0.

    (Nguyen et al. 2024, "Turning up the heat: min-p sampling", on the tempered distribution.)
    """
    if sampling.min_p == 0.0:
        return weights
    highest = weights.amax(dim=-1, keepdim=True)
    return weights.masked_fill(weights < sampling.min_p * highest, 0.0)


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index of each row of weights [_B, _K] whose cumulative share exceeds uniform."""
    cumulative = weights.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    # "right" skips entries of weight 0: their cumulative sum does not rise above the target.
    return torch.searchsorted(cumulative, target, right=True).squeeze(1)


def _invert_in_blocks(weights: Tensor, uniform: Tensor) -> Tensor:
    """`_invert` in two levels, first the block and then the entry in it: one pass over _V."""
    size = weights.shape[1]
    num_blocks = -(-size // _BLOCK)
    filling = num_blocks * _BLOCK - size
    padded = functional.pad(weights, (0, filling)) if filling else weights
    padded = padded.view(-1, num_blocks, _BLOCK)
    per_block = padded.sum(dim=-1)
    cumulative = per_block.cumsum(dim=-1, dtype=torch.float64)
    target = uniform[:, None] * cumulative[:, -1:]
    block = torch.searchsorted(cumulative, target, right=True).clamp(max=num_blocks - 1)
    mass = per_block.gather(1, block).double()
    inside = (target - cumulative.gather(1, block) + mass) / mass
    # The remainder is a share of the block, so it cannot fall beyond the block's own sum, however
    # the two levels were rounded; the bounds are those of the uniform numbers.
    inside = inside.clamp(2.0**-33, 1 - 2.0**-33).squeeze(1)
    rows = torch.arange(weights.shape[0], device=weights.device)
    entry = _invert(padded[rows, block.squeeze(1)], inside)
    return block.squeeze(1) * _BLOCK + entry


def _truncate(weights: Tensor, sampling: SamplingConfig) -> tuple[Tensor, Tensor]:
    """Weights and ids [_B, _K] of the likeliest tokens; a weight outside the set is 0.

    Min-p has gone first; top-k is next and top-p sees what it left, as in vLLM. The set of top-p
    is the smallest that holds at least p, so the token that reaches p is in it.
    """
    size = weights.shape[1]
    total = weights.sum(dim=-1)
    if sampling.top_k:
        kept, ids = weights.topk(min(sampling.top_k, size), dim=-1)
        total = kept.sum(dim=-1)
    else:
        kept, ids = _candidates(weights, total, sampling.top_p)
    if sampling.top_p < 1.0:
        before = kept.cumsum(dim=-1) - kept
        kept = kept.masked_fill(before >= sampling.top_p * total[:, None], 0.0)
    return kept, ids


def _candidates(weights: Tensor, total: Tensor, top_p: float) -> tuple[Tensor, Tensor]:
    """The likeliest tokens in order, enough of them that every row holds top_p of its mass."""
    size = weights.shape[1]
    num = min(_FIRST_CANDIDATES, size)
    while True:
        kept, ids = weights.topk(num, dim=-1)
        if num == size or bool((kept.sum(dim=-1) >= top_p * total).all()):
            return kept, ids
        num = min(num * _MORE_CANDIDATES, size)
