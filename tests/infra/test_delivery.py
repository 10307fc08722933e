"""From the outbox to MLflow, over a connection that is cut at each place in turn."""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from infra import delivery
from infra.delivery import deliver
from infra.environment import Home
from infra.mlflow_tracking import Tracking
from infra.outbox import PIPELINE, OpenPipelineRun, Outbox, Tags
from infra.run_tracking import RunTracking
from infra.tracking import FileTracker
from infra.unavailable import TrackingUnavailable

pytestmark = pytest.mark.slow

_names = (f"run-{number}" for number in itertools.count())


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delivery, "_POLL_SECONDS", 0.02)
    monkeypatch.setattr(delivery, "_FIRST_CONTACT_SECONDS", 0.2)
    monkeypatch.setattr("infra.run_tracking._POLL_SECONDS", 0.02)
    monkeypatch.setattr("infra.mlflow_reach._FIRST_PAUSE_SECONDS", 0.02)
    monkeypatch.setattr("infra.mlflow_reach._LAST_PAUSE_SECONDS", 0.05)
    monkeypatch.setattr("infra.mlflow_reach._SETTLE_SECONDS", 0.0)


class Wire:
    """Counts the calls to MLflow, and cuts the connection before or after one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[str] = []
        self.cut: Callable[[int, str], str | None] = lambda number, name: None
        from infra.mlflow_reach import ReachingClient

        real = ReachingClient._sent

        def sent(client: Any, name: str, /, *arguments: Any, **options: Any) -> Any:
            self.calls.append(name)
            when = self.cut(len(self.calls) - 1, name)
            if when == "before":
                raise MlflowException("connection refused")
            result = real(client, name, *arguments, **options)
            if when == "after":  # done, but the answer is lost
                raise MlflowException("read timed out")
            return result

        monkeypatch.setattr(ReachingClient, "_sent", sent)


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


class Run:
    """A run that says everything that a run says, and what has come of it in MLflow."""

    def __init__(self, home: Home, folder: Path) -> None:
        self.name = next(_names)
        self.outbox = Outbox(folder / self.name)
        self.uri = home.mlflow_uri
        self.tracking = Tracking(home.mlflow_uri)
        self.document = folder / "report.json"
        self.document.write_text('{"read": 1}')

    def say(self, steps: range) -> None:
        run = RunTracking(self.outbox, self.uri)
        own = {"posttrain.run": self.name, "posttrain.identity": self.outbox.identity()}
        self.outbox.append(
            OpenPipelineRun(experiment="outbox", name=self.name, tags=own, time=100.0)
        )
        key = run.open_stage("train_sft", "f" * 64, {"optimizer": {"lr": 0.1}})
        self.outbox.append_lines(key, [self.line(step) for step in steps])
        run.log_metrics(key, {"accuracy": 0.75})
        run.set_tags(key, {"posttrain.sha256": "abc"})
        run.log_file(key, self.document)
        run.finish(key, "FINISHED")
        run.set_tags(PIPELINE, {"posttrain.outcome": "promoted"})
        run.finish(PIPELINE, "FINISHED")

    @staticmethod
    def line(step: int) -> str:
        return f'{{"step": {step}, "metrics": {{"loss": {step}.5}}, "time": {1000 + step}.0}}'

    def deliver(self) -> int:
        with self.outbox.delivering() as free:
            assert free
            return deliver(self.outbox, self.tracking)

    def found(self) -> dict[str, Any]:
        """All that MLflow knows of it."""
        client = Tracking(self.uri).client
        experiment = client.get_experiment_by_name("outbox")
        rule = f"tags.`posttrain.run` = '{self.name}'"
        parents = client.search_runs([experiment.experiment_id], rule)
        (parent,) = parents
        rule = f"tags.`mlflow.parentRunId` = '{parent.info.run_id}'"
        (stage,) = client.search_runs([experiment.experiment_id], rule)
        history = client.get_metric_history(stage.info.run_id, "loss")
        return {
            "status": (parent.info.status, stage.info.status),
            "started": parent.info.start_time,
            "outcome": parent.data.tags["posttrain.outcome"],
            "params": stage.data.params,
            "sha256": stage.data.tags["posttrain.sha256"],
            "loss": [(one.step, one.value, one.timestamp) for one in history],
            "accuracy": stage.data.metrics["accuracy"],
            "files": [file.path for file in client.list_artifacts(stage.info.run_id)],
        }


EXPECTED = {
    "status": ("FINISHED", "FINISHED"),
    "started": 100_000,
    "outcome": "promoted",
    "params": {"optimizer.lr": "0.1"},
    "sha256": "abc",
    "loss": [(step, step + 0.5, 1_001_000 + 1000 * (step - 1)) for step in range(1, 8)],
    "accuracy": 0.75,
    "files": ["report.json"],
}


@pytest.fixture
def run(home: Home, tmp_path: Path) -> Run:
    return Run(home, tmp_path)


def test_everything_arrives(run: Run) -> None:
    run.say(range(1, 8))
    assert run.deliver() == 9
    assert run.found() == EXPECTED
    assert run.deliver() == 0


def test_a_connection_that_is_cut_anywhere_doubles_and_loses_nothing(
    home: Home, tmp_path: Path, wire: Wire
) -> None:
    whole = Run(home, tmp_path)
    whole.say(range(1, 8))
    whole.deliver()
    calls = list(wire.calls)
    assert {"create_run", "log_batch", "log_text", "set_terminated"} <= set(calls)
    for number, when in itertools.product(range(len(calls)), ("before", "after")):
        run = Run(home, tmp_path)
        run.say(range(1, 8))
        wire.calls.clear()
        wire.cut = lambda at, name, cut=number, how=when: how if at == cut else None  # type: ignore[misc]
        with pytest.raises(TrackingUnavailable):
            run.deliver()
        wire.cut = lambda at, name: None
        run.deliver()
        assert run.found() == EXPECTED, (number, calls[number], when)


def test_a_database_that_was_made_anew_is_told_everything(run: Run, wire: Wire) -> None:
    run.say(range(1, 8))
    run.deliver()
    client = run.tracking.client
    for run_id in run.outbox.delivered(run.uri).runs.values():
        client.delete_run(run_id)
    run.say(range(1, 8))  # the run is opened again
    run.deliver()
    assert run.found() == EXPECTED


def test_what_the_server_refuses_is_put_aside(
    run: Run, caplog: pytest.LogCaptureFixture, wire: Wire
) -> None:
    run.say(range(1, 3))
    run.outbox.append(Tags(run=PIPELINE, tags={"bad\nname": "x"}), Tags(run="nobody", tags={}))
    run.outbox.append(Tags(run=PIPELINE, tags={"posttrain.outcome": "refused"}))
    with caplog.at_level(logging.WARNING):
        run.deliver()
    assert run.found()["outcome"] == "refused"
    rejected = run.outbox.rejected.read_text()
    assert "bad\\nname" in rejected
    assert "MLflow has no run for nobody" in rejected
    assert caplog.text.count("refused a part of the run") == 2


class Outage:
    """A connection that is down until it is mended."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        wire.cut = lambda number, name: "before"

    def mend(self) -> None:
        self.wire.cut = lambda number, name: None


def wait_for(what: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 20
    while not (found := what()):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return found


@pytest.fixture
def tracked(run: Run) -> Iterator[RunTracking]:
    tracked = RunTracking(run.outbox, run.uri)
    yield tracked
    tracked.close(5.0)


def test_a_run_trains_on_without_the_server_and_tells_it_later(
    run: Run, tracked: RunTracking, tmp_path: Path, wire: Wire, caplog: pytest.LogCaptureFixture
) -> None:
    outage = Outage(wire)
    metrics = FileTracker(tmp_path / "metrics.jsonl")
    with caplog.at_level(logging.WARNING):
        tracked.open("outbox", run.name, {"posttrain.run": run.name})
        key = tracked.open_stage("train_sft", "f" * 64, {"lr": 1})
        assert tracked.run_id(key) is None
        with tracked.metrics_of(key, metrics.path):
            metrics.log_metrics({"loss": 1.0}, 1)
            metrics.log_metrics({"loss": 2.0}, 2)
            time.sleep(0.2)
            metrics.rewind(1)  # a resume from step 1
            metrics.log_metrics({"loss": 2.0}, 2)
            outage.mend()
            metrics.log_metrics({"loss": 3.0}, 3)
        tracked.finish(key, "FINISHED")
        assert tracked.delivered_run_id(20.0) == tracked.run_id()
    assert tracked.close(5.0)
    stage_run = run.outbox.delivered(run.uri).runs[key]
    history = run.tracking.client.get_metric_history(stage_run, "loss")
    assert [(one.step, one.value) for one in history] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert caplog.text.count("the run goes on") == 1  # one line for one outage


def test_the_last_metrics_are_taken_up_when_the_stage_ends(
    run: Run, tracked: RunTracking, tmp_path: Path, wire: Wire
) -> None:
    Outage(wire)
    tracked.open("outbox", run.name, {"posttrain.run": run.name})
    metrics = FileTracker(tmp_path / "metrics.jsonl")
    with tracked.metrics_of("f", metrics.path):
        for step in range(200):
            metrics.log_metrics({"loss": 1.0}, step)
    lines = sum(len(getattr(one, "lines", ())) for one, _ in run.outbox.read(0))
    assert lines == 200
    metrics.path.unlink()  # the work folder may go


def test_waiting_for_the_server_is_bounded_and_named(
    run: Run, tracked: RunTracking, wire: Wire
) -> None:
    Outage(wire)
    tracked.open("outbox", run.name, {"posttrain.run": run.name})
    with pytest.raises(TrackingUnavailable, match="MLFLOW_TRACKING_URI") as caught:
        tracked.delivered_run_id(0.3)
    assert caught.value.waited == 0.3
    assert not tracked.close(0.5)
    assert run.outbox.waiting(run.uri) == 1


def test_another_process_that_delivers_is_waited_for(
    run: Run, tracked: RunTracking, wire: Wire
) -> None:
    run.outbox.append(Tags(run=PIPELINE, tags={}))
    with run.outbox.delivering() as free:
        assert free
        tracked.open("outbox", run.name, {"posttrain.run": run.name})
        time.sleep(0.1)
        assert wire.calls == []
    wait_for(lambda: run.outbox.waiting(run.uri) == 0)
