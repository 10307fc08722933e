"""A sign of life of a stage's process: how often it has moved on, and what it is at."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import NamedTuple

FILE = "heartbeat.json"
"""Name in the work folder of a stage."""

_SIZE = 2048
"""Bytes of the record. It is written in place by one call: cheap enough for every micro-batch."""
_MAX_CHARACTERS = 300
"""Of what is being done; escaped, they fit into the record."""


class Beat(NamedTuple):
    """One sign of life."""

    number: int
    """Grows by one with every piece of work that is begun."""
    doing: str
    """What is being done since then."""


class HeartbeatWriter:
    """Keeps the record of one process up to date."""

    def __init__(self, work_dir: Path) -> None:
        self._descriptor = os.open(work_dir / FILE, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o644)
        self._number = 0

    def beat(self, doing: str) -> None:
        """Say that something new is begun. Losing a sign of life must not end the work."""
        self._number += 1
        text = json.dumps({"number": self._number, "doing": doing[:_MAX_CHARACTERS]})
        with contextlib.suppress(OSError):
            os.pwrite(self._descriptor, text.encode().ljust(_SIZE), 0)


def read_beat(work_dir: Path) -> Beat | None:
    """The newest sign of life; None where there is none yet, or only a part of one."""
    try:
        record = json.loads((work_dir / FILE).read_bytes())
        return Beat(int(record["number"]), str(record["doing"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
