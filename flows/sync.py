"""Delivers what earlier runs could not tell MLflow."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from flows.runs import RunRecord, Runs, outbox_of
from infra.environment import Home
from infra.outbox import PIPELINE, Outbox

_log = logging.getLogger(__name__)

_JOIN_SECONDS = 10.0


@dataclass(frozen=True)
class Synced:
    """What became of one run's waiting operations."""

    run: str
    sent: int
    """Operations that MLflow has now been told."""
    at_work: bool = False
    """Whether the run is being delivered by another process, its own."""


def waiting(home: Home) -> list[RunRecord]:
    """Runs that have something to say that MLflow has not been told, the oldest first."""
    runs = Runs(home.store.root)
    return [
        record
        for record in reversed(runs.all())
        if outbox_of(runs.root / record.run).waiting(home.mlflow_uri)
    ]


def sync(home: Home, records: list[RunRecord]) -> Iterator[Synced]:
    """Deliver the runs' outboxes in order; raises `TrackingUnavailable` where nobody answers."""
    from infra.delivery import deliver
    from infra.mlflow_tracking import Tracking

    runs = Runs(home.store.root)
    tracking = Tracking(home.mlflow_uri)
    for record in records:
        outbox = outbox_of(runs.root / record.run)
        with outbox.delivering() as free:
            if not free:
                yield Synced(record.run, 0, at_work=True)
                continue
            sent = deliver(outbox, tracking)
            _note(runs, record, outbox, home.mlflow_uri)
        yield Synced(record.run, sent)


@contextlib.contextmanager
def syncing(home: Home, on_synced: Callable[[Synced], None]) -> Iterator[None]:
    """Deliver what waits in the background while the block runs; it is in nobody's way."""
    records = waiting(home)
    if not records:
        yield
        return

    def work() -> None:
        try:
            for one in sync(home, records):
                if one.sent:
                    on_synced(one)
        except Exception as error:  # it waits on
            _log.info("%s", error)

    # A daemon: a request that hangs must not keep the program from ending.
    thread = threading.Thread(target=work, name="sync with MLflow", daemon=True)
    thread.start()
    yield
    thread.join(_JOIN_SECONDS)


def _note(runs: Runs, record: RunRecord, outbox: Outbox, uri: str) -> None:
    """Write the MLflow run into a finished run's record, and let go of what nobody needs any more.

    A run that is not finished is opened again, and does so itself: its lock is left alone.
    """
    if record.status == "finished":
        runs.note_mlflow_run(record.run, outbox.delivered(uri).runs.get(PIPELINE))
        outbox.forget()
