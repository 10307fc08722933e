"""Scripted stand-ins for the parts around a stage."""

from __future__ import annotations

from collections.abc import Mapping


class MemoryTracker:
    """Keeps what a stage logs."""

    def __init__(self) -> None:
        self.lines: list[tuple[int, dict[str, float]]] = []
        self.rewound: list[int] = []
        self.resumed: list[int] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.lines.append((step, dict(metrics)))

    def rewind(self, step: int) -> None:
        self.rewound.append(step)
        self.lines = [line for line in self.lines if line[0] <= step]

    def resume(self, step: int) -> None:
        self.resumed.append(step)
        self.lines = [line for line in self.lines if line[0] <= step]


class Killed(Exception):
    """Stands for a kill -9: nothing after it runs."""
