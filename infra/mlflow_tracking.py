"""Experiment tracking in MLflow: one run per pipeline run, one nested run per stage."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException

from infra.mlflow_reach import reaching_client
from infra.mlflow_uri import artifact_location
from infra.outbox import RunStatus
from infra.redaction import redact
from infra.tracking import MetricsLine

_RUN_TAG = "posttrain.run"
_IDENTITY_TAG = "posttrain.identity"
_STAGE_TAG = "posttrain.stage"
_FINGERPRINT_TAG = "posttrain.fingerprint"
_PARENT_TAG = "mlflow.parentRunId"
_MAX_PARAMS = 100
_MAX_METRICS = 1000
_MAX_VALUE_LENGTH = 6000
_BAD_NAME = re.compile(r"[^\w./: -]", re.ASCII)


class Tracking:
    """The tracking server or database at one address.

    Every method asks at once, raises `TrackingUnavailable` where nobody answers, and changes
    nothing when it is called again; runs at work go through an outbox and do not wait for it.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri

    @functools.cached_property
    def client(self) -> MlflowClient:
        """MLflow's client, which asks first whether somebody is there."""
        return reaching_client(self.uri, 0.0, lambda text: None)

    def open_pipeline_run(
        self, experiment: str, run_name: str, tags: Mapping[str, str], started: float | None = None
    ) -> str:
        """Open the run whose identity is in `tags`, or make it; returns its id.

        started: seconds since 1970; the default is now.
        """
        experiment_id = self._experiment(experiment)
        wanted = {key: tags[key] for key in (_RUN_TAG, _IDENTITY_TAG) if key in tags}
        return self._open(experiment_id, run_name, wanted, tags, started)

    def open_stage_run(
        self,
        parent_run_id: str,
        stage: str,
        fingerprint: str,
        params: Mapping[str, Any],
        started: float | None = None,
    ) -> str:
        """Open a stage's nested run, or make it; a retry finds the run of the first try."""
        experiment_id = self.client.get_run(parent_run_id).info.experiment_id
        wanted = {_PARENT_TAG: parent_run_id, _FINGERPRINT_TAG: fingerprint}
        run_id = self._open(experiment_id, stage, wanted, {**wanted, _STAGE_TAG: stage}, started)
        self.log_params(run_id, params)
        return run_id

    def finish_run(self, run_id: str, status: RunStatus, ended: float | None = None) -> None:
        """Close a run; it can be opened again."""
        self.client.set_terminated(run_id, status, _milliseconds(ended))

    def drop_doubles(self, run_id: str) -> int:
        """Delete the other runs that a server has made of one request; returns how many.

        They can only come from a request that was sent again after it had seemed to be lost.
        """
        run = self.client.get_run(run_id)
        keys = (_PARENT_TAG, _FINGERPRINT_TAG, _RUN_TAG, _IDENTITY_TAG)
        wanted = {key: run.data.tags[key] for key in keys if key in run.data.tags}
        doubles = [
            other.info.run_id
            for other in self._find(run.info.experiment_id, wanted)
            if other.info.run_id != run_id and not other.data.metrics
        ]
        for double in doubles:
            self.client.delete_run(double)
        return len(doubles)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log parameters, nested ones with dots. MLflow lets none be changed: the first stays."""
        known = self.client.get_run(run_id).data.params
        new = [
            Param(metric_name(key), redact(str(value))[:_MAX_VALUE_LENGTH])
            for key, value in flat(params)
            if metric_name(key) not in known
        ]
        for start in range(0, len(new), _MAX_PARAMS):
            self.client.log_batch(run_id, params=new[start : start + _MAX_PARAMS])

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags, over old ones."""
        shown = [RunTag(key, redact(value)) for key, value in tags.items()]
        self.client.log_batch(run_id, tags=shown)

    def log_file(self, run_id: str, path: Path) -> None:
        """Keep a small text file with a run; an earlier one of the same name is replaced."""
        self.client.log_text(run_id, redact(path.read_text(encoding="utf-8")), path.name)

    def log_lines(self, run_id: str, lines: list[MetricsLine]) -> None:
        """Log lines of metrics. MLflow takes the same value of the same step and time once."""
        values = [
            _metric(key, value, line.time, line.step)
            for line in lines
            for key, value in line.metrics.items()
        ]
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
        self,
        experiment_id: str,
        name: str,
        wanted: Mapping[str, str],
        tags: Mapping[str, str],
        started: float | None,
    ) -> str:
        found = self._find(experiment_id, wanted)
        if not found:
            shown = {key: redact(value) for key, value in tags.items()}
            run = self.client.create_run(
                experiment_id, _milliseconds(started), tags=shown, run_name=name
            )
            return str(run.info.run_id)
        run_id = str(found[0].info.run_id)
        self.client.update_run(run_id, status="RUNNING")
        self.set_tags(run_id, tags)
        return run_id

    def _find(self, experiment_id: str, wanted: Mapping[str, str]) -> list[Any]:
        """Runs with these tags, the oldest first."""
        rule = " and ".join(f"tags.`{key}` = '{value}'" for key, value in wanted.items())
        return list(
            self.client.search_runs([experiment_id], rule, order_by=["attributes.start_time ASC"])
        )


def metric_name(key: str) -> str:
    """A name that MLflow accepts: `pass@1` becomes `pass_at_1`."""
    return _BAD_NAME.sub("_", key.replace("@", "_at_"))


def flat(params: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Nested parameters with dots between the names."""
    for key, value in params.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _metric(key: str, value: float, seconds: float, step: int) -> Metric:
    return Metric(key=metric_name(key), value=value, timestamp=int(seconds * 1000), step=step)


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)
