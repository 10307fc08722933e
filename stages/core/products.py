"""Matrix products by the faster of a processor's libraries.

torch sends those of float32 to MKL, which reaches half of what oneDNN does on AMD's processors with
AVX-512 (103 and 227 GFLOP/s a core of Zen 5, 2,048 x 576 by 576 x 1,536). With AVX2 alone (Zen 3)
oneDNN is as fast where no operand is transposed, and 1.3 times as fast by a weight of 49,152 rows;
where one is, as in gradients, MKL is 1.1 to 1.4 times as fast.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional

from stages.core import kernels

# Of the two smaller sides of a product. oneDNN makes code for every shape that it meets, and keeps
# it: below, that costs as much time as it saves, and half a gigabyte where lengths vary.
_LEAST_SIDES = 2**16


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states [..., in] times weight [out, in], transposed, plus bias [out]: [..., out].

    As torch's, but without a gradient, for autograd functions; any of them may be a transposed
    view.
    """
    if states.dtype != torch.float32 or not _prefers_onednn(states, weight):
        return functional.linear(states, weight, bias)
    rows = math.prod(states.shape[:-1])
    if math.prod(sorted((rows, *weight.shape))[:2]) <= _LEAST_SIDES:
        return functional.linear(states, weight, bias)
    flat = states if states.dim() == 2 else states.reshape(rows, states.shape[-1])
    found: Tensor = torch.ops.mkldnn._linear_pointwise(flat, weight, bias, "none", [], "")
    return found.view(*states.shape[:-1], len(weight))


def weight_gradient(grad: Tensor, states: Tensor) -> Tensor:
    """grad.T @ states: [out, in] of grad [rows, out] and states [rows, in].

    oneDNN multiplies a transposed left operand of bfloat16 without AMX, at less than half the speed
    (530 and 1,200 GFLOP/s a core of Emerald Rapids), and torch's copy of it takes what that loses.
    """
    left = grad.T
    if grad.dtype == torch.bfloat16 and has_amx() and kernels.serve(grad):
        left = kernels.transposed(grad)
    return linear(left, states.T)


def has_onednn(states: Tensor) -> bool:
    """Whether oneDNN is there for tensors of this device."""
    return states.device.type == "cpu" and torch.backends.mkldnn.is_available()


@cache
def has_amx() -> bool:
    """Whether the processor multiplies tiles of bfloat16."""
    return torch.cpu._is_amx_tile_supported()


def _prefers_onednn(states: Tensor, weight: Tensor) -> bool:
    if not has_onednn(states):
        return False
    plain = states.is_contiguous() and weight.is_contiguous()
    return plain or torch.backends.cpu.get_cpu_capability() == "AVX512"
