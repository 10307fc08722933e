"""The command on small shapes: every part, by torch and by the kernels."""

from __future__ import annotations

import json

import pytest
import torch

from stages.core import kernels
from tests.benchmarks.elementwise import main, measured

SIZES = {"tokens": 8, "hidden": 16, "intermediate": 24, "head": 8, "length": 64, "vocabulary": 32}
SMALL = [f"--{name}={size}" for name, size in {**SIZES, "rounds": 2}.items()]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_every_part_has_a_line(capsys: pytest.CaptureFixture[str], precision: str) -> None:
    main([*SMALL, "--precision", precision])
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    names = {"norm", "gate", "softmax", "head"}
    both = names | {f"{name}, backward" for name in names}
    assert {line["part"] for line in lines} == both | {"rotation", "weight gradient"}
    assert all(line["torch_ms"] > 0 and line["kernels_ms"] > 0 for line in lines)


def test_torch_is_timed_without_the_kernels() -> None:
    served: list[bool] = []
    measured(lambda: served.append(kernels.serve(torch.zeros(1))), rounds=2)
    assert served == [False, True] * 3
