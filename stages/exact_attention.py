"""Attention over a packed row by matrix products, a tile of scores at a time, for processors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from stages.attention_plan import Part, Plan, Tile, picked, plan_of
from stages.core import elementwise
from stages.packing import Layout


def exact_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """q [_T, heads, dim], k and v [_T, key heads, dim]; gives q's shape."""
    plan = plan_of(layout, q.shape[1], k.shape[1])
    return cast(Tensor, _PackedAttention.apply(q, k, v, plan, scale))  # type: ignore[no-untyped-call]


class _PackedAttention(torch.autograd.Function):
    """Queries are gathered in the order of the tiles, once; the backward pass computes the
    probabilities again.

    Memory beyond copies of inputs and outputs is that of one tile, and in the backward pass the
    gradients of a part's keys and values. Sums are in float32 (float64 where the inputs are).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.plan, ctx.scale = plan, scale
        with torch.autocast(q.device.type, enabled=False):
            queries = picked(q, plan.queries)
            outputs = torch.empty_like(queries)
            for part in plan.parts:
                keys, values = part.gathered(k), part.gathered(v)
                for tile in part.tiles:
                    seen, values_seen = tile.seen(keys), tile.seen(values)
                    weights = _probabilities(tile, part, tile.of(queries), seen, scale)
                    torch.bmm(weights, values_seen, out=tile.of(outputs))
        return outputs.index_select(0, plan.restore).view(q.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        plan: Plan = ctx.plan
        queries, upstream = picked(q, plan.queries), picked(grad, plan.queries)
        if plan.filled is not None:
            upstream.index_fill_(0, plan.filled, 0.0)
        d_queries = torch.empty_like(queries)
        wide = torch.promote_types(k.dtype, torch.float32)
        sums: list[tuple[Tensor, Tensor]] = []
        for part in plan.parts:
            keys, values = part.gathered(k), part.gathered(v)
            d_keys, d_values = (torch.zeros_like(x, dtype=wide) for x in (keys, values))
            for tile in part.tiles:
                left, above, seen = tile.of(queries), tile.of(upstream), tile.seen(keys)
                weights = _probabilities(tile, part, left, seen, ctx.scale)
                d_weights = torch.bmm(above, tile.seen(values).mT)
                d_scores = elementwise.causal_softmax_backward_(weights, d_weights, tile.chunk)
                _product(d_scores, seen, ctx.scale, out=tile.of(d_queries))
                tile.columns(d_keys).add_(_product(d_scores.mT, left, ctx.scale))
                tile.columns(d_values).add_(torch.bmm(weights.mT, above))
            sums.append((d_keys, d_values))
        dq = d_queries.index_select(0, plan.restore).view(q.shape)
        of_keys, of_values = zip(*sums, strict=True)
        dk, dv = _of_tokens(of_keys, plan, k), _of_tokens(of_values, plan, v)
        if plan.num_filling:
            for total in (dq, dk, dv):
                total[-plan.num_filling :] = 0.0
        return dq, dk, dv, None, None


def _probabilities(tile: Tile, part: Part, queries: Tensor, keys: Tensor, scale: float) -> Tensor:
    """Softmax over what each query sees, [_R, _M, _S].

    bfloat16 goes in and out; sums are in float32.
    """
    scores = _product(queries, keys.mT, scale)
    if part.hidden is not None:
        hidden = part.hidden[tile.rows]
        scores[..., : hidden.shape[-1]].masked_fill_(hidden, -math.inf)
    return elementwise.causal_softmax_(scores, tile.chunk)


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    unused = left.new_empty(1, 1, 1)
    return torch.baddbmm(unused, left, right, beta=0, alpha=scale, out=out)


def _of_tokens(sums: Sequence[Tensor], plan: Plan, states: Tensor) -> Tensor:
    """Gradients of keys or values [_T, key heads, dim], from what each part has summed up."""
    dtype, dim = states.dtype, states.shape[-1]
    own = torch.cat([some.to(dtype).view(-1, dim) for some in sums])
    total = own.index_select(0, plan.restore_keys)
    if plan.restore_prefixes is not None:
        pairs = zip(plan.parts, sums, strict=True)
        shared = [part.of_prefixes(one).to(dtype) for part, one in pairs if part.num_prefix]
        zero = states.new_zeros(1, dim)
        total += torch.cat([*shared, zero]).index_select(0, plan.restore_prefixes)
    return total.view(states.shape)
