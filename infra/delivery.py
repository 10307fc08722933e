"""Delivers an outbox to MLflow: in order, once, now or when the server is back."""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from mlflow.exceptions import MlflowException

from infra.mlflow_reach import pauses, settle
from infra.mlflow_tracking import Tracking
from infra.mlflow_uri import is_local, without_password
from infra.outbox import (
    PIPELINE,
    Delivered,
    Document,
    Finish,
    Lines,
    OpenPipelineRun,
    OpenStageRun,
    Outbox,
    Tags,
)
from infra.tracking import parse_line
from infra.unavailable import TrackingUnavailable

_log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0
_BATCH_LINES = 50
_FIRST_CONTACT_SECONDS = 10.0
"""How long a run waits for its MLflow id from a server that has not said yet that it is away."""
_DATABASE_SECONDS = 120.0
"""As long for a local database, which makes its tables first."""


class _RunLost(Exception):
    """The server does not know a run that it has made: its database is another one now."""


def deliver(
    outbox: Outbox, tracking: Tracking, on_progress: Callable[[Delivered], None] = lambda _: None
) -> int:
    """Send every operation that has not been sent; returns how many went.

    The caller holds `outbox.delivering()`. Raises `TrackingUnavailable` where the server is away;
    what it has been told by then is remembered. An operation that it refuses for good is put aside.
    """
    sent = 0
    lost = False
    while True:
        state = outbox.delivered(tracking.uri)
        try:
            for operations, offset in _batches(outbox.read(state.offset)):
                state = _tell(outbox, tracking, operations, state)
                state = state.model_copy(update={"offset": offset})
                outbox.note(state)
                on_progress(state)
                sent += len(operations)
        except _RunLost as error:
            if lost:
                raise TrackingUnavailable(
                    f"MLflow loses the runs that it makes: {error}"
                ) from error
            lost = True
            _log.warning("MLflow does not know the run any more; telling it everything again")
            outbox.note(Delivered(server=state.server))
            continue
        return sent


class Courier:
    """Delivers an outbox in the background while a run is at work."""

    def __init__(self, outbox: Outbox, uri: str) -> None:
        self.outbox = outbox
        self.uri = uri
        self._tracking = Tracking(uri)
        self._state = outbox.delivered(uri)
        self._away = False
        self._stopping = False
        self._changed = threading.Condition()
        # A daemon: a request that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="courier to MLflow", daemon=True)

    def start(self) -> None:
        """Begin to deliver."""
        self._thread.start()

    def wake(self) -> None:
        """There is something new."""
        with self._changed:
            self._changed.notify_all()

    def run_id(self, key: str) -> str | None:
        """MLflow's id of a run; None where the server is away, which is waited for only briefly."""
        seconds = _DATABASE_SECONDS if is_local(self.uri) else _FIRST_CONTACT_SECONDS
        with self._changed:
            self._changed.notify_all()
            self._changed.wait_for(lambda: key in self._state.runs or self._away, seconds)
            return self._state.runs.get(key)

    def known_run_id(self, key: str) -> str | None:
        """MLflow's id of a run as far as it is known; waits for nothing."""
        return self._state.runs.get(key)

    def settled(self, patience: float) -> str | None:
        """Wait until all that has been said is delivered; the pipeline's run id, or None."""
        size = self.outbox.size()
        deadline = time.monotonic() + patience
        with self._changed:
            while self._state.offset < size:
                left = deadline - time.monotonic()
                if left <= 0:
                    return None
                self._changed.notify_all()  # now, and not when the pause between tries is over
                self._changed.wait(min(left, 2.0))
            return self._state.runs.get(PIPELINE)

    def close(self, patience: float) -> bool:
        """Deliver what is left; False if the server did not take it in time, and it waits."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(patience)
        return not self._thread.is_alive() and self._state.offset >= self.outbox.size()

    def _run(self) -> None:
        while True:
            with self.outbox.delivering() as free:
                if free:
                    self._deliver()
                    return
            if self._paused(_POLL_SECONDS):  # another process delivers this outbox
                return

    def _deliver(self) -> None:
        tries = pauses()
        while True:
            stopping = self._stopping
            try:
                deliver(self.outbox, self._tracking, self._progress)
            except Exception as error:  # whatever it is, training goes on
                if not self._away:
                    _log.warning("%s; the run goes on, and what it has to say waits", error)
                self._note_away(True)
                pause = next(tries)
            else:
                self._note_away(False)
                tries = pauses()
                pause = _POLL_SECONDS
            if stopping:
                return
            self._paused(pause)

    def _progress(self, state: Delivered) -> None:
        with self._changed:
            self._state = state
            self._away = False
            self._changed.notify_all()

    def _note_away(self, away: bool) -> None:
        with self._changed:
            self._away = away
            self._changed.notify_all()

    def _paused(self, seconds: float) -> bool:
        """Sleep until the time is over or there is something new; whether it is to stop."""
        with self._changed:
            if not self._stopping:
                self._changed.wait(seconds)
            return self._stopping


def _batches(operations: Iterator[tuple[Any, int]]) -> Iterator[tuple[list[Any], int]]:
    """Lines of one run together, as far as a request holds; everything else one by one."""
    groups = itertools.groupby(
        operations, key=lambda item: item[0].run if isinstance(item[0], Lines) else None
    )
    for run, items in groups:
        batch: list[Any] = []
        for operation, offset in items:
            batch.append(operation)
            if run is None or sum(len(one.lines) for one in batch) >= _BATCH_LINES:
                yield batch, offset
                batch = []
        if batch:
            yield batch, offset


def _tell(outbox: Outbox, tracking: Tracking, operations: list[Any], state: Delivered) -> Delivered:
    try:
        return _send(outbox, tracking, operations, state)
    except (TrackingUnavailable, _RunLost):
        raise
    except Exception as error:
        if isinstance(error, MlflowException) and error.error_code == "RESOURCE_DOES_NOT_EXIST":
            raise _RunLost(str(error)) from error
        place = f"{without_password(tracking.uri)} (kept in {outbox.rejected})"
        _log.warning("MLflow at %s refused a part of the run: %s", place, error)
        for operation in operations:
            outbox.reject(operation, f"{type(error).__name__}: {error}")
        return outbox.delivered(tracking.uri)


def _send(outbox: Outbox, tracking: Tracking, operations: list[Any], state: Delivered) -> Delivered:
    first = operations[0]
    match first:
        case OpenPipelineRun() | OpenStageRun():
            return _open(outbox, tracking, first, state)
        case Lines():
            lines = [parse_line(line) for one in operations for line in one.lines]
            tracking.log_lines(_id(state, first.run), lines)
        case Tags():
            tracking.set_tags(_id(state, first.run), first.tags)
        case Document():
            path = outbox.folder / first.path
            if not path.is_file():
                raise ValueError(f"{path} is gone")
            tracking.log_file(_id(state, first.run), path)
        case Finish():
            run_id = _id(state, first.run)
            if first.run in state.doubtful:
                tracking.drop_doubles(run_id)
            tracking.finish_run(run_id, first.status, first.time)
    return state


def _open(
    outbox: Outbox, tracking: Tracking, operation: OpenPipelineRun | OpenStageRun, state: Delivered
) -> Delivered:
    """Open a run under the protection of a note: whoever finds the note looks before he asks."""
    key = operation.run
    if state.creating is not None:
        settle()
        state = state.model_copy(update={"doubtful": (*state.doubtful, state.creating)})
    known = state.runs.get(key)
    if known is None:
        outbox.note(state.model_copy(update={"creating": key}))
    if isinstance(operation, OpenPipelineRun):
        run_id = tracking.open_pipeline_run(
            operation.experiment, operation.name, operation.tags, operation.time
        )
    else:
        run_id = tracking.open_stage_run(
            _id(state, PIPELINE), operation.stage, key, operation.params, operation.time
        )
    if known not in (None, run_id):
        raise _RunLost(known)
    return state.model_copy(update={"creating": None, "runs": {**state.runs, key: run_id}})


def _id(state: Delivered, key: str) -> str:
    if key not in state.runs:
        raise ValueError(f"MLflow has no run for {key}: its opening was refused")
    return state.runs[key]
