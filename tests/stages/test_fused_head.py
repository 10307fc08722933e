"""Which cross entropy is taken, and that the fused one gives the numbers of torch's."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from schemas.base import UserError
from stages import fused_head
from stages.fused_head import fused_apply, mean_cross_entropy_at

POSITIONS = torch.tensor([0, 3, 4, 6])
TARGETS = torch.tensor([2, 0, 5, 5])


@pytest.fixture(autouse=True)
def undecided() -> Iterator[None]:
    fused_apply.cache_clear()
    yield
    fused_apply.cache_clear()


class ScriptedLiger:
    """What Liger's function computes, from its definition, and what it was asked."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def apply(
        self, rows: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, *options: Any
    ) -> tuple[Tensor, None, None, None]:
        self.calls.append(options)
        logits = functional.linear(rows, weight, bias)
        return -logits.log_softmax(-1)[range(len(targets)), targets].sum(), None, None, None


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> ScriptedLiger:
    liger = ScriptedLiger()
    module = ModuleType("liger_kernel.ops")
    module.LigerFusedLinearCrossEntropyFunction = liger  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", module)
    monkeypatch.setattr(fused_head, "_release", lambda: "0.8.7")
    return liger


def messages(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_on_a_cpu_it_is_torch(installed: ScriptedLiger, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert fused_apply("cpu") is None
    assert messages(caplog) == ["cross entropy: torch, in chunks: the device is cpu"]


@pytest.mark.parametrize(
    ("release", "why"),
    [
        (None, "liger-kernel is not installed (pip install 'posttrain[liger]')"),
        ("0.8.4", "liger-kernel 0.8.4 is installed, "),
        ("0.9.0", "liger-kernel 0.9.0 is installed, "),
    ],
)
def test_on_cuda_without_the_release_that_is_known_it_is_torch(
    installed: ScriptedLiger,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    release: str | None,
    why: str,
) -> None:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(fused_head, "_release", lambda: release)
    assert fused_apply("cuda") is None
    assert fused_apply("cuda") is None
    (said,) = messages(caplog)
    assert said.startswith(f"cross entropy: torch, in chunks: {why}")


def test_on_cuda_with_liger_it_is_liger_and_said_once(
    installed: ScriptedLiger, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    assert fused_apply("cuda") == installed.apply
    assert fused_apply("cuda") == installed.apply
    assert messages(caplog) == [
        "cross entropy: Liger's fused kernel (0.8.7); no entropy is reported"
    ]


def test_an_installation_that_is_broken_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "_release", lambda: "0.8.5")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", None)
    with pytest.raises(UserError, match=r"cannot be used(?s:.*)pip uninstall liger-kernel"):
        fused_apply("cuda")


def losses(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, apply: fused_head.Apply | None
) -> tuple[float, list[Tensor], dict[str, float]]:
    """Loss, gradients of the hidden states and of the head, and metrics."""
    monkeypatch.setattr(fused_head, "fused_apply", lambda device: apply)
    model.zero_grad()
    torch.manual_seed(0)
    hidden = torch.randn(8, model.config.hidden_size, requires_grad=True)
    loss, metrics = mean_cross_entropy_at(model, hidden, POSITIONS, TARGETS, 7)
    loss.backward()
    weight = model.get_output_embeddings().weight
    assert hidden.grad is not None and weight.grad is not None
    return loss.item(), [hidden.grad, weight.grad.clone()], metrics


def test_the_fused_one_is_asked_for_the_sum_over_the_denominator(
    tiny: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    installed: ScriptedLiger,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, _ = tiny
    expected, expected_gradients, metrics = losses(model, monkeypatch, None)
    found, gradients, fused_metrics = losses(model, monkeypatch, installed.apply)
    assert found == pytest.approx(expected, rel=1e-6)
    for one, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert metrics.keys() == {"entropy"} and fused_metrics == {}
    (options,) = installed.calls
    # Sum; gradients of the weight in float32; 2**25 logits, over 4 rows of 32 numbers.
    assert options[4] == "sum" and options[7] is torch.float32 and options[-1] == 2**18
    model.zero_grad()


_INTERPRETED = """
import json, sys
import torch
from torch import nn
from types import SimpleNamespace
from stages import fused_head

apply = fused_head._import()
found = []
for dtype, with_bias, frozen in (
    (torch.float32, False, False), (torch.float32, True, False),
    (torch.float32, False, True), (torch.bfloat16, False, False),
):
    torch.manual_seed(0)
    head = nn.Linear(8, 37, bias=with_bias)
    head.weight.data.mul_(4)
    head.requires_grad_(not frozen)
    start = torch.randn(19, 8)
    positions, targets = torch.randint(19, (13,)), torch.randint(37, (13,))
    base = nn.Module()
    base._posttrain_compute_dtype = dtype
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = head
            self.base_model = base
        def get_output_embeddings(self):
            return self.head
    results = []
    for chosen in (None, apply):
        fused_head.fused_apply = lambda device: chosen
        head.zero_grad()
        hidden = start.clone().requires_grad_()
        loss, _ = fused_head.mean_cross_entropy_at(Model(), hidden, positions, targets, 7)
        (loss * 0.5).backward()
        gradients = [hidden.grad, *(p.grad for p in head.parameters() if p.requires_grad)]
        results.append([loss.detach()[None], *gradients])
    found.append([
        ((one - other).norm() / other.norm()).item() for other, one in zip(*results, strict=True)
    ])
print(json.dumps(found))
"""


@pytest.mark.liger
@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger-kernel is not installed"
)
def test_liger_agrees_with_torch_in_tritons_interpreter() -> None:
    """Liger's own kernels, run by Triton's interpreter on the CPU."""
    done = subprocess.run(
        [sys.executable, "-c", _INTERPRETED],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "TRITON_INTERPRET": "1",
            "PYTHONPATH": str(Path(__file__).parents[2]),
        },
    )
    assert done.returncode == 0, done.stderr[-4000:]
    plain, with_bias, frozen, bfloat16 = json.loads(done.stdout.splitlines()[-1])
    assert [len(plain), len(with_bias), len(frozen), len(bfloat16)] == [3, 4, 2, 3]
    assert max(*plain, *with_bias, *frozen) < 1e-5
    # Both take the products in bfloat16; the gradient of a logit is rounded to 8 bits in either.
    assert max(bfloat16) < 1e-2
