"""Cross entropy of the output head by Liger's fused kernel, on CUDA and where it is installed.

The one module that imports Liger (`pip install 'posttrain[liger]'`). Its kernel makes loss and
gradient of a logit in one pass where torch makes them in several. It knows neither entropies nor a
temperature nor one weight a token: so it serves the mean cross entropy of supervised fine-tuning,
and the rest stays with `stages.core.logprobs`.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import logging
from collections.abc import Callable
from functools import cache
from typing import Any, cast

import torch
from packaging.specifiers import SpecifierSet
from torch import Tensor
from transformers import PreTrainedModel

from schemas.base import UserError
from stages.forward import LOGIT_ELEMENTS, weighted_logprobs_at
from stages.precision import compute_dtype

logger = logging.getLogger(__name__)

# Its arguments are told apart by their places, which other releases may change.
_RELEASES = SpecifierSet(">=0.8.5,<0.9")
_INSTALL = "pip install 'posttrain[liger]'"

Apply = Callable[..., tuple[Tensor, Any, Any, Any]]
"""`apply` of Liger's autograd function."""


def mean_cross_entropy_at(
    model: PreTrainedModel, hidden: Tensor, positions: Tensor, targets: Tensor, denominator: int
) -> tuple[Tensor, dict[str, float]]:
    """Cross entropy of targets [_N] predicted at flat positions [_N] of hidden [_T, _H], summed
    and divided by denominator; and the entropy of these predictions, summed and divided alike.

    The first is a scalar and differentiable; the second is left out by the fused kernel, which
    does not compute it. Raises UserError where Liger is installed but cannot be imported.
    """
    apply = fused_apply(hidden.device.type)
    if apply is None:
        weights = torch.full((len(targets),), -1 / denominator, device=hidden.device)
        loss, _, entropy = weighted_logprobs_at(model, hidden, positions, targets, weights)
        return loss, {"entropy": entropy.sum().item() / denominator}
    head = model.get_output_embeddings()
    rows = hidden.index_select(0, positions).to(compute_dtype(model))
    return _summed(apply, rows, head.weight, targets, getattr(head, "bias", None)) / denominator, {}


@cache
def fused_apply(device: str) -> Apply | None:
    """Liger's function for a type of device, or None for torch's; says which, once, and why.

    Raises UserError where Liger is installed but cannot be imported.
    """
    release = _release()
    if device != "cuda":
        why = f"the device is {device}"
    elif release is None:
        why = f"liger-kernel is not installed ({_INSTALL})"
    elif release not in _RELEASES:
        why = f"liger-kernel {release} is installed, {_RELEASES} is needed ({_INSTALL})"
    else:
        logger.info("cross entropy: Liger's fused kernel (%s); no entropy is reported", release)
        return _import()
    logger.info("cross entropy: torch, in chunks: %s", why)
    return None


def _release() -> str | None:
    try:
        return importlib.metadata.version("liger-kernel")
    except importlib.metadata.PackageNotFoundError:
        return None


def _import() -> Apply:
    try:
        ops: Any = importlib.import_module("liger_kernel.ops")
        return cast(Apply, ops.LigerFusedLinearCrossEntropyFunction.apply)
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"liger-kernel is installed but cannot be used ({error}): {_INSTALL}, "
            "or go without it: pip uninstall liger-kernel"
        ) from error


def _summed(
    apply: Apply, rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None
) -> Tensor:
    """Sum of the cross entropies of rows [_N, _H] under weight [_V, _H].

    The weight stays in its own number format, and so do its gradient and the gradient's sum over
    chunks: autocast makes the products in that of the rows.
    """
    products: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
    if rows.dtype != weight.dtype:
        products = torch.autocast(rows.device.type, rows.dtype)
    with products:
        loss, *_ = apply(
            rows,
            weight,
            targets,
            bias,
            None,  # weights of classes
            -100,  # a target to ignore: there is none
            0.0,  # z-loss
            0.0,  # label smoothing
            "sum",
            None,  # soft cap of the logits
            False,  # return the z-loss
            torch.float32,  # in which gradients of weight and bias are added up
            False,  # scale by the probability of the target
            False,  # return the accuracy
            False,  # return what is predicted
            None,  # implementation: Triton's
            None,  # mode of the implementation
            # Logits that are held at once, in numbers of the rows' own size; 1 makes small chunks,
            # and every chunk reads the weight again.
            max(LOGIT_ELEMENTS // rows.numel(), 1),
        )
    return loss
