"""Attention over a packed row: exact, block by block, with no mask over the whole row.

Registered with transformers under a name, so that any model that lets its attention be chosen can
use it. On the CPU, torch's own kernel takes three to ten times as long as the matrix products
below (SmolLM2 shapes, bfloat16, 32 to 1,024 tokens); on CUDA torch's kernel is the fast one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from schemas.base import UserError
from stages.packing import Block, Layout

NAME = "posttrain_packed"

# Queries that go through at once: keys behind the last of them are never touched.
_CHUNK = 64
# Scores held at once. More than fits the processor's cache costs time, and fewer too.
_TILE = 2**20


def use_packed_attention(model: PreTrainedModel) -> None:
    """Let a model attend by layout, where it is given one. Raises UserError if it cannot."""
    if model.config._attn_implementation == NAME:
        return
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    try:
        model.set_attn_implementation(NAME)
    except (ValueError, NotImplementedError) as error:
        raise UserError(
            f"{type(model).__name__} does not let its attention be chosen ({error}); "
            "use a model of transformers whose attention goes through its attention interface"
        ) from error


def no_mask(device: torch.device) -> Tensor:
    """Stands where transformers would else make a mask over the whole row: it takes four axes as
    they are, and the layout says who sees whom."""
    return torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    layout: Layout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """query [1, heads, _T, dim], key and value [1, key heads, _T, dim]; gives [1, _T, heads, dim].

    Computes in the dtype of value: rotated queries and keys may have been promoted. Without a
    layout it is torch's own kernel.
    """
    if layout is None:
        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout, scaling, **options
        )
        return output, None
    layout.num_calls += 1
    _refuse_unsupported(layout, dropout, options)
    q, k, v = (states[0].transpose(0, 1).to(value.dtype) for states in (query, key, value))
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    kernel = fused_attention if q.device.type == "cuda" else exact_attention
    return kernel(q, k, v, layout, scale)[None], None


def _refuse_unsupported(layout: Layout, dropout: float, options: dict[str, Any]) -> None:
    if dropout > 0:
        raise UserError("attention_dropout must be 0: set it in the model's config.json")
    window = options.get("sliding_window")
    if window is not None and window < layout.longest:
        raise UserError(
            f"the model attends over a window of {window} tokens, and a sequence has "
            f"{layout.longest}: lower max_length, or use a model with full attention"
        )
    for name in ("softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UserError(f"the model's attention uses {name}, which posttrain does not support")


def exact_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """By matrix products. q [_T, heads, dim], k and v [_T, key heads, dim]; gives q's shape."""
    return cast(Tensor, _PackedAttention.apply(q, k, v, layout, scale))  # type: ignore[no-untyped-call]


def fused_attention(q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
    """The same by torch's fused kernel. q [_T, heads, dim], k and v [_T, key heads, dim]."""
    outputs = [_fused_block(block, q, k, v, scale) for block in layout.blocks]
    return torch.cat(outputs).index_select(0, layout.restore)


def _fused_block(block: Block, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    queries, keys, values = (x[block.tokens].transpose(1, 2) for x in (q, k, v))
    mask: Tensor | None = None
    if block.prefix is not None:
        branches = len(block.tokens) // len(block.prefix)
        length, prefix_length = block.tokens.shape[1], block.prefix.shape[1]
        shared = (
            x[block.prefix].transpose(1, 2).repeat_interleave(branches, dim=0) for x in (k, v)
        )
        keys, values = (torch.cat(pair, dim=2) for pair in zip(shared, (keys, values), strict=True))
        causal = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
        seen = torch.ones(len(block.prefix), prefix_length, dtype=torch.bool, device=q.device)
        if block.prefix_padding is not None:
            seen = ~block.prefix_padding
        seen = seen.repeat_interleave(branches, dim=0)[:, None, None, :]
        mask = torch.cat(
            [seen.expand(-1, -1, length, -1), causal.expand(len(queries), 1, -1, -1)], dim=3
        )
    mixed = functional.scaled_dot_product_attention(
        queries,
        keys,
        values,
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return mixed.transpose(1, 2).flatten(0, 1)


class _PackedAttention(torch.autograd.Function):
    """Matrix products a tile at a time; the backward pass computes the probabilities again.

    Memory beyond inputs and outputs is that of one tile. Sums are in float32 (float64 where the
    inputs are).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.layout, ctx.scale = layout, scale
        outputs: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            for block in layout.blocks:
                states = _BlockStates.gather(block, q, k, v)
                output = states.empty()
                for tile in states.tiles():
                    probabilities = _probabilities(tile, scale)
                    output[tile.groups, :, :, :, tile.queries] = tile.mix(probabilities)
                outputs.append(states.rows(output))
        return torch.cat(outputs).index_select(0, layout.restore)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        layout: Layout = ctx.layout
        own: list[tuple[Tensor, Tensor, Tensor]] = []
        prefixes: list[tuple[Tensor, Tensor]] = []
        for block in layout.blocks:
            states = _BlockStates.gather(block, q, k, v)
            gradients = _block_gradients(states, states.gather_queries(grad), ctx.scale)
            own.append(gradients.own)
            if gradients.prefix is not None:
                prefixes.append(gradients.prefix)
        dq, dk, dv = (
            torch.cat(parts).index_select(0, layout.restore) for parts in zip(*own, strict=True)
        )
        if layout.prefix_restore is not None:
            zero = k.new_zeros(1, *k.shape[1:])
            for total, parts in zip((dk, dv), zip(*prefixes, strict=True), strict=True):
                total += torch.cat([*parts, zero]).index_select(0, layout.prefix_restore)
        if layout.num_filling:
            for total in (dq, dk, dv):
                total[-layout.num_filling :] = 0.0
        return dq, dk, dv, None, None


@dataclass(frozen=True)
class _Tile:
    """Queries of some groups, and all that they see: `_R` products of `_M` queries.

    q [_R, _M, dim]; k and v, the branches' own, [_R, _S, dim]; prefix_k and prefix_v
    [_R / _G, _P, dim]; with `_S` columns of the own part, the last `chunk` of them causal.
    """

    groups: slice
    queries: slice
    shape: tuple[int, ...]
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None
    prefix_padding: Tensor | None

    def mix(self, probabilities: Tensor) -> Tensor:
        """Values by probabilities, [groups, key heads, _G, heads of a key head, chunk, dim]."""
        if self.prefix_v is None:
            return torch.bmm(probabilities, self.v).view(self.shape)
        seen, own = self.parts(probabilities)
        mixed = torch.bmm(own, self.v)
        return (mixed + torch.bmm(seen, self.prefix_v).view_as(mixed)).view(self.shape)

    def parts(self, values: Tensor) -> tuple[Tensor, Tensor]:
        """The prefix's columns [_R / _G, _G * _M, _P] and the own ones [_R, _M, _S]."""
        assert self.prefix_k is not None
        groups, width, _ = self.prefix_k.shape
        return values[..., :width].reshape(groups, -1, width), values[..., width:]

    def products(self, left: Tensor, own: Tensor, prefix: Tensor | None, scale: float) -> Tensor:
        """Left [_R, _M, dim] by keys or values, transposed, [_R, _M, _P + _S]."""
        unused = left.new_empty(1, 1, 1)
        scores = torch.baddbmm(unused, left, own.transpose(1, 2), beta=0, alpha=scale)
        if prefix is None:
            return scores
        seen = torch.baddbmm(
            unused,
            left.view(len(prefix), -1, left.shape[-1]),
            prefix.transpose(1, 2),
            beta=0,
            alpha=scale,
        )
        return torch.cat([seen.view(*left.shape[:2], -1), scores], dim=2)


@dataclass(frozen=True)
class _BlockStates:
    """Heads of a block, gathered. With `_B` groups of `_G` rows, `_K` key heads, `_Q` heads each:

    q [_B, _K, _G, _Q, _L, dim], k and v [_B, _K, _G, _L, dim], prefix_k and prefix_v
    [_B, _K, _P, dim].
    """

    block: Block
    q: Tensor
    k: Tensor
    v: Tensor
    prefix_k: Tensor | None
    prefix_v: Tensor | None

    @classmethod
    def gather(cls, block: Block, q: Tensor, k: Tensor, v: Tensor) -> _BlockStates:
        num_groups = len(block.tokens) if block.prefix is None else len(block.prefix)
        prefix_k = prefix_v = None
        if block.prefix is not None:
            prefix_k = _gathered(k, block.prefix).transpose(1, 2).contiguous()
            prefix_v = _gathered(v, block.prefix).transpose(1, 2).contiguous()
        branches, length = len(block.tokens) // num_groups, block.tokens.shape[1]
        shape = (num_groups, branches, length, k.shape[1])
        heads = q.shape[1] // k.shape[1]
        return cls(
            block,
            _gathered(q, block.tokens).view(*shape, heads, -1).permute(0, 3, 1, 4, 2, 5),
            _gathered(k, block.tokens).view(*shape, -1).permute(0, 3, 1, 2, 4).contiguous(),
            _gathered(v, block.tokens).view(*shape, -1).permute(0, 3, 1, 2, 4).contiguous(),
            prefix_k,
            prefix_v,
        )

    def gather_queries(self, grad: Tensor) -> Tensor:
        """What lies at the queries, in the shape of q, and 0 at filling."""
        num_groups, key_heads, branches, heads, length, dim = self.q.shape
        rows = _gathered(grad, self.block.tokens)
        if self.block.padding is not None:
            rows = rows.masked_fill(self.block.padding[:, :, None, None], 0.0)
        shape = (num_groups, branches, length, key_heads, heads, dim)
        return rows.view(shape).permute(0, 3, 1, 4, 2, 5)

    def empty(self) -> Tensor:
        """In the shape of q, but in memory as `rows` gives it."""
        num_groups, key_heads, branches, heads, length, dim = self.q.shape
        shape = (num_groups, branches, length, key_heads, heads, dim)
        return self.q.new_empty(shape).permute(0, 3, 1, 4, 2, 5)

    def rows(self, states: Tensor) -> Tensor:
        """Back from the shape of q, or of k, to [rows of the block, heads, dim]."""
        if states.dim() == self.q.dim():
            return states.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(1, 2)
        return states.permute(0, 2, 3, 1, 4).flatten(0, 2)

    def tiles(self) -> Iterator[_Tile]:
        """Pieces of at most `_TILE` scores, unless one chunk of one group has more."""
        num_groups, key_heads, branches, heads, length, dim = self.q.shape
        seen = 0 if self.prefix_k is None else self.prefix_k.shape[2]
        for start in range(0, length, _CHUNK):
            stop = min(start + _CHUNK, length)
            of_group = key_heads * branches * heads * (stop - start) * (seen + stop)
            step = max(_TILE // of_group, 1)
            for first in range(0, num_groups, step):
                groups = slice(first, min(first + step, num_groups))
                q = self.q[groups, :, :, :, start:stop]
                flat = (-1, heads * (stop - start), dim)
                padding = self.block.prefix_padding
                yield _Tile(
                    groups,
                    slice(start, stop),
                    q.shape,
                    q.reshape(flat),
                    self.k[groups, :, :, :stop].flatten(0, 2),
                    self.v[groups, :, :, :stop].flatten(0, 2),
                    None if self.prefix_k is None else self.prefix_k[groups].flatten(0, 1),
                    None if self.prefix_v is None else self.prefix_v[groups].flatten(0, 1),
                    None if padding is None else padding[groups],
                )


@dataclass(frozen=True)
class _BlockGradients:
    """Of queries, keys and values, one row a row of the block; and of the prefixes' alone."""

    own: tuple[Tensor, Tensor, Tensor]
    prefix: tuple[Tensor, Tensor] | None


def _block_gradients(states: _BlockStates, grad: Tensor, scale: float) -> _BlockGradients:
    dtype = states.q.dtype
    wide = torch.promote_types(dtype, torch.float32)
    dq = states.empty()
    dk, dv = (torch.zeros_like(x, dtype=wide) for x in (states.k, states.v))
    prefixes = [x for x in (states.prefix_k, states.prefix_v) if x is not None]
    seen = [torch.zeros_like(x, dtype=wide) for x in prefixes]
    for tile in states.tiles():
        upstream = grad[tile.groups, :, :, :, tile.queries].reshape(tile.q.shape)
        weights = _probabilities(tile, scale)
        d_weights = tile.products(upstream, tile.v, tile.prefix_v, 1.0)
        d_scores = torch.ops.aten._softmax_backward_data(d_weights, weights, -1, dtype)
        columns = slice(0, tile.queries.stop)
        own, d_own = weights, d_scores
        if tile.prefix_k is not None:
            prefix, own = tile.parts(weights)
            d_prefix, d_own = tile.parts(d_scores)
            d_queries = torch.bmm(d_prefix, tile.prefix_k).view_as(tile.q)
            _add(seen[0], tile.groups, _transposed(d_prefix, tile.q, len(d_prefix)))
            _add(seen[1], tile.groups, _transposed(prefix, upstream, len(prefix)))
            d_queries = d_queries + torch.bmm(d_own, tile.k)
        else:
            d_queries = torch.bmm(d_own, tile.k)
        dq[tile.groups, :, :, :, tile.queries] = d_queries.view(tile.shape)
        _add(dk[:, :, :, columns], tile.groups, _transposed(d_own, tile.q, len(d_own)))
        _add(dv[:, :, :, columns], tile.groups, _transposed(own, upstream, len(own)))
    own_gradients = (
        states.rows(dq.mul_(scale)),
        states.rows(dk.mul_(scale).to(dtype)),
        states.rows(dv.to(dtype)),
    )
    if not seen:
        return _BlockGradients(own_gradients, None)
    d_keys, d_values = (
        x.transpose(1, 2).flatten(0, 1).to(dtype) for x in (seen[0].mul_(scale), seen[1])
    )
    return _BlockGradients(own_gradients, (d_keys, d_values))


def _probabilities(tile: _Tile, scale: float) -> Tensor:
    """Softmax over what each query sees, [_R, _M, _P + _S].

    The kernel takes bfloat16 in and out and sums in float32.
    """
    scores = tile.products(tile.q, tile.k, tile.prefix_k, scale)
    chunk = tile.shape[4]
    table = scores.view(-1, chunk, scores.shape[-1])
    later = torch.full((chunk, chunk), -math.inf, dtype=scores.dtype, device=scores.device)
    table[..., -chunk:] += later.triu_(1)
    if tile.prefix_padding is not None:
        hidden = tile.prefix_padding[:, None, None, :]
        by_group = scores.view(len(tile.prefix_padding), -1, *scores.shape[1:])
        by_group[..., : hidden.shape[-1]].masked_fill_(hidden, -math.inf)
    return scores.softmax(dim=-1)


def _gathered(states: Tensor, index: Tensor) -> Tensor:
    """[rows, columns, heads, dim] out of [_T, heads, dim]."""
    return states.index_select(0, index.flatten()).view(*index.shape, *states.shape[1:])


def _transposed(left: Tensor, right: Tensor, size: int) -> Tensor:
    """left' right for [size, queries, columns] and [size, queries, dim], summed over queries."""
    return torch.bmm(left.transpose(1, 2), right.view(size, -1, right.shape[-1]))


def _add(total: Tensor, groups: slice, part: Tensor) -> None:
    some = total[groups]
    some += part.view(some.shape)
