"""SIGTERM means: finish the step, write a checkpoint, leave."""

from __future__ import annotations

import signal
import threading

_requested = threading.Event()

EXIT_CODE = 75
"""EX_TEMPFAIL: the work is not done, and can go on from its checkpoint."""


class Terminated(Exception):
    """The stage left after a checkpoint, because it was asked to."""


def install() -> None:
    """Turn SIGTERM and SIGINT into a request that training loops look at after each step."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: _requested.set())


def requested() -> bool:
    """Whether the stage has been asked to leave."""
    return _requested.is_set()
