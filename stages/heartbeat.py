"""Where a stage says that it has moved on, so that a slow one is told from one that hangs."""

from __future__ import annotations

import faulthandler
import signal
import sys
from pathlib import Path

from infra.heartbeat import HeartbeatWriter

_writer: HeartbeatWriter | None = None


def install(work_dir: Path) -> None:
    """Begin to leave signs of life, and write every thread's stack to stderr on SIGUSR1.

    The stacks are written by the signal handler itself, in C: also while the interpreter is stuck.
    """
    global _writer
    faulthandler.register(signal.SIGUSR1, file=sys.stderr, all_threads=True)
    _writer = HeartbeatWriter(work_dir)
    beat("starting")


def beat(doing: str) -> None:
    """Say what is begun now. Does nothing outside a stage's process."""
    if _writer is not None:
        _writer.beat(doing)
