from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.archive import Archive
from flows.pipeline import is_infrastructure_failure, post_train, stage_task
from flows.recipes import load_recipe
from flows.runs import Runs
from infra.environment import Home
from infra.launch import StageFailed
from infra.unavailable import TrackingUnavailable
from schemas.artifacts import PolicyCheckpoint
from schemas.base import UserError
from schemas.evaluation import GateConfig
from schemas.pipeline import PipelineConfig
from schemas.requests import EvaluateRequest


def waited_for(seconds: float) -> TrackingUnavailable:
    error = TrackingUnavailable("waited for in vain")
    error.waited = seconds
    return error


@pytest.mark.parametrize(
    ("error", "retried"),
    [
        (UserError("mend it"), False),
        (ValueError("ours"), False),
        (AssertionError(), False),
        (StageFailed("killed", None, 9, True), True),
        (StageFailed("asked to stop", None, 15, False), False),
        (TimeoutError(), True),
        (ConnectionError("MLflow"), True),
        (TrackingUnavailable("not waited for"), True),
        (waited_for(300.0), False),
        (OSError(errno.EIO, "disk"), True),
        (OSError(errno.ENOSPC, "full"), False),
    ],
)
def test_what_is_tried_again(error: Exception, retried: bool) -> None:
    assert is_infrastructure_failure(error) is retried


def test_retries_wait_longer_each_time_and_end() -> None:
    task = stage_task("train_sft", 4)
    assert task.retries == 4
    assert task.retry_delay_seconds == [1, 2, 4, 8]
    assert task.retry_jitter_factor == 0.3
    assert stage_task("train_sft", 0).retries == 0


@pytest.fixture
def config(files_recipe: Path) -> PipelineConfig:
    return load_recipe(str(files_recipe))


def with_seed(config: PipelineConfig, seed: int) -> PipelineConfig:
    return config.model_copy(update={"seed": seed})


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "tracked_home")
class TestFlow:
    def test_infrastructure_is_retried_and_users_errors_are_not(
        self, home: Home, stages: Any, config: PipelineConfig
    ) -> None:
        stages.script["train_sft"] = [
            StageFailed("killed", None, 9, True),
            OSError(errno.EIO, "lost"),
        ]
        document = post_train(config, home=str(home.root))
        assert stages.names.count("train_sft") == 3
        assert stages.names.count("train_rl") == 1
        assert document["decision"]["promoted"] is True
        (row,) = (row for row in document["stages"] if row["name"] == "train_sft")
        assert row["status"] == "ran"

        stages.script["train_sft"] = [UserError("mend it")]
        stages.requests.clear()
        with pytest.raises(UserError, match="mend it"):
            post_train(with_seed(config, 1), home=str(home.root))
        assert stages.names == ["train_sft"]

    def test_one_mlflow_run_with_one_nested_run_a_stage(
        self, home: Home, stages: Any, config: PipelineConfig
    ) -> None:
        stages.script["train_rl"] = [StageFailed("broke", 1, None, False)]
        with pytest.raises(StageFailed):
            post_train(config, home=str(home.root))
        document = post_train(config, home=str(home.root))
        client = MlflowClient(tracking_uri=home.mlflow_uri)
        experiment = client.get_experiment_by_name("files")
        assert experiment is not None
        found = client.search_runs([experiment.experiment_id])
        parents = [run for run in found if "mlflow.parentRunId" not in run.data.tags]
        assert [run.info.run_id for run in parents] == [document["mlflow_run_id"]]
        assert parents[0].info.status == "FINISHED"
        assert parents[0].data.metrics["candidate/pass_at_1"] == 0.8
        nested = {run.info.run_name: run for run in found if run not in parents}
        assert sorted(nested) == sorted(row["name"] for row in document["stages"])
        assert len(found) == 1 + len(nested)
        sft = nested["train_sft"]
        assert sft.data.params["config.optimizer.learning_rate"] == "0.001"
        assert sft.data.metrics["loss"] == 0.1
        assert sft.data.tags["posttrain.fingerprint"]
        assert sft.data.tags["posttrain.sha256"]
        assert nested["train_rl"].info.status == "FINISHED"

    def test_the_incumbent_and_the_gate(
        self, home: Home, stages: Any, config: PipelineConfig
    ) -> None:
        first = post_train(config, home=str(home.root))
        assert first["decision"]["aliases"] == ["challenger", "champion"]
        champion = Archive(home, "files").registry.champion("files")
        assert champion is not None

        # The next candidate meets the champion, and a refusal is a normal end.
        stages.pass_at_1 = {"candidate": 0.6, "baseline": 0.7}
        second = post_train(with_seed(config, 1), home=str(home.root))
        assert second["decision"]["promoted"] is False
        assert second["decision"]["aliases"] == ["challenger"]
        assert second["decision"]["reasons"] == ["pass@1 moved by -0.10, 0.00 is required"]
        (request,) = (r for r in stages.requests[-1:] if isinstance(r, EvaluateRequest))
        assert request.incumbent is not None
        assert request.incumbent.sha256 == champion.sha256

        # Run again, the champion's own recipe is not compared with itself.
        stages.requests.clear()
        again = post_train(config, home=str(home.root))
        assert stages.requests == []
        assert {row["status"] for row in again["stages"]} == {"reused"}
        assert again["decision"]["promoted"] is True

    def test_a_champion_that_the_store_has_lost_is_fetched(
        self, home: Home, stages: Any, config: PipelineConfig
    ) -> None:
        post_train(config, home=str(home.root))
        archive = Archive(home, "files")
        champion = archive.registry.champion("files")
        assert champion is not None
        home.store.quarantine(champion.fingerprint)
        candidate = _any_policy(home)
        fetched = archive.incumbent(candidate)
        assert fetched is not None
        assert fetched.sha256 == champion.sha256
        assert home.store.find_verified(champion.fingerprint) == fetched

    def test_a_champion_that_changes_meanwhile_is_evaluated_against(
        self, home: Home, stages: Any, config: PipelineConfig
    ) -> None:
        post_train(config, home=str(home.root))
        post_train(with_seed(config, 1), home=str(home.root))
        registry = Archive(home, "files").registry
        assert registry.champion("files").version == "2"  # type: ignore[union-attr]
        moves = ["1"]

        def meanwhile(request: Any) -> None:
            if isinstance(request, EvaluateRequest) and moves:
                registry.promote("files", moves.pop())

        stages.before = meanwhile
        stages.requests.clear()
        document = post_train(with_seed(config, 2), home=str(home.root))
        incumbents = [r.incumbent for r in stages.requests if isinstance(r, EvaluateRequest)]
        assert len(incumbents) == 2
        assert incumbents[0] != incumbents[1]
        assert [row["name"] for row in document["stages"]].count("evaluate") == 1
        assert document["decision"]["version"] == "3"

    def test_a_registry_that_was_emptied_gets_the_model_again(
        self, home: Home, stages: Any, config: PipelineConfig, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        post_train(config, home=str(home.root))
        stages.requests.clear()
        other = f"sqlite:///{home.root / 'other.db'}"
        monkeypatch.setenv("MLFLOW_TRACKING_URI", other)
        document = post_train(config, home=str(home.root))
        assert stages.requests == []
        assert document["decision"]["aliases"] == ["challenger", "champion"]
        statuses = {row["name"]: row["status"] for row in document["stages"]}
        assert statuses.pop("promote") == "ran"
        assert set(statuses.values()) == {"reused"}

    def test_a_field_that_slices_need_is_missed_before_any_training(
        self, home: Home, stages: Any, config: PipelineConfig
    ) -> None:
        rule = {"field": "level", "min_records": 2, "max_regression": 0.1}
        gate = GateConfig.model_validate({"slices": [rule]})
        config = config.model_copy(update={"gate": gate})
        stages.extra = {"metadata": {"levels": 3}}
        with pytest.raises(UserError, match=r"gate\.slices\.0\.field level: 4 of the 4 records"):
            post_train(config, home=str(home.root))
        assert stages.names == ["prepare_data:evaluation"]
        # The data are mended: another file, so another fingerprint.
        stages.extra = {"metadata": {"level": 3}}
        home.store.quarantine(stages.requests[0].fingerprint)
        assert post_train(config, home=str(home.root))["decision"]["promoted"] is True

    def test_each_stage_has_the_time_that_it_is_given(
        self, home: Home, stages: Any, config: PipelineConfig
    ) -> None:
        limits = {"train_sft": 60.0, "train_rl": 7200.0}
        compute = config.compute.model_copy(update={"stage_timeout": limits})
        post_train(config.model_copy(update={"compute": compute}), home=str(home.root))
        assert stages.timeouts["train_sft"] == 60.0
        assert stages.timeouts["train_rl"] == 7200.0
        assert stages.timeouts["evaluate"] is None

    def test_the_record_of_a_run(self, home: Home, stages: Any, config: PipelineConfig) -> None:
        document = post_train(config, home=str(home.root))
        record = Runs(home.store.root).read(document["run"])
        assert record.document() == document
        assert record.status == "finished"
        assert record.outcome == "promoted"
        assert record.config["name"] == "files"
        decision = home.store.root / document["stages"][-1]["artifact"] / "decision.json"
        assert '"observed": 0.3' in decision.read_text()


def _any_policy(home: Home) -> PolicyCheckpoint:
    return next(
        artifact
        for artifact in home.store.artifacts()
        if isinstance(artifact, PolicyCheckpoint) and artifact.algorithm == "sft"
    )
