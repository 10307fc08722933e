"""Log-probabilities of given tokens, and the entropy they were drawn with.

Shapes: `_B` sequences, `_T` tokens, `_N` tokens of any sequences in one row, `_H` hidden, `_V`
vocabulary. `logits[:, t]` must already be the distribution of `targets[:, t]`: the shift by one
is the caller's. Targets at masked positions must still be ids in [0, _V). Natural logarithm, nats.
"""

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stages.core.masks import upcast


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target under softmax(logits / temperature).

    logits [_B, _T, _V], targets long [_B, _T]. Returns [_B, _T], in float32, or
    float64 if logits are. Raises ValueError unless temperature > 0: greedy sampling has no
    log-probabilities.
    """
    return _gather(_log_softmax(logits, temperature), targets)


def token_logprobs_and_entropy(
    logits: Tensor, targets: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """`token_logprobs`, and the entropy of the same tempered distribution.

    Both [_B, _T] and both differentiable. A logit of -inf (a banned token) adds no entropy.
    """
    log_probs = _log_softmax(logits, temperature)
    return _gather(log_probs, targets), _entropy(log_probs)


def chunked_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs_and_entropy` of logits = hidden @ weight.T + bias, never held whole.

    hidden [_N, _H], weight [_V, _H], targets long [_N], bias [_V]. Returns (logprobs [_N],
    entropy [_N]); logprobs are differentiable in hidden, weight and bias, entropy is detached.
    Logits exist for chunk_size tokens at a time; the backward pass computes them again. The
    product is in the dtype of hidden and weight, as the model's own head would do it; the softmax
    is in float32 or float64. Raises ValueError unless temperature > 0 and chunk_size >= 1.
    """
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")

    def one_chunk(chunk: Tensor, chunk_targets: Tensor) -> tuple[Tensor, Tensor]:
        log_probs = _log_softmax(functional.linear(chunk, weight, bias), temperature)
        return _gather(log_probs, chunk_targets), _entropy(log_probs.detach())

    chunks = [
        checkpoint(one_chunk, *chunk, use_reentrant=False, preserve_rng_state=False)
        for chunk in zip(
            torch.split(hidden, chunk_size), torch.split(targets, chunk_size), strict=True
        )
    ]
    logprobs, entropy = zip(*chunks, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    return functional.log_softmax(upcast(logits) / temperature, dim=-1)


def _gather(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    probs = log_probs.exp()
    # 0 * -inf is NaN, in the value and in the gradient, unless the -inf is replaced first.
    return -(probs * torch.where(probs > 0, log_probs, 0.0)).sum(dim=-1)
