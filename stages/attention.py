"""Attention over a packed row: exact, block by block, with no mask over the whole row.

Registered with transformers under a name, so that any model that lets its attention be chosen can
use it. With its gradient, torch's own kernel takes a third longer on a CPU with AMX than the matrix
products of `stages.exact_attention`, for two sequences of 1,024 tokens, and four times as long for
32 of 64, and more without AMX (SmolLM2 shapes, bfloat16); on CUDA torch's kernel is the fast one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from schemas.base import UserError
from stages.exact_attention import exact_attention
from stages.packing import Block, Layout

NAME = "posttrain_packed"


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
