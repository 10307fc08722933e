"""Whole runs against a real MLflow server that is away at the start, in the middle, at the end."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows import session, sync
from flows.listener import Silent, watched_by
from flows.pipeline import post_train
from flows.recipes import load_recipe
from flows.runs import Runs, StageRow, outbox_of
from infra import mlflow_reach
from infra.environment import Home
from infra.mlflow_tracking import Tracking
from infra.tracking import FileTracker
from infra.unavailable import TrackingUnavailable
from tests.servers import MlflowServer, PrefectServer, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server")]

_numbers = itertools.count()


class Watcher(Silent):
    """Remembers what a person would read, and does something when a stage is done."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.when: dict[str, Callable[[], None]] = {}

    def note(self, text: str) -> None:
        self.notes.append(text)

    def done(self, row: StageRow) -> None:
        self.when.pop(row.name, lambda: None)()


class Night:
    """One run of the small recipe on the server, with a home, experiment and model of its own."""

    def __init__(self, server: MlflowServer, stages: Any, recipe: Path, folder: Path) -> None:
        self.name = f"night-{next(_numbers)}"
        self.server = server
        self.stages = stages
        self.home = Home.resolve(str(folder / self.name))
        self.watcher = Watcher()
        self.when: dict[str, Callable[[], None]] = {}
        """What happens in the middle of a stage's training, once."""
        self.config = load_recipe(
            str(recipe), [f"registry.name={self.name}", "compute.registry_timeout=60"]
        ).model_copy(update={"name": self.name})
        stages.before = self._train

    def run(self, **compute: Any) -> dict[str, Any]:
        changed = self.config.compute.model_copy(update=compute)
        config = self.config.model_copy(update={"compute": changed})
        with watched_by(self.watcher):
            return post_train(config, home=str(self.home.root))

    def _train(self, request: Any) -> None:
        work = self.home.store.work_dir(request.fingerprint)
        tracker = FileTracker(work / "metrics.jsonl")
        for step in range(1, 7):
            tracker.log_metrics({"loss": 1 / step, "pass@1": step / 7}, step)
            if step == 3:
                self.when.pop(request.stage, lambda: None)()

    def found(self) -> dict[str, Any]:
        """All that MLflow knows of the run, without what differs between two runs."""
        client = Tracking(self.server.uri).client
        experiment = client.get_experiment_by_name(self.name)
        runs = client.search_runs([experiment.experiment_id])
        (parent,) = (run for run in runs if "mlflow.parentRunId" not in run.data.tags)
        nested = [run for run in runs if run is not parent]
        names = [run.info.run_name for run in nested]
        assert len(names) == len(set(names)), names
        assert {run.data.tags["mlflow.parentRunId"] for run in nested} == {parent.info.run_id}
        stages = {}
        for run in nested:
            history = {
                key: [
                    (one.step, one.value) for one in client.get_metric_history(run.info.run_id, key)
                ]
                for key in run.data.metrics
            }
            tags = {key for key in run.data.tags if key.startswith("posttrain.")}
            # The name of the registered model, and what hangs on it.
            params = {k: v for k, v in run.data.params.items() if self.name not in v}
            params.pop("fingerprint")
            stages[run.info.run_name] = (run.info.status, history, tags, params)
        versions = client.search_model_versions(f"name = '{self.name}'")
        return {
            "status": parent.info.status,
            "metrics": parent.data.metrics,
            "tags": {key for key in parent.data.tags if key.startswith("posttrain.")},
            "stages": stages,
            "versions": [str(one.version) for one in versions],
        }


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    """What an undisturbed run leaves; filled by the first test that needs it."""
    return {}


@pytest.fixture
def night(
    mlflow_server: MlflowServer,
    stages: Any,
    files_recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    expected: dict[str, Any],
) -> Night:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", mlflow_server.uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")
    monkeypatch.setattr(mlflow_reach, "_PING_SECONDS", 1.0)
    monkeypatch.setattr(mlflow_reach, "_LAST_PAUSE_SECONDS", 1.0)
    if not expected:
        undisturbed = Night(mlflow_server, stages, files_recipe, tmp_path)
        undisturbed.run()
        expected.update(undisturbed.found())
        stages.requests.clear()
    return Night(mlflow_server, stages, files_recipe, tmp_path)


def test_the_undisturbed_run_is_what_it_is_taken_for(
    night: Night, expected: dict[str, Any], real_prefect: PrefectServer
) -> None:
    assert expected["status"] == "FINISHED"
    assert expected["versions"] == ["1"]
    assert set(expected["stages"]) == {
        *("prepare_data:evaluation", "prepare_data:demonstrations", "prepare_data:prompts"),
        *("train_sft", "train_rl", "evaluate", "promote"),
        *(name for name in expected["stages"] if name == "credit"),
    }
    status, history, tags, params = expected["stages"]["train_sft"]
    assert status == "FINISHED"
    assert history["pass_at_1"] == [(step, step / 7) for step in range(1, 7)]
    assert sorted(step for step, _ in history["loss"]) == [0, 1, 2, 3, 4, 5, 6]  # 0: the last
    assert {"posttrain.sha256", "posttrain.fingerprint"} <= tags
    assert params["config.optimizer.learning_rate"] == "0.001"
    # Prefect's page of the decision leads to MLflow's of the run and of the model.
    pages = [str(one["data"]) for one in real_prefect.ask("artifacts/filter")]
    (link,) = (
        found
        for text in pages
        for found in re.findall(rf"\[run\]\({night.server.uri}/#/experiments/(.*)\),", text)
    )
    experiment, run_id = link.split("/runs/")
    info = Tracking(night.server.uri).client.get_run(run_id).info
    assert info.experiment_id == experiment
    assert any(f"[model version]({night.server.uri}/#/models/night-" in text for text in pages)


def test_hanging_at_the_start_and_back_in_the_middle(
    night: Night, expected: dict[str, Any]
) -> None:
    night.server.process.suspend()
    night.when["train_rl"] = night.server.process.resume
    document = night.run()
    assert night.found() == expected
    assert document["mlflow_run_id"] is not None
    assert sync.waiting(night.home) == []


def test_killed_in_the_middle_and_back_before_the_evaluation(
    night: Night, expected: dict[str, Any]
) -> None:
    night.when["train_sft"] = night.server.kill
    night.when["train_rl"] = night.server.start
    night.run()
    assert night.found() == expected


def test_killed_at_the_end_the_rest_is_told_by_the_next_command(
    night: Night, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "_CLOSE_SECONDS", 3.0)
    night.watcher.when["promote"] = night.server.kill
    document = night.run()
    assert document["decision"]["promoted"] is True
    assert any("posttrain sync" in note for note in night.watcher.notes)
    (record,) = sync.waiting(night.home)
    assert record.run == document["run"]
    with pytest.raises(TrackingUnavailable):
        list(sync.sync(night.home, [record]))
    night.server.start()
    with sync.syncing(night.home, lambda one: None):
        wait_for(lambda: not sync.waiting(night.home), 60)
    assert night.found() == expected
    assert Runs(night.home.store.root).read(record.run).mlflow_run_id == document["mlflow_run_id"]
    assert outbox_of(night.home.store.root / "runs" / record.run).size() == 0


def test_away_the_whole_night_the_run_keeps_all_but_the_promotion(
    night: Night, expected: dict[str, Any]
) -> None:
    night.server.kill()
    with pytest.raises(TrackingUnavailable, match="evaluate needs MLflow's registry") as caught:
        night.run(registry_timeout=2.0)
    assert f"kept in {night.home.store.root}" in str(caught.value)
    assert caught.value.waited == 2.0  # and not tried again: it has been waited for
    (record,) = Runs(night.home.store.root).all()
    assert record.status == "failed"
    assert record.mlflow_run_id is None
    trained = list(night.stages.names)
    assert trained[-1] in ("train_rl", "credit")

    night.server.start()
    night.stages.requests.clear()
    document = night.run()
    assert night.stages.names == ["evaluate"]  # everything before it is reused
    assert document["run"] == record.run
    found = night.found()
    for name, stage in expected["stages"].items():
        assert found["stages"][name] == stage, name
    assert (found["status"], found["versions"]) == ("FINISHED", ["1"])
