"""A step of a `FusedDecoder` in one call: for a model of few parameters, calls take most of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from stages.core import kernels
from stages.lean_layers import is_silu
from stages.rollout.fused_decoder import FusedDecoder, Layer
from stages.rollout.products import Product


class KeysAndValues(Protocol):
    """Of one layer, as `kernels.attend` takes them."""

    keys: Tensor
    values: Tensor


class DecoderStep:
    """All layers for one token a row, as `FusedDecoder.states` has them.

    Shapes as in `stages.rollout.fused_context`.
    """

    def __init__(self, decoder: FusedDecoder) -> None:
        """For a decoder that `fits`, whose weights have to stay as they are."""
        self._decoder = decoder  # what the structures point at
        self._layers = (kernels.DecoderLayer * len(decoder.layers))()
        for structure, layer in zip(self._layers, decoder.layers, strict=True):
            _fill_in(structure, layer)

    def point_at(self, prompts: Sequence[KeysAndValues], own: Sequence[KeysAndValues]) -> None:
        """Keys and values of prompts and of rows for each layer, to be kept by the caller."""
        for layer, shared, of_rows in zip(self._layers, prompts, own, strict=True):
            layer.prompt_keys, layer.prompt_values = _pointers(shared.keys, shared.values)
            layer.own_keys, layer.own_values = _pointers(of_rows.keys, of_rows.values)

    def __call__(
        self,
        states: Tensor,
        turn: Tensor,
        prompt_of_row: Tensor,
        lengths: Tensor,
        sizes: tuple[int, int, int],
    ) -> Tensor:
        """What the layers make of states [_R, hidden], which are overwritten.

        turn [_R, _D / 2] is that of the tokens' positions; sizes: tokens of the longest prompt, of
        a row with this one, and what rows have room for.
        """
        first = self._decoder.layers[0]
        rows, hidden = states.shape
        inner = first.inner
        query_heads = first.num_heads * first.dim
        heads = query_heads + 2 * first.num_key_heads * first.dim
        work_size = kernels.attention_work(first.dim, sizes[0] + sizes[1])
        dtype = self._decoder.dtype
        kept = [
            prompt_of_row,
            lengths,
            turn.contiguous(),
            torch.empty(rows, hidden, dtype=dtype),
            torch.empty(rows, hidden, dtype=dtype),
            torch.empty(rows, max(heads, 2 * inner), dtype=dtype),
            torch.empty(rows, max(query_heads, inner), dtype=dtype),
            torch.empty(rows),
            torch.empty(torch.get_num_threads(), work_size),
        ]
        batch = kernels.DecoderBatch(
            rows,
            hidden,
            first.num_key_heads,
            first.num_heads // first.num_key_heads,
            first.dim,
            inner,
            *sizes,
            *_pointers(*kept),
            work_size,
        )
        kernels.decode_(states, self._layers, batch, dtype)
        return states


def fits(decoder: FusedDecoder) -> bool:
    """Whether each part is one that decoder.c knows."""
    return all(
        not layer.head_norms
        and is_silu(layer.activation)
        and all(one.panels is not None and one.adapters is None for one in layer.products)
        for layer in decoder.layers
    )


def _fill_in(structure: kernels.DecoderLayer, layer: Layer) -> None:
    names = ("qkv", "output", "gate_and_up", "down")
    for name, product in zip(names, layer.products, strict=True):
        weight, bias = _panels(product)
        setattr(structure, name, weight)
        setattr(structure, f"{name}_bias", bias)
    norm, mlp_norm = layer.norms
    structure.norm, structure.mlp_norm = _pointers(norm.weight, mlp_norm.weight)
    structure.epsilon, structure.mlp_epsilon = norm.epsilon, mlp_norm.epsilon
    structure.scale = layer.scaling


def _panels(product: Product) -> tuple[int, int | None]:
    assert product.panels is not None
    bias = product.panels.bias
    return product.panels.weight.data_ptr(), None if bias is None else bias.data_ptr()


def _pointers(*tensors: Tensor) -> list[int]:
    assert all(one.is_contiguous() for one in tensors)
    return [one.data_ptr() for one in tensors]
