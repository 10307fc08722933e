"""Time goes to the innermost part, and an optimizer's to its own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from schemas.training import OptimizerConfig
from tests.benchmarks import clock as module
from tests.benchmarks.clock import Clock, TimedOptimizer


class Time:
    """Seconds pass when they are told to; the processor's at half the speed."""

    now = 0.0

    def perf_counter(self) -> float:
        return self.now

    def process_time(self) -> float:
        return self.now / 2


@pytest.fixture
def time(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(module, "time", found)
    return found


def test_an_inner_part_is_no_part_of_the_outer_one(time: Time) -> None:
    clock = Clock()
    time.now = 5.0  # in no part
    with clock.part("outer"):
        time.now += 1
        with clock.part("inner"):
            time.now += 10
        time.now += 2
        with clock.part("inner"):
            time.now += 20
    time.now += 100
    with clock.part("outer"):
        time.now += 4
    assert clock.wall == {"outer": 7.0, "inner": 30.0}
    assert clock.cpu == {"outer": 3.5, "inner": 15.0}
    clock.reset()
    assert not clock.wall and not clock.cpu


def test_a_part_that_fails_is_closed(time: Time) -> None:
    clock = Clock()

    def fail() -> None:
        with clock.part("inner"):
            time.now += 3
            raise RuntimeError

    with clock.part("outer"):
        with pytest.raises(RuntimeError):
            fail()
        time.now += 1
    assert clock.wall == {"outer": 1.0, "inner": 3.0}


def test_the_timed_optimizer_steps_as_the_plain_one() -> None:
    weights = []
    for cls in (TimedOptimizer, TimedOptimizer.__mro__[1]):
        torch.manual_seed(0)
        layer = nn.Linear(3, 2)
        optimizer = cls.create(layer, OptimizerConfig(learning_rate=0.1), 10)  # type: ignore[attr-defined]
        layer(torch.ones(3)).sum().backward()
        optimizer.clip()
        optimizer.step()
        weights.append(layer.weight)
        if isinstance(optimizer, TimedOptimizer):
            assert optimizer.clock.wall.keys() == {"optimizer"}
    assert torch.equal(*weights)
