"""Follows a growing log file."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)
_POLL_SECONDS = 0.1


@contextmanager
def follow(path: Path, on_line: Callable[[str], None]) -> Iterator[None]:
    """Hand every line that is written inside the block to `on_line`, in a thread of its own."""
    start = path.stat().st_size if path.exists() else 0
    stop = threading.Event()
    thread = threading.Thread(
        target=_follow, args=(path, start, on_line, stop), name=f"follow {path.name}", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def last_lines(path: Path, count: int) -> list[str]:
    """The last lines of a log, for an error message."""
    if not path.exists():
        return []
    size = path.stat().st_size
    with path.open("rb") as file:
        file.seek(max(0, size - 8192))
        return file.read().decode("utf-8", "replace").splitlines()[-count:]


def _follow(path: Path, offset: int, on_line: Callable[[str], None], stop: threading.Event) -> None:
    rest = b""
    while True:
        stopping = stop.wait(_POLL_SECONDS)
        chunk = _read_from(path, offset)
        offset += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        if stopping and rest:
            lines.append(rest)
        for line in lines:
            _hand_over(line.decode("utf-8", "replace").rstrip("\r"), on_line)
        if stopping:
            return


def _read_from(path: Path, offset: int) -> bytes:
    if not path.exists():
        return b""
    with path.open("rb") as file:
        file.seek(offset)
        return file.read()


def _hand_over(line: str, on_line: Callable[[str], None]) -> None:
    try:
        on_line(line)
    except Exception:  # a broken listener must not end the following, nor the stage
        _log.exception("could not hand on a line of the stage")
