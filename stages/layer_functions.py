"""A decoder layer's parts as autograd functions that keep little; see `stages.lean_layers`."""

# ruff: noqa: D102 -- forward and backward are autograd's; the classes say what they compute
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from stages.core import elementwise
from stages.core.gradients import added, gradient
from stages.core.products import linear, weight_gradient


class Embedding(torch.autograd.Function):
    """Rows of weight [vocabulary, hidden], whose gradient is only as tall as the first time."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding: int | None) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight, ctx.padding = weight, padding
        return functional.embedding(ids, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        total = gradient(ctx.weight)
        if total is None:
            padding = -1 if ctx.padding is None else ctx.padding
            dense = torch.ops.aten.embedding_dense_backward
            return None, dense(grad, ids, len(ctx.weight), padding, False), None
        if ctx.padding is not None:
            grad = grad.masked_fill((ids == ctx.padding).unsqueeze(-1), 0.0)
        total.index_add_(0, ids.flatten(), _rows(grad))
        return None, None, None


class Linear(torch.autograd.Function):
    """states [..., in] times weight [out, in], transposed, by a copy of the weight."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, copy: Tensor
    ) -> Tensor:
        ctx.save_for_backward(states, copy)
        # Saved tensors that a checkpoint has made again are not the ones that have gradients.
        ctx.weight = weight
        with torch.autocast(states.device.type, enabled=False):
            return linear(states, copy, None if bias is None else bias.to(copy.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, copy = ctx.saved_tensors
        needed = ctx.needs_input_grad
        return (
            linear(grad, copy.T) if needed[0] else None,
            _weight_gradient(ctx.weight, grad, states) if needed[1] else None,
            _rows(grad).sum(0, dtype=torch.float32) if needed[2] else None,
            None,
        )


class RMSNorm(torch.autograd.Function):
    """x / sqrt(mean x^2 + epsilon) * weight (Zhang and Sennrich 2019, eq. 4), summed in float32.

    from_result: keep the result, which the maps that read it keep anyway, in place of x, which is
    float32 and nobody else's; divided by the weight it is the normalised x.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        epsilon: float,
        dtype: torch.dtype,
        from_result: bool = False,
    ) -> Tensor:
        result, scale = elementwise.rms_norm(states, weight, epsilon, dtype)
        ctx.from_result, ctx.dtype = from_result, states.dtype
        ctx.save_for_backward(result if from_result else states, weight, scale)
        return result

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept, weight, scale = ctx.saved_tensors
        d_states, d_weight = elementwise.rms_norm_backward(
            kept, ctx.from_result, weight, scale, grad
        )
        return d_states.to(ctx.dtype), d_weight, None, None, None


class Rotation(torch.autograd.Function):
    """Rotary position embedding, `elementwise.rotated`. The result lies in memory as the
    projection's output does and packed attention wants it."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return elementwise.rotated(states, cos, sin)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return elementwise.rotated(grad, cos, sin, back=True), None, None


class Gate(torch.autograd.Function):
    """silu(gate) * up, for maps that are no part of `GatedMLP`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return elementwise.gated(gate, up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        # A copy: what is overwritten must be nobody else's.
        d_gate, d_up, _ = elementwise.gated_backward(grad.clone(), *ctx.saved_tensors)
        return d_gate, d_up


class GatedMLP(torch.autograd.Function):
    """(silu(x gate') * x up') down' (Shazeer 2020, eq. 6); keeps x and what silu and the product
    take, and computes their results again."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *copies: Tensor,
    ) -> Tensor:
        gate_copy, up_copy, down_copy = copies
        ctx.weights = (gate, up, down)
        with torch.autocast(states.device.type, enabled=False):
            gated = linear(states, gate_copy)
            opened = linear(states, up_copy)
            ctx.save_for_backward(states, gated, opened, *copies)
            return linear(elementwise.gated(gated, opened), down_copy)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        states, gated, opened, gate, up, down = ctx.saved_tensors
        gate_weight, up_weight, down_weight = ctx.weights
        needed = ctx.needs_input_grad
        d_gated, d_opened, product = elementwise.gated_backward(linear(grad, down.T), gated, opened)
        d_down = _weight_gradient(down_weight, grad, product) if needed[3] else None
        del product
        d_states = None
        if needed[0]:
            d_states = _sum_of_products(d_gated, gate.T, d_opened, up.T)
        return (
            d_states,
            _weight_gradient(gate_weight, d_gated, states) if needed[1] else None,
            _weight_gradient(up_weight, d_opened, states) if needed[2] else None,
            d_down,
            None,
            None,
            None,
        )


def _rows(states: Tensor) -> Tensor:
    return states.reshape(-1, states.shape[-1])


def _weight_gradient(weight: Tensor, grad: Tensor, states: Tensor) -> Tensor | None:
    return added(weight, weight_gradient(_rows(grad), _rows(states)))


def _sum_of_products(first: Tensor, weight: Tensor, second: Tensor, other: Tensor) -> Tensor:
    """`linear` of both, added up; in bfloat16 before what the second gives is rounded."""
    found = linear(first, weight)
    if found.dtype == torch.float32:
        return found.add_(linear(second, other))
    return torch.addmm(_rows(found), _rows(second), other.T).view_as(found)
