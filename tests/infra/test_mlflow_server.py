"""The same promises against a real server over HTTP, which dies or hangs in the middle."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from infra import mlflow_reach
from infra.delivery import deliver
from infra.mlflow_tracking import Tracking
from infra.outbox import OpenPipelineRun, Outbox
from infra.registry import Registry
from infra.run_tracking import RunTracking
from infra.store import Store
from infra.tracking import FileTracker
from infra.unavailable import TrackingUnavailable
from schemas.artifacts import PolicyCheckpoint
from tests.artifacts import CONTRACT, NOBODY
from tests.servers import MlflowServer, wait_for

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(mlflow_reach, "_PING_SECONDS", 1.0)
    monkeypatch.setattr(mlflow_reach, "_LAST_PAUSE_SECONDS", 1.0)


def restarted(server: MlflowServer) -> Callable[[], None]:
    server.kill()
    return server.start


def resumed(server: MlflowServer) -> Callable[[], None]:
    server.process.suspend()
    return server.process.resume


@pytest.mark.parametrize("outage", [restarted, resumed])
def test_metrics_survive_the_death_of_the_server(
    mlflow_server: MlflowServer,
    tmp_path: Path,
    outage: Callable[[MlflowServer], Callable[[], None]],
) -> None:
    name = outage.__name__
    run = RunTracking(Outbox(tmp_path / "outbox"), mlflow_server.uri)
    run.open("demo", name, {"posttrain.run": name})
    key = run.open_stage("train_sft", "f1", {"lr": 0.1})
    tracker = FileTracker(tmp_path / "metrics.jsonl")
    assert run.run_id(key) is not None
    with run.metrics_of(key, tracker.path):
        tracker.log_metrics({"pass@1": 0.1}, 1)
        time.sleep(1.5)
        end = outage(mlflow_server)
        for step in (2, 3):
            tracker.log_metrics({"pass@1": step / 10}, step)
        second = run.open_stage("train_rl", "f2", {})
        assert run.run_id(second) is None  # known in seconds
        end()
        tracker.log_metrics({"pass@1": 0.4}, 4)
    run.finish(key, "FINISHED")
    parent = run.delivered_run_id(60.0)
    assert run.close(5.0)
    tracking = Tracking(mlflow_server.uri)
    ids = run.outbox.delivered(mlflow_server.uri).runs
    history = tracking.client.get_metric_history(ids[key], "pass_at_1")
    assert [(metric.step, metric.value) for metric in history] == [
        (1, 0.1),
        (2, 0.2),
        (3, 0.3),
        (4, 0.4),
    ]
    experiment = tracking.client.get_run(parent).info.experiment_id
    rule = f"tags.`mlflow.parentRunId` = '{parent}'"
    names = [one.info.run_name for one in tracking.client.search_runs([experiment], rule)]
    assert sorted(names) == ["train_rl", "train_sft"]


def test_a_request_that_a_hanging_server_does_later_makes_no_second_run(
    mlflow_server: MlflowServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The question before a request is skipped here: the server hangs just after it."""
    tracking = Tracking(mlflow_server.uri)
    tracking.client.search_experiments()
    outbox = Outbox(tmp_path / "outbox")
    run = RunTracking(outbox, mlflow_server.uri)
    with monkeypatch.context() as patch:
        patch.setattr(mlflow_reach, "ping", lambda uri: None)
        patch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "1")
        experiment = tracking._experiment("hanging")
        # Hangs between the search, which finds nothing, and the request to make the run.
        real = mlflow_reach.ReachingClient._sent

        def sent(client: object, name: str, /, *arguments: object, **options: object) -> object:
            if name == "create_run":
                mlflow_server.process.suspend()
            return real(client, name, *arguments, **options)  # type: ignore[arg-type]

        patch.setattr(mlflow_reach.ReachingClient, "_sent", sent)
        run.outbox.append(_opening(outbox))
        with pytest.raises(TrackingUnavailable):
            deliver(outbox, tracking)
    mlflow_server.process.resume()
    wait_for(mlflow_server.answers)
    deliver(outbox, tracking)
    rule = "tags.`posttrain.run` = 'hanging'"
    assert len(tracking.client.search_runs([experiment], rule)) == 1


def _opening(outbox: Outbox) -> OpenPipelineRun:
    tags = {"posttrain.run": "hanging", "posttrain.identity": outbox.identity()}
    return OpenPipelineRun(experiment="hanging", name="hanging", tags=tags, time=time.time())


def test_the_registry_by_server(mlflow_server: MlflowServer, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    sha256 = store.seal(folder)
    artifact = PolicyCheckpoint(
        uri=store.content_uri(sha256),
        sha256=sha256,
        fingerprint=sha256,
        created_by=NOBODY,
        algorithm="dpo",
        contract=CONTRACT,
        num_parameters=1,
        num_steps=1,
    )
    tracking = Tracking(mlflow_server.uri)
    run_id = tracking.open_pipeline_run("demo", "other night", {"posttrain.run": "r2"})
    registry = Registry(mlflow_server.uri, tmp_path / "locks")
    assert registry.champion("policy") is None
    assert registry.register("policy", artifact, folder, run_id, {}) == "1"
    assert registry.register("policy", artifact, folder, run_id, {}) == "1"
    registry.promote("policy", "1")
    champion = registry.champion("policy")
    assert champion is not None
    assert (champion.version, champion.sha256) == ("1", sha256)
    assert [one for one in registry.list_models() if one.name == "policy"] == [champion]
    assert store.seal(registry.download("policy", "champion", tmp_path / "out")) == sha256
