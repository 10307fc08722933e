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
        """Forget every step after `step`: training has gone back to it."""
        ...

    def resume(self, step: int) -> None:
        """Go on from a checkpoint of an earlier attempt: `rewind`, and remember that."""
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
        """Drop the lines of later steps, which the stage is about to write again."""
        lines = read_metrics(self.path)
        kept = [line for line in lines if line.step <= step]
        if len(kept) < len(lines):
            write_atomic(self.path, "".join(map(format_line, kept)))

    def resume(self, step: int) -> None:
        """Drop the lines of later steps, and keep where the stage went on."""
        self.resumed_from_step = step
        self.rewind(step)


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
    except (KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"not a line of metrics: {text[:200]!r}") from error


def read_metrics(path: Path) -> list[MetricsLine]:
    """Every whole line of a metrics file; a torn last line and a missing file are no error.

    A damaged line is left out, with a warning: numbers for people must not keep a stage from
    going on.
    """
    if not path.exists():
        return []
    return list(parse_lines(path.read_bytes().split(b"\n")[:-1], path))


def parse_lines(lines: Iterable[bytes], path: Path) -> Iterator[MetricsLine]:
    """The lines that can be read; a warning for each that cannot."""
    for number, line in enumerate(lines, start=1):
        try:
            yield parse_line(line)
        except ValueError as error:
            _log.warning("%s line %d is damaged and left out: %s", path, number, error)


def _to_json(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _drop_torn_line(path: Path) -> None:
    """A line without its end was cut by a kill; the next line must not be glued to it."""
    if not path.exists():
        return
    whole = path.read_bytes().rfind(b"\n") + 1
    if whole < path.stat().st_size:
        os.truncate(path, whole)
