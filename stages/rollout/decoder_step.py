"""A step of a `FusedDecoder` in one call: for a model of few parameters, calls take most of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, cast

import torch
from torch import Tensor

from stages.core import kernels
from stages.lean_layers import is_silu
from stages.rollout.fused_decoder import FusedDecoder, Layer, Norm
from stages.rollout.products import Multiply, Panels, Product

_MAPS = ("qkv", "output", "gate_and_up", "down")


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
        maps = [getattr(one, name) for one in self._layers for name in _MAPS]
        self._greatest_rank: int = max(one.rank for one in maps)

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
            torch.empty(rows, self._greatest_rank, dtype=dtype),
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
        is_silu(layer.activation)
        and all(isinstance(part, Panels) for one in layer.products for part in _parts(one))
        for layer in decoder.layers
    )


def _fill_in(structure: kernels.DecoderLayer, layer: Layer) -> None:
    for name, norm in zip(("norm", "mlp_norm"), layer.norms, strict=True):
        setattr(structure, name, _norm(norm))
    if layer.head_norms:
        structure.k_norm, structure.q_norm = map(_norm, layer.head_norms)
    for name, product in zip(_MAPS, layer.products, strict=True):
        setattr(structure, name, _map(product))
    structure.scale = layer.scaling


def _norm(norm: Norm) -> kernels.DecoderNorm:
    return kernels.DecoderNorm(*_pointers(norm.weight), norm.epsilon)


def _map(product: Product) -> kernels.DecoderMap:
    panels = cast(list[Panels], _parts(product))
    weight, *adapter = (one.weight for one in panels)
    bias = panels[0].bias
    found = kernels.DecoderMap(*_pointers(weight), None if bias is None else bias.data_ptr())
    if adapter:
        found.adapter_down, found.adapter_up = _pointers(*adapter)
        found.rank = panels[1].columns
    return found


def _parts(product: Product) -> list[Multiply]:
    """The map itself, and its adapter's down and up."""
    return [product.map, *(product.adapter or ())]


def _pointers(*tensors: Tensor) -> list[int]:
    assert all(one.is_contiguous() for one in tensors)
    return [one.data_ptr() for one in tensors]
