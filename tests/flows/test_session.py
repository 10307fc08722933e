"""A run without Prefect: what it tells MLflow, and when."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from flows.recipes import load_recipe
from flows.session import Session, open_session
from infra.environment import Home
from schemas.artifacts import Artifact

pytestmark = pytest.mark.slow


def work_through(session: Session) -> list[str]:
    """Every stage; returns the names of those that were not reused."""
    ran: list[str] = []
    for node in session.nodes:
        if session.reuse(node) is None:
            session.execute(node, lambda _: None)
            ran.append(node.name)
    return ran


def test_what_a_stopped_run_could_not_tell_is_told_when_the_stage_is_reused(
    tracked_home: Home, stages: Any, files_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, config = tracked_home, load_recipe(str(files_recipe))
    tell = Session._log_artifact

    def stopped_after_sft(self: Session, run_id: str, artifact: Artifact) -> None:
        if getattr(artifact, "algorithm", None) == "sft":
            raise KeyboardInterrupt
        tell(self, run_id, artifact)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "_log_artifact", stopped_after_sft)
        with pytest.raises(KeyboardInterrupt), open_session(config, home) as session:
            work_through(session)
    assert _sft_run(home).info.status == "KILLED"
    assert "loss" not in _sft_run(home).data.metrics

    with open_session(config, home) as session:
        assert work_through(session)[0] == "train_rl"
    run = _sft_run(home)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["loss"] == 0.1
    assert "posttrain.sha256" in run.data.tags

    # A run that is over is not spoken to again, least of all by another one.
    ended = run.info.end_time
    with open_session(config, home) as session:
        assert work_through(session) == []
    assert _sft_run(home).info.end_time == ended


def test_a_decision_that_another_run_has_made_meanwhile_is_taken(
    tracked_home: Home, stages: Any, files_recipe: Path
) -> None:
    home, config = tracked_home, load_recipe(str(files_recipe))
    with open_session(config, home) as first:
        work_through(first)
    with open_session(config, home) as second:
        *before, promote = second.nodes
        for node in before:
            assert second.reuse(node) is not None
        # It was not there when this run looked; it is now.
        decision = second.execute(promote, lambda _: None)
        assert decision == first.artifacts["promote"]
        assert second.run.record.stages[-1].status == "reused"
    assert not home.store.quarantine_folder.exists()


def _sft_run(home: Home) -> Any:
    client = MlflowClient(tracking_uri=home.mlflow_uri)
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    (run,) = client.search_runs(experiments, "tags.`posttrain.stage` = 'train_sft'")
    return run
