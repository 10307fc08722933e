"""Experiment tracking in MLflow: one run per pipeline run, one nested run per stage."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from pydantic import Field

from infra.files import write_atomic
from infra.mlflow_uri import artifact_location, open_client
from infra.tracking import parse_line
from schemas.base import Frozen

_log = logging.getLogger(__name__)

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

_RUN_TAG = "posttrain.run"
_STAGE_TAG = "posttrain.stage"
_FINGERPRINT_TAG = "posttrain.fingerprint"
_PARENT_TAG = "mlflow.parentRunId"
_MAX_PARAMS = 100
_MAX_METRICS = 1000
_MAX_VALUE_LENGTH = 6000
_POLL_SECONDS = 1.0
_MAX_BACKOFF_SECONDS = 30.0
_BAD_NAME = re.compile(r"[^\w./: -]", re.ASCII)


class TrackingUnavailable(ConnectionError):
    """The tracking server does not answer."""


class Tracking:
    """The tracking server or database at one address."""

    def __init__(self, uri: str) -> None:
        self.uri = uri
        self.client = open_client(uri)

    def open_pipeline_run(self, experiment: str, run_name: str, tags: Mapping[str, str]) -> str:
        """Open the run whose tag `posttrain.run` is in `tags`, or make it; returns its id."""
        experiment_id = self._reached(lambda: self._experiment(experiment))
        wanted = {_RUN_TAG: tags[_RUN_TAG]}
        return self._open(experiment_id, run_name, wanted, tags)

    def open_stage_run(
        self, parent_run_id: str, stage: str, fingerprint: str, params: Mapping[str, Any]
    ) -> str:
        """Open a stage's nested run, or make it; a retry finds the run of the first try."""
        experiment_id = self._reached(lambda: self.client.get_run(parent_run_id).info.experiment_id)
        wanted = {_PARENT_TAG: parent_run_id, _FINGERPRINT_TAG: fingerprint}
        run_id = self._open(experiment_id, stage, wanted, {**wanted, _STAGE_TAG: stage})
        self.log_params(run_id, params)
        return run_id

    def finish_run(self, run_id: str, status: RunStatus) -> None:
        """Close a run; it can be opened again."""
        self.client.set_terminated(run_id, status)

    def is_unfinished(self, run_id: str, parent_run_id: str) -> bool:
        """Whether this is a nested run of that parent, and was never closed as finished."""
        try:
            run = self.client.get_run(run_id)
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return False
        ours = run.data.tags.get(_PARENT_TAG) == parent_run_id
        return bool(ours and run.info.status != "FINISHED")

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters, nested ones with dots. MLflow lets none be changed: the first stays."""
        known = self.client.get_run(run_id).data.params
        new = [
            Param(metric_name(key), str(value)[:_MAX_VALUE_LENGTH])
            for key, value in _flat(params)
            if metric_name(key) not in known
        ]
        for start in range(0, len(new), _MAX_PARAMS):
            self.client.log_batch(run_id, params=new[start : start + _MAX_PARAMS])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, over old ones."""
        self.client.log_batch(run_id, tags=[RunTag(key, value) for key, value in tags.items()])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log numbers at once; for the few that do not come out of a metrics file."""
        now = time.time()
        values = [_metric(key, value, now, step) for key, value in metrics.items()]
        self.log_metric_values(run_id, values)

    def log_file(self, run_id: str, path: Path) -> None:
        """Keep a small file with a run; an earlier one of the same name is replaced."""
        self.client.log_artifact(run_id, str(path))

    def log_metric_values(self, run_id: str, values: list[Metric]) -> None:
        """Log metric values that carry their own steps and times."""
        for start in range(0, len(values), _MAX_METRICS):
            self.client.log_batch(run_id, metrics=values[start : start + _MAX_METRICS])

    def _experiment(self, name: str) -> str:
        experiment = self.client.get_experiment_by_name(name)
        if experiment is not None:
            return str(experiment.experiment_id)
        try:
            return str(self.client.create_experiment(name, artifact_location(self.uri)))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            return str(self.client.get_experiment_by_name(name).experiment_id)

    def _open(
        self, experiment_id: str, name: str, wanted: Mapping[str, str], tags: Mapping[str, str]
    ) -> str:
        rule = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
        found = self.client.search_runs([experiment_id], rule, max_results=1)
        if not found:
            run = self.client.create_run(experiment_id, tags=dict(tags), run_name=name)
            return str(run.info.run_id)
        run_id = str(found[0].info.run_id)
        self.client.update_run(run_id, status="RUNNING")
        self.set_tags(run_id, tags)
        return run_id

    def _reached(self, ask: Callable[[], str]) -> str:
        """The first question of a run: says clearly that nobody is there."""
        try:
            return ask()
        except Exception as error:
            if isinstance(error, MlflowException) and error.error_code != "INTERNAL_ERROR":
                raise
            raise TrackingUnavailable(
                f"MLflow at {self.uri} does not answer ({error}); start it, or set "
                "MLFLOW_TRACKING_URI to another address (unset: a database in the home)"
            ) from error


def metric_name(key: str) -> str:
    """A name that MLflow accepts: `pass@1` becomes `pass_at_1`."""
    return _BAD_NAME.sub("_", key.replace("@", "_at_"))


def _metric(key: str, value: float, seconds: float, step: int) -> Metric:
    return Metric(key=metric_name(key), value=value, timestamp=int(seconds * 1000), step=step)


class _Cursor(Frozen):
    """How far a metrics file has been shipped."""

    offset: int = 0
    """Bytes that were read."""
    last_line: str = ""
    """The line that ends at `offset`; if it is not there any more, the file was rewritten."""
    steps: dict[str, int] = Field(default_factory=dict)
    """Last shipped step of each metric."""


def ship_pending(tracking: Tracking, run_id: str, metrics_path: Path, cursor_path: Path) -> int:
    """Send every metric that has not been sent, in order; returns how many values went.

    Raises when the server is away; what had been sent by then is remembered. A step of a metric
    goes once: a resumed stage that writes it again after a rewind is not shipped twice.
    """
    cursor = _read_cursor(cursor_path)
    sent = 0
    for lines, offset in _batches(metrics_path, _start_offset(metrics_path, cursor)):
        steps = dict(cursor.steps)
        values = _new_values(lines, steps)
        tracking.log_metric_values(run_id, values)
        sent += len(values)
        cursor = _Cursor(offset=offset, last_line=lines[-1].decode(), steps=steps)
        write_atomic(cursor_path, cursor.model_dump_json())
    return sent


class MetricsShipper:
    """Ships a growing metrics file in the background; what the server misses waits on disk."""

    def __init__(
        self, tracking: Tracking, run_id: str, metrics_path: Path, cursor_path: Path
    ) -> None:
        self._ship: Callable[[], int] = partial(
            ship_pending, tracking, run_id, metrics_path, cursor_path
        )
        self._place = f"{tracking.uri} (metrics wait in {metrics_path})"
        self._stop = threading.Event()
        self._drained = False
        # A daemon: a request that hangs must not keep the program from ending.
        self._thread = threading.Thread(target=self._run, name="metrics shipper", daemon=True)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def start(self) -> None:
        """Begin to ship."""
        self._thread.start()

    def close(self, drain_timeout: float = 10.0) -> bool:
        """Send what is left; False if the server did not take it in time, and it waits on disk."""
        self._stop.set()
        self._thread.join(drain_timeout)
        if not self._drained:
            _log.warning("MLflow has not taken all metrics: %s", self._place)
        return self._drained

    def _run(self) -> None:
        pause = _POLL_SECONDS
        while True:
            stopping = self._stop.wait(pause)
            try:
                self._ship()
            except Exception as error:  # whatever it is, training goes on
                if pause == _POLL_SECONDS:
                    _log.warning("MLflow does not answer: %s: %s", self._place, error)
                pause = min(2 * pause, _MAX_BACKOFF_SECONDS)
                if stopping:
                    return
            else:
                pause = _POLL_SECONDS
                if stopping:
                    self._drained = True
                    return


def _flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _read_cursor(path: Path) -> _Cursor:
    return _Cursor.model_validate_json(path.read_bytes()) if path.exists() else _Cursor()


def _start_offset(path: Path, cursor: _Cursor) -> int:
    """Where to go on: the cursor's offset if the file still is the one that was read, else 0."""
    last = cursor.last_line.encode()
    start = cursor.offset - len(last)
    if not path.exists():
        return 0
    with path.open("rb") as file:
        file.seek(start)
        return cursor.offset if file.read(len(last)) == last else 0


def _batches(path: Path, offset: int) -> Iterator[tuple[list[bytes], int]]:
    """Whole lines from an offset on, in batches, each with the offset after it."""
    if not path.exists():
        return
    with path.open("rb") as file:
        file.seek(offset)
        batch: list[bytes] = []
        for line in file:
            if not line.endswith(b"\n"):
                break
            batch.append(line)
            offset += len(line)
            if len(batch) >= 50:
                yield batch, offset
                batch = []
    if batch:
        yield batch, offset


def _new_values(lines: list[bytes], steps: dict[str, int]) -> list[Metric]:
    """The values of later steps than `steps` tells of; brings `steps` up to date."""
    values: list[Metric] = []
    for line in map(parse_line, lines):
        for key, value in line.metrics.items():
            if line.step > steps.get(key, -1):
                steps[key] = line.step
                values.append(_metric(key, value, line.time, line.step))
    return values
