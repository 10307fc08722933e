"""What one pipeline run tells MLflow: it speaks into an outbox, which a courier empties."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from infra.delivery import Courier
from infra.mlflow_reach import unavailable
from infra.mlflow_tracking import flat
from infra.outbox import (
    PIPELINE,
    Document,
    Finish,
    Lines,
    OpenPipelineRun,
    OpenStageRun,
    Outbox,
    RunStatus,
    Tags,
)
from infra.redaction import redact
from infra.tracking import MetricsLine, format_line, parse_line

_log = logging.getLogger(__name__)

_POLL_SECONDS = 1.0


class RunTracking:
    """The tracking of one run. Nothing here waits for a server, unless it says so."""

    def __init__(self, outbox: Outbox, uri: str) -> None:
        self.outbox = outbox
        self.uri = uri
        self._courier = Courier(outbox, uri)

    def open(self, experiment: str, name: str, tags: Mapping[str, str]) -> None:
        """Open the pipeline's run, and begin to deliver."""
        own = {**tags, "posttrain.identity": self.outbox.identity()}
        self.outbox.append(
            OpenPipelineRun(experiment=experiment, name=name, tags=own, time=time.time())
        )
        self._courier.start()

    def open_stage(self, stage: str, fingerprint: str, params: Mapping[str, Any]) -> str:
        """Open a stage's nested run; returns its key, which is the fingerprint."""
        texts = {key: redact(str(value)) for key, value in flat(params)}
        self._say(OpenStageRun(run=fingerprint, stage=stage, params=texts, time=time.time()))
        return fingerprint

    def set_tags(self, key: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run, over old ones."""
        self._say(Tags(run=key, tags={name: redact(text) for name, text in tags.items()}))

    def log_metrics(self, key: str, metrics: Mapping[str, float]) -> None:
        """Log final numbers, at step 0; those of a training go through `metrics_of`."""
        line = format_line(MetricsLine(0, dict(metrics), time.time()))
        self._say(Lines(run=key, lines=[line.strip()]))

    def log_file(self, key: str, path: Path) -> None:
        """Keep a small file with a run."""
        self._say(Document(run=key, path=self.outbox.keep(path)))

    def is_unfinished(self, key: str) -> bool:
        """Whether a stage was begun by this run, or an earlier try, and not closed as finished."""
        return self.outbox.is_unfinished(key)

    def finish(self, key: str, status: RunStatus) -> None:
        """Close a run; it can be opened again."""
        self._say(Finish(run=key, status=status, time=time.time()))

    @contextlib.contextmanager
    def metrics_of(self, key: str, path: Path) -> Iterator[None]:
        """Take up a growing metrics file while the block runs, and to its end afterwards."""
        collector = _Collector(self.outbox, key, path, self._courier.wake)
        collector.start()
        try:
            yield
        finally:
            collector.close()

    def run_id(self, key: str = PIPELINE) -> str | None:
        """MLflow's id of a run, or None while the server is away; that is known in seconds."""
        return self._courier.run_id(key)

    def known_run_id(self) -> str | None:
        """MLflow's id of the pipeline's run as far as it is known; waits for nothing."""
        return self._courier.known_run_id(PIPELINE)

    def delivered_run_id(self, patience: float) -> str:
        """MLflow's id of the pipeline's run, once all that was said so far is delivered.

        patience: seconds to wait. Raises `TrackingUnavailable` after them.
        """
        found = self._courier.settled(patience)
        if found is None:
            error = unavailable(self.uri, f"nothing was delivered for {patience:g} s")
            error.waited = patience
            raise error
        return found

    def close(self, patience: float) -> bool:
        """Deliver what is left within so many seconds; False if something waits on disk."""
        return self._courier.close(patience)

    def _say(self, operation: Any) -> None:
        self.outbox.append(operation)
        self._courier.wake()


class _Collector:
    """Carries lines of a metrics file into the outbox, so that they outlive the work folder."""

    def __init__(self, outbox: Outbox, key: str, path: Path, wake: Callable[[], None]) -> None:
        self._outbox = outbox
        self._key = key
        self._path = path
        self._wake = wake
        self._inode = 0
        self._offset = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="metrics collector", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """The stage has ended: take up the rest."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while True:
            stopping = self._stop.wait(_POLL_SECONDS)
            try:
                if self._outbox.append_lines(self._key, self._new_lines()):
                    self._wake()
            except (OSError, ValueError) as error:  # a full disk; training has its own say on it
                self._inode = 0
                _log.warning("metrics of %s were not taken up: %s", self._path, error)
            if stopping:
                return

    def _new_lines(self) -> list[str]:
        """Whole lines since the last call; from the start if the file was written anew."""
        if not self._path.exists():
            return []
        with self._path.open("rb") as file:
            stat = os.fstat(file.fileno())
            if stat.st_ino != self._inode or stat.st_size < self._offset:
                self._inode, self._offset = stat.st_ino, 0
            file.seek(self._offset)
            data = file.read()
        whole = data[: data.rfind(b"\n") + 1]
        self._offset += len(whole)
        lines = whole.decode("utf-8", "replace").splitlines()
        return [line for line in lines if _is_line(line, self._path)]


def _is_line(text: str, path: Path) -> bool:
    try:
        parse_line(text)
    except ValueError as error:
        _log.warning("%s: %s", path, error)
        return False
    return True
