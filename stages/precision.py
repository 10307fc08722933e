"""Number format of the matrix products: float32, or bfloat16 by torch's autocast.

Weights, optimizer state, normalisation, softmax and losses stay in float32 either way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.training import Precision
from stages.lean_layers import held_weights, store_weights, use_lean_layers

logger = logging.getLogger(__name__)

_ATTRIBUTE = "_posttrain_compute_dtype"

_Model = TypeVar("_Model", bound=nn.Module)


def use_precision(model: _Model, precision: Precision) -> _Model:
    """Let a model's backbone compute in a number format; returns the model."""
    backbone = model.base_model
    assert isinstance(backbone, nn.Module)
    use_lean_layers(backbone)
    if precision == "float32":
        return model
    device = next(backbone.parameters()).device
    if not has_fast_bfloat16(device):
        logger.warning("%s has no bfloat16 units: bfloat16 will be slower than float32", device)
    setattr(backbone, _ATTRIBUTE, torch.bfloat16)
    return model


def freeze(model: _Model) -> _Model:
    """Make a model one that is only asked, after `use_precision`; returns the model.

    In bfloat16 its weights take half the memory, and its answers are the same to the bit.
    """
    model.eval().requires_grad_(False)
    dtype = compute_dtype(model)
    if dtype != next(model.parameters()).dtype:
        store_weights(model, dtype)
    return model


@contextmanager
def computing(model: nn.Module) -> Iterator[None]:
    """Passes of a model in its number format.

    While it lasts no weight may change: each is turned into bfloat16 once, and then used again.
    """
    dtype = compute_dtype(model)
    first = next(model.parameters())
    plain = dtype == first.dtype
    with weights_held(model), nullcontext() if plain else torch.autocast(first.device.type, dtype):
        yield


@contextmanager
def weights_held(model: nn.Module) -> Iterator[None]:
    """Keep what is made of weights for the products over several passes, backward passes too.

    While it lasts no weight may change. Where layers are computed again to save memory, so are the
    copies.
    """
    backbone = cast(PreTrainedModel, model.base_model)
    copies = held_weights(backbone)
    if copies is None or (backbone.training and backbone.is_gradient_checkpointing):
        yield
        return
    with copies.held():
        yield


def held_copy(model: nn.Module, weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """A weight in the number format of its products, if `weights_held` keeps such copies now."""
    copies = held_weights(cast(PreTrainedModel, model.base_model))
    return None if copies is None or not copies.is_holding else copies.of(weight, dtype)


def compute_dtype(model: nn.Module) -> torch.dtype:
    """What a head on the backbone takes its products in."""
    dtype: torch.dtype | None = getattr(model.base_model, _ATTRIBUTE, None)
    return next(model.parameters()).dtype if dtype is None else dtype


def has_fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags
