"""How a run tells whoever watches it what is going on."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Protocol

from flows.runs import StageRow


class Listener(Protocol):
    """Watches a run. Lines come in another thread."""

    def started(self, name: str) -> None:
        """A stage begins, or begins again."""
        ...

    def line(self, name: str, text: str) -> None:
        """A stage printed a line."""
        ...

    def done(self, row: StageRow) -> None:
        """A stage has ended well."""
        ...

    def note(self, text: str) -> None:
        """Something happened that a person should know of."""
        ...


class Silent:
    """Nobody watches."""

    def started(self, name: str) -> None:
        """Say nothing."""

    def line(self, name: str, text: str) -> None:
        """Say nothing."""

    def done(self, row: StageRow) -> None:
        """Say nothing."""

    def note(self, text: str) -> None:
        """Say nothing."""


_current: ContextVar[Listener] = ContextVar("listener", default=Silent())  # noqa: B039 - stateless


def listener() -> Listener:
    """Whoever watches the runs of this context."""
    return _current.get()


@contextlib.contextmanager
def watched_by(watcher: Listener) -> Iterator[None]:
    """Runs inside the block tell `watcher` what goes on."""
    token = _current.set(watcher)
    try:
        yield
    finally:
        _current.reset(token)
