"""Liger's fused cross entropy on CUDA, beside torch's. Run with `pytest -m gpu` where both are."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import Tensor

from schemas.training import Precision, SFTConfig
from stages import fused_head
from stages.models import load_base, to_device
from stages.precision import use_precision
from stages.train_sft import Example, micro_losses
from tests.stages.conftest import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(
        importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
    ),
]
EXAMPLES = [
    Example([4, 5, 6, 7, 8, 9, 1], [False] * 3 + [True] * 4),
    Example([10, 11, 12, 1], [False, False, True, True]),
]
CONFIG = SFTConfig.model_validate({"optimizer": {"learning_rate": 0.001}, "max_length": 32})


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-4), ("bfloat16", 2e-2)])
def test_loss_and_gradients_are_those_of_torch(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, tolerance: float
) -> None:
    apply = fused_head.fused_apply("cuda")
    assert apply is not None
    found, expected = (
        loss_and_gradients(monkeypatch, precision, chosen) for chosen in (apply, None)
    )
    assert found.keys() == expected.keys() and "loss" in found
    for name, value in expected.items():
        error = (found[name] - value).norm() / value.norm()
        assert error < tolerance, name


def loss_and_gradients(
    monkeypatch: pytest.MonkeyPatch, precision: Precision, apply: fused_head.Apply | None
) -> dict[str, Tensor]:
    monkeypatch.setattr(fused_head, "fused_apply", lambda device: apply)
    model, _ = load_base(tiny_config(), seed=0)
    use_precision(to_device(model, torch.device("cuda")), precision)
    loss = torch.zeros((), device="cuda")
    for micro in micro_losses(model, EXAMPLES, CONFIG, 1000):
        micro.loss.backward()
        loss += micro.loss.detach()
    gradients = {
        name: parameter.grad
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return {"loss": loss, **gradients}
