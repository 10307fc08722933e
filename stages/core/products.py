"""Matrix products by the faster of a processor's libraries.

torch sends those of float32 to MKL, which reaches half of what oneDNN does on processors of AMD
(103 and 227 GFLOP/s a core, 2,048 x 576 by 576 x 1,536).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

# Multiplications below which oneDNN takes longer to begin than it saves.
_LEAST_WORK = 2**21


def linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """states [..., in] times weight [out, in], transposed, plus bias [out]: [..., out].

    As torch's, but without a gradient, for autograd functions; any of them may be a transposed
    view. left.T @ right is linear(left.T, right.T).
    """
    if states.numel() * len(weight) < _LEAST_WORK or not has_onednn(states):
        return functional.linear(states, weight, bias)
    rows = states if states.dim() == 2 else states.reshape(-1, states.shape[-1])
    found: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return found.view(*states.shape[:-1], len(weight))


def has_onednn(states: Tensor) -> bool:
    """Whether they are multiplied by oneDNN here, and not by what torch would take."""
    return (
        states.dtype == torch.float32
        and states.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
    )
