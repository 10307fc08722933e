"""What a run could not tell MLflow, by hand and with a server that is away."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.explain import explain
from flows.graph import build_graph
from flows.plan import make_plan
from flows.recipes import load_recipe
from flows.runs import Runs
from flows.sync import waiting
from infra.environment import Home
from infra.outbox import PIPELINE, Finish, OpenPipelineRun, Tags
from schemas.artifacts import Artifact
from tests.servers import free_port


def posttrain(home: Home, *arguments: str) -> Result:
    return CliRunner().invoke(app, [*arguments, "--home", str(home.root)])


@pytest.fixture
def dead(monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"http://user:secret@127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


def test_nothing_waits(home: Home) -> None:
    result = posttrain(home, "sync")
    assert result.exit_code == 0
    assert result.stdout == "MLflow has been told everything.\n"


@pytest.mark.slow
def test_by_hand(
    tracked_home: Home, files_recipe: Path, dead: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(str(files_recipe))
    runs = Runs(tracked_home.store.root)
    with runs.open(config) as run:
        name = run.record.run
        run.outbox.append(
            OpenPipelineRun(
                experiment="files", name=name, tags={"posttrain.run": name}, time=1000.0
            ),
            Tags(run=PIPELINE, tags={"posttrain.outcome": "promoted"}),
            Finish(run=PIPELINE, status="FINISHED", time=2000.0),
        )
        run.update(status="finished")
    result = posttrain(tracked_home, "sync")
    assert result.exit_code == 1
    assert "connection refused" in result.stderr
    assert "what waits is kept" in result.stderr
    assert "secret" not in result.stderr
    assert [record.run for record in waiting(tracked_home)] == [name]

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    result = posttrain(tracked_home, "sync")
    assert result.stdout == f"{name}: MLflow has now been told what it had missed (3 entries)\n"
    assert posttrain(tracked_home, "sync").stdout == "MLflow has been told everything.\n"
    client = MlflowClient(tracking_uri=tracked_home.mlflow_uri)
    found = client.get_run(str(runs.read(name).mlflow_run_id))
    assert (found.info.status, found.info.end_time) == ("FINISHED", 2_000_000)
    assert found.data.tags["posttrain.outcome"] == "promoted"


@pytest.mark.slow
def test_a_plan_does_not_need_the_registry_to_answer(
    home: Home, files_recipe: Path, stages: Any, dead: str
) -> None:
    config = load_recipe(str(files_recipe))
    made: dict[str, Artifact] = {}
    for node in build_graph(config, store=home.store.root, find_incumbent=lambda _: None):
        if node.stage in ("evaluate", "promote"):
            break
        made[node.name] = stages.publish(node.build(made), home.store)
    plan = {stage.name: stage for stage in make_plan(config, home).stages}
    assert plan["train_rl"].action == "reuse"
    assert plan["evaluate"].action == "run"
    assert "does not answer (connection refused)" in plan["evaluate"].reason
    explained = {one.planned.name: one for one in explain(config, home)}
    assert explained["evaluate"].planned.action == "run"
    result = posttrain(home, "run", str(files_recipe), "--dry-run", "--json")
    assert result.exit_code == 0, result.output
    assert "secret" not in result.output
    assert len(json.loads(result.stdout)["plan"]) == len(plan)


@pytest.mark.slow
def test_commands_that_need_the_registry_say_so(home: Home, dead: str) -> None:
    for arguments in (["models"], ["lineage", "files"], ["rollback", "files", "--reason", "x"]):
        result = posttrain(home, *arguments)
        assert result.exit_code == 1, result.output
        assert "MLFLOW_TRACKING_URI" in result.stderr
        assert "secret" not in result.stderr
