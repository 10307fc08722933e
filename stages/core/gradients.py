"""Gradients of weights, added to those of earlier micro-batches where they lie."""

from __future__ import annotations

from torch import Tensor

from stages.core.elementwise import add_


def added(weight: Tensor, part: Tensor) -> Tensor | None:
    """What the backward method of an autograd function returns as a weight's gradient.

    Where the weight has a gradient, part is added to it, and None says that there is no more to
    come: no copy in the weight's format is made in between (gradient accumulation fusion, as in
    Megatron-LM, Narayanan et al. 2021). Else it is part in the weight's format, for autograd to
    keep. Not for `torch.autograd.grad` of a weight that has a gradient.
    """
    total = gradient(weight)
    if total is None:
        return part.to(weight.dtype)
    add_(total, part)
    return None


def gradient(weight: Tensor) -> Tensor | None:
    """A weight's gradient, if it has one; what is computed from others has none."""
    return weight.grad if weight.is_leaf else None
