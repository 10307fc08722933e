"""Where the time of a step goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch

from stages.optimization import Optimizer


@dataclass
class Clock:
    """Seconds by part, on the wall and of this process's processors.

    Parts may lie within parts: what happens in the inner one counts there alone.
    """

    wall: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    cpu: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    _open: list[str] = field(default_factory=list)
    _since: tuple[float, float] = (0.0, 0.0)

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside."""
        self._turn()
        self._open.append(name)
        try:
            yield
        finally:
            self._turn()
            self._open.pop()

    def reset(self) -> None:
        """Forget what was counted."""
        self.wall.clear()
        self.cpu.clear()

    def _turn(self) -> None:
        """Book the time since the last turn on the innermost part."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = (time.perf_counter(), time.process_time())
        if self._open:
            self.wall[self._open[-1]] += now[0] - self._since[0]
            self.cpu[self._open[-1]] += now[1] - self._since[1]
        self._since = now


@dataclass
class TimedOptimizer(Optimizer):
    """Counts clipping and stepping as a part of their own, wherever they are called from."""

    clock: Clock = field(default_factory=Clock)

    def clip(self) -> float:
        """As `Optimizer.clip`."""
        with self.clock.part("optimizer"):
            return super().clip()

    def step(self, scale: float = 1.0) -> float:
        """As `Optimizer.step`."""
        with self.clock.part("optimizer"):
            return super().step(scale)
