"""Linear maps, with adapters or without, as products that a processor is fast at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from stages.core import kernels
from stages.core.products import has_amx, has_onednn

Multiply = Callable[[Tensor], Tensor]
"""[_T, in] -> [_T, out]."""

# Rows of a weight of which the cache of a core holds a panel, and then the next one.
_MOST_CACHED = 4096


@dataclass(frozen=True)
class LinearMap:
    """weight [out, in], bias [out], and an adapter's down [rank, in] and up [out, rank], scaled."""

    weight: Tensor
    bias: Tensor | None
    adapter: tuple[Tensor, Tensor] | None

    @classmethod
    def of(cls, module: Any) -> LinearMap:
        """What `is_linear_map` has found to be one, as it is now."""
        base = getattr(module, "base_layer", module)
        adapter = None
        if base is not module:
            (name,) = module.active_adapters
            up = module.lora_B[name].weight.detach() * module.scaling[name]
            adapter = (module.lora_A[name].weight.detach(), up)
        return cls(base.weight.detach(), None if base.bias is None else base.bias.detach(), adapter)

    def with_outputs(self, reordered: Callable[[Tensor], Tensor]) -> LinearMap:
        """The map with its outputs, the first dimension, in another order."""
        return LinearMap(
            reordered(self.weight),
            None if self.bias is None else reordered(self.bias),
            None if self.adapter is None else (self.adapter[0], reordered(self.adapter[1])),
        )


def is_linear_map(module: Any) -> bool:
    """Whether a module is torch's linear map, or such a one with one plain, active adapter."""
    if type(module) is nn.Linear:
        return True
    if type(getattr(module, "base_layer", None)) is not nn.Linear:
        return False
    # Importing peft takes seconds, which only its users are to pay.
    from peft.tuners.lora import Linear

    if type(module) is not Linear or module.disable_adapters or module.merged:
        return False
    names = list(module.active_adapters)
    return (
        len(names) == 1
        and names[0] in module.lora_A
        and names[0] not in module.lora_variant
        and not module.fan_in_fan_out
        and all(
            type(part[names[0]]) is nn.Linear and part[names[0]].bias is None
            for part in (module.lora_A, module.lora_B)
        )
    )


class Product:
    """states [_T, in] by linear maps of one input, stacked; their weights are laid out for it."""

    def __init__(self, maps: Sequence[LinearMap], dtype: torch.dtype) -> None:
        weight = torch.cat([one.weight.to(dtype) for one in maps])
        bias: Tensor | None = None
        if any(one.bias is not None for one in maps):
            biases = [
                one.weight.new_zeros(len(one.weight)) if one.bias is None else one.bias
                for one in maps
            ]
            bias = torch.cat(biases).to(dtype)
        self.map = _laid_out(weight, bias)
        self.adapter: tuple[Multiply, Multiply] | None = None
        adapters = _stacked(maps, dtype)
        if adapters is not None:
            down, up = adapters
            self.adapter = _of_adapter(down), _of_adapter(up)

    def __call__(self, states: Tensor) -> Tensor:
        """[_T, out of all maps]."""
        found = self.map(states)
        if self.adapter is not None:
            down, up = self.adapter
            found += up(down(states))
        return found


@dataclass(frozen=True)
class Panels:
    """A weight and a bias, laid out for `kernels.product`."""

    weight: Tensor
    bias: Tensor | None
    columns: int

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor | None) -> Panels:
        """Of a weight [columns, size] and a bias [columns]."""
        own = None if bias is None else kernels.panels_of_bias(bias)
        return cls(kernels.panels(weight), own, len(weight))

    def __call__(self, states: Tensor) -> Tensor:
        """[_T, columns] of states [_T, size]."""
        return kernels.product(states, self.weight, self.columns, self.bias)


def _stacked(maps: Sequence[LinearMap], dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """Adapters of several maps as one: their down one upon the other, their up along a diagonal."""
    if all(one.adapter is None for one in maps):
        return None
    downs, ups = [], []
    for one in maps:
        size, width = one.weight.shape
        empty = one.weight.new_zeros(0, width), one.weight.new_zeros(size, 0)
        down, up = empty if one.adapter is None else one.adapter
        downs.append(down)
        ups.append(up)
    return torch.cat(downs).to(dtype), torch.block_diag(*ups).to(dtype)


def _laid_out(weight: Tensor, bias: Tensor | None) -> Multiply:
    """Products with a weight, by our kernel, oneDNN or torch, whichever is the fastest."""
    if _prefers_panels(weight):
        return Panels.of(weight, bias)
    if not _has_packed_products(weight):
        return lambda states: functional.linear(states, weight, bias)
    # The layout does not depend on the number of rows; it wants one all the same.
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, 32)
    return lambda states: torch.ops.mkldnn._linear_pointwise(states, packed, bias, "none", [], "")


def _of_adapter(weight: Tensor) -> Multiply:
    """Products with a small weight, which oneDNN's own layout does nothing for."""
    if _prefers_panels(weight):
        return Panels.of(weight, None)
    return lambda states: functional.linear(states, weight)


def _prefers_panels(weight: Tensor) -> bool:
    """Whether nothing multiplies few rows by the weight faster than our kernel."""
    amx = weight.dtype == torch.bfloat16 and has_amx()
    return kernels.multiplies(weight) and weight.shape[1] <= _MOST_CACHED and not amx


def _has_packed_products(weight: Tensor) -> bool:
    """Whether oneDNN multiplies it, from a layout of its own."""
    if not has_onednn(weight):
        return False
    return weight.dtype == torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
