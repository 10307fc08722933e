"""How a stage reports its numbers: lines in a file, which someone else ships."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

from infra.files import write_atomic

_log = logging.getLogger(__name__)


class Tracker(Protocol):
    """What a stage knows of experiment tracking."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Report numbers of a step."""
        ...

    def rewind(self, step: int) -> None:
        """Forget every step after `step`; called after a resume from a checkpoint."""
        ...


class MetricsLine(NamedTuple):
    """One line of a metrics file."""

    step: int
    metrics: dict[str, float]
    time: float
    """Seconds since 1970."""


class FileTracker:
    """Appends one JSON line per call to `metrics.jsonl`; a killed process loses no whole line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.resumed_from_step: int | None = None
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_torn_line(path)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Append the numbers of a step."""
        line = format_line(MetricsLine(step, dict(metrics), time.time()))
        with self.path.open("a", encoding="utf-8") as file:
            file.write(line)

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, which the resumed stage is about to write again."""
        self.resumed_from_step = step
        lines = _whole_lines(self.path)
        kept = [line for line in _readable(lines, self.path) if line.step <= step]
        if len(kept) < len(lines):
            write_atomic(self.path, "".join(map(format_line, kept)))


def format_line(line: MetricsLine) -> str:
    """JSON of a line. JSON has no NaN or infinity: they are written as strings."""
    metrics = {key: _to_json(float(value)) for key, value in line.metrics.items()}
    record = {"step": line.step, "metrics": metrics, "time": line.time}
    return json.dumps(record, allow_nan=False) + "\n"


def parse_line(text: str | bytes) -> MetricsLine:
    """The inverse of `format_line`; raises ValueError for anything else."""
    try:
        record = json.loads(text)
        metrics = {key: float(value) for key, value in record["metrics"].items()}
        return MetricsLine(int(record["step"]), metrics, float(record["time"]))
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a line of metrics: {text!r}") from error


def read_metrics(path: Path) -> list[MetricsLine]:
    """Every whole line of a metrics file; a torn last line and a missing file are no error."""
    return [parse_line(line) for line in _whole_lines(path)]


def _whole_lines(path: Path) -> list[bytes]:
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


def _readable(lines: Iterable[bytes], path: Path) -> Iterator[MetricsLine]:
    """The lines that are whole; a damaged one is reported, and costs a point of a curve only."""
    for number, line in enumerate(lines, start=1):
        try:
            yield parse_line(line)
        except ValueError:
            _log.warning("%s line %d is damaged; its numbers are lost", path, number)


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _drop_torn_line(path: Path) -> None:
    """A line without its end was cut by a kill; the next line must not be glued to it."""
    if not path.exists():
        return
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)
