"""Log-probabilities of given tokens, and the entropy they were drawn with.

Shapes: `_B` sequences, `_T` tokens, `_N` tokens of any sequences in one row, `_H` hidden, `_V`
vocabulary. `logits[:, t]` must already be the distribution of `targets[:, t]`: the shift by one
is the caller's. Targets at masked positions must still be ids in [0, _V). Natural logarithm, nats.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.core import kernels
from stages.core.elementwise import add_
from stages.core.gradients import gradient
from stages.core.masks import upcast
from stages.core.products import linear, weight_gradient

# Rows of logits that stay in cache between the passes over them: 1 MiB in float32.
_CACHED_ELEMENTS = 2**18
# Rows of the weight's gradient that are made and added up at once, for the same reason.
_CACHED_COLUMNS = 2048
# Logits that wait for the backward pass, 128 MiB in bfloat16; those of more tokens are made again.
KEPT_ELEMENTS = 2**26


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
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs_and_entropy` of logits = hidden @ weight.T + bias, never held whole.

    hidden [_N, _H], weight [_V, _H], targets long [_N], bias [_V]. Returns (logprobs [_N],
    entropy [_N]); logprobs are differentiable in hidden, weight and bias, entropy is detached. copy
    is the weight in the dtype of hidden, if the caller has it.
    Logits exist for chunk_size tokens at a time, but the last few chunks' wait for the backward
    pass; it computes those before them again. The product is in the dtype of hidden, as the model's
    own head would do it; the softmax, and the sum of the weight's gradient over chunks, are in
    float32 or float64. Raises ValueError unless temperature > 0 and chunk_size >= 1.
    """
    head = _Head(temperature, chunk_size)
    logprobs, entropy = _TokenLogprobs.apply(hidden, weight, bias, targets, head, copy)  # type: ignore[no-untyped-call]
    return logprobs, entropy


def weighted_logprob_sum(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    token_weights: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 1024,
    bias: Tensor | None = None,
    copy: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of token_weights [_N] times `chunked_token_logprobs`, with its gradient from one pass.

    For losses that are linear in the log-probabilities, such as cross entropy: the logits of a
    chunk are made once, where `chunked_token_logprobs` makes them twice. Returns (sum, logprobs
    [_N], entropy [_N]); only the sum is differentiable. Raises as `chunked_token_logprobs` does.
    """
    head = _Head(temperature, chunk_size)
    if head.keeps_all(len(hidden), len(weight)):
        # Nor does that then make any twice, and it adds to the gradient that the weight has.
        logprobs, entropy = chunked_token_logprobs(
            hidden, weight, targets, temperature, chunk_size, bias, copy
        )
        return (token_weights * logprobs).sum(), logprobs.detach(), entropy
    found = _WeightedSum.apply(hidden, weight, bias, targets, token_weights, head, copy)  # type: ignore[no-untyped-call]
    total, logprobs, entropy = found
    return total, logprobs, entropy


@dataclass(frozen=True)
class _Partition:
    """Of rows of tempered logits: the greatest, and the sum of exponentials of what is below it."""

    greatest: Tensor
    total: Tensor


class _Head:
    """The output head, a chunk of tokens at a time."""

    def __init__(self, temperature: float, chunk_size: int) -> None:
        """To be made outside of autograd functions: inside, nobody knows whether a gradient is
        wanted."""
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        if chunk_size < 1:
            raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
        self.temperature = temperature
        self.chunk_size = chunk_size
        self._wants_gradient = torch.is_grad_enabled()

    def chunks(self, num_tokens: int) -> list[slice]:
        """Which tokens go through the product together."""
        return _slices(num_tokens, self.chunk_size)

    def num_kept(self, num_tokens: int, vocab_size: int) -> int:
        """Of how many chunks, the last ones, logits wait for the backward pass."""
        chunk = max(min(self.chunk_size, num_tokens), 1) * vocab_size
        return KEPT_ELEMENTS // chunk if self._wants_gradient else 0

    def keeps_all(self, num_tokens: int, vocab_size: int) -> bool:
        """Whether the logits of every chunk wait for the backward pass."""
        return len(self.chunks(num_tokens)) <= self.num_kept(num_tokens, vocab_size)

    def logprobs(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, _Partition]:
        """Log-probability of each target, and the entropy, [chunk] each, of logits [chunk, _V]."""
        if kernels.serve(logits):
            parts = [kernels.token_logprobs(logits, targets, self.temperature)]
        else:
            parts = [self._block(logits[rows], targets[rows]) for rows in _blocks(logits)]
        logprobs, entropy, greatest, total = map(torch.cat, zip(*parts, strict=True))
        return logprobs, entropy, _Partition(greatest, total)

    def to_gradient_(
        self, logits: Tensor, targets: Tensor, partition: _Partition, upstream: Tensor
    ) -> Tensor:
        """d logprob / d logit = (onehot - softmax) / temperature, times upstream [chunk]: written
        over logits [chunk, _V]."""
        greatest, total = partition.greatest, partition.total
        if kernels.serve(logits):
            return kernels.token_logprobs_backward_(
                logits, targets, self.temperature, greatest, total, upstream
            )
        scaled = upstream / self.temperature
        for rows in _blocks(logits):
            d_logits = self._tempered(logits[rows]).sub_(greatest[rows, None]).exp_()
            d_logits.mul_(-(scaled[rows] / total[rows])[:, None])
            d_logits.scatter_add_(1, targets[rows, None], scaled[rows, None])
            logits[rows] = d_logits
        return logits

    def _block(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        shifted = self._tempered(logits)
        greatest = shifted.amax(dim=-1)
        shifted.sub_(greatest[:, None])
        exponentials = shifted.exp()
        total = exponentials.sum(dim=-1)
        log_total = total.log()
        logprobs = _gather(shifted, targets) - log_total
        products = torch.linalg.vecdot(exponentials, shifted)
        if products.isnan().any():  # a banned token adds 0, not 0 * -inf
            shifted.clamp_(min=torch.finfo(shifted.dtype).min)
            products = torch.linalg.vecdot(exponentials, shifted)
        return logprobs, log_total - products / total, greatest, total

    def _tempered(self, logits: Tensor) -> Tensor:
        tempered = logits.to(upcast(logits.new_empty(0)).dtype, copy=True)
        return tempered if self.temperature == 1 else tempered.div_(self.temperature)


class _Gradients:
    """Sums over chunks of the gradients of sum(upstream * logprobs)."""

    def __init__(
        self,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        needed: Sequence[bool],
        total: Tensor | None = None,
    ) -> None:
        """total: the weight's gradient so far, to be added to."""
        self._wide = upcast(weight.new_empty(0)).dtype
        self._needs_weight = needed[1]
        self.hidden = torch.empty_like(hidden) if needed[0] else None
        self.weight = total
        self.bias: Tensor | None = None
        if needed[1] and total is None and not len(hidden):
            self.weight = torch.zeros_like(weight, dtype=self._wide)
        if bias is not None and needed[2]:
            self.bias = torch.zeros_like(bias, dtype=self._wide)

    def add(self, chunk: slice, d_logits: Tensor, hidden: Tensor, weight: Tensor) -> None:
        """Through the product, for a chunk's d_logits [chunk, _V]."""
        if self.bias is not None:
            self.bias += d_logits.sum(0, dtype=self._wide)
        if self.hidden is not None:
            self.hidden[chunk] = linear(d_logits, weight.T)
        if not self._needs_weight:
            return
        first = self.weight is None
        if first:
            self.weight = torch.empty_like(weight, dtype=self._wide)
        assert self.weight is not None
        for columns in _slices(len(weight), _CACHED_COLUMNS):
            part = weight_gradient(d_logits[:, columns], hidden)
            total = self.weight[columns]
            total.copy_(part) if first else add_(total, part)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: _Head,
        copy: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(hidden, weight, bias, targets, copy)
        copy = _copied(weight, hidden, copy)
        ctx.head = head
        ctx.kept = {}
        found: list[tuple[Tensor, Tensor, _Partition]] = []
        chunks = head.chunks(len(hidden))
        first_kept = len(chunks) - head.num_kept(len(hidden), len(weight))
        for number, chunk in enumerate(chunks):
            logits = _product(hidden[chunk], copy, bias)
            if number >= first_kept:
                ctx.kept[number] = logits
            found.append(head.logprobs(logits, targets[chunk]))
        ctx.partitions = [partition for _, _, partition in found]
        logprobs, entropy = _joined(found, hidden)
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, copy = ctx.saved_tensors
        copy = _copied(weight, hidden, copy)
        head: _Head = ctx.head
        total = gradient(weight)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad, total)
        for number, chunk in enumerate(head.chunks(len(hidden))):
            logits = ctx.kept.pop(number, None)
            if logits is None:
                logits = _product(hidden[chunk], copy, bias)
            partition = ctx.partitions[number]
            d_logits = head.to_gradient_(logits, targets[chunk], partition, upstream[chunk])
            gradients.add(chunk, d_logits, hidden[chunk], copy)
        d_weight = gradients.weight if total is None else None
        return gradients.hidden, d_weight, gradients.bias, None, None, None


class _WeightedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        token_weights: Tensor,
        head: _Head,
        copy: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        copy = _copied(weight, hidden, copy)
        gradients = _Gradients(hidden, weight, bias, ctx.needs_input_grad)
        found: list[tuple[Tensor, Tensor, _Partition]] = []
        for chunk in head.chunks(len(hidden)):
            logits = _product(hidden[chunk], copy, bias)
            found.append(head.logprobs(logits, targets[chunk]))
            d_logits = head.to_gradient_(logits, targets[chunk], found[-1][2], token_weights[chunk])
            gradients.add(chunk, d_logits, hidden[chunk], copy)
        ctx.gradients = gradients
        logprobs, entropy = _joined(found, hidden)
        ctx.mark_non_differentiable(logprobs, entropy)
        return (token_weights * logprobs).sum(), logprobs, entropy

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        gradients: _Gradients | None = ctx.gradients
        if gradients is None:
            raise RuntimeError("weighted_logprob_sum has let go of its gradient: backward was run")
        # They are as large as the head: autograd takes them over, and nobody holds a second copy.
        ctx.gradients = None
        found = [gradients.hidden, gradients.weight, gradients.bias]
        if upstream.item() != 1.0:
            found = [
                None if gradient is None else gradient.mul_(upstream.to(gradient.dtype))
                for gradient in found
            ]
        return *found, None, None, None, None


def _copied(weight: Tensor, hidden: Tensor, copy: Tensor | None) -> Tensor:
    """The weight as products with hidden take it."""
    return weight.to(hidden.dtype) if copy is None else copy


def _product(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """In the format of hidden, whatever the surroundings want."""
    with torch.autocast(hidden.device.type, enabled=False):
        return linear(hidden, weight, None if bias is None else bias.to(hidden.dtype))


def _slices(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _blocks(logits: Tensor) -> list[slice]:
    """On a processor as many rows as its cache holds, so that the next pass over them finds them
    there."""
    size = max(_CACHED_ELEMENTS // logits.shape[1], 1)
    return _slices(len(logits), size if logits.device.type == "cpu" else len(logits))


def _joined(
    parts: Sequence[tuple[Tensor, Tensor, _Partition]], hidden: Tensor
) -> tuple[Tensor, Tensor]:
    if not parts:
        nothing = upcast(hidden.new_zeros(0))
        return nothing, nothing.clone()
    logprobs, entropy, _ = zip(*parts, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    tempered = upcast(logits) if temperature == 1 else upcast(logits) / temperature
    return functional.log_softmax(tempered, dim=-1)


def _gather(log_probs: Tensor, targets: Tensor) -> Tensor:
    return log_probs.gather(-1, targets.unsqueeze(-1)).squeeze(-1)


def _entropy(log_probs: Tensor) -> Tensor:
    probs = log_probs.exp()
    # 0 * -inf is NaN, in the value and in the gradient, unless the -inf is replaced first.
    return -(probs * torch.where(probs > 0, log_probs, 0.0)).sum(dim=-1)
