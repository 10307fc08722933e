from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.graph import build_graph
from flows.plan import make_plan
from flows.recipes import load_recipe
from infra.environment import Home
from schemas.artifacts import Artifact
from schemas.base import UserError
from schemas.pipeline import PipelineConfig

Walk = Callable[[PipelineConfig], list[Any]]


def actions(config: PipelineConfig, home: Home) -> dict[str, str]:
    return {stage.name: stage.action for stage in make_plan(config, home).stages}


def do(config: PipelineConfig, home: Home, stages: Any, last: str) -> dict[str, Artifact]:
    """Do the work of the nodes up to and with `last`."""
    made: dict[str, Artifact] = {}
    for node in build_graph(config, store=home.store.root, find_incumbent=lambda _: None):
        request = node.build(made)
        made[node.name] = stages.publish(request, home.store)
        if node.name == last:
            break
    return made


def test_at_first_everything_runs(home: Home, files_recipe: Path) -> None:
    plan = make_plan(load_recipe(str(files_recipe)), home)
    assert {stage.action for stage in plan.stages} == {"run"}
    assert not plan.all_reused
    first, *_, promote = plan.stages
    assert first.fingerprint is not None
    assert first.reason == "not done before"
    assert promote.fingerprint is None
    assert promote.reason == "after train_rl, evaluate, prepare_data:evaluation and 2 more"


def test_a_plan_changes_nothing(home: Home, files_recipe: Path) -> None:
    before = sorted(home.root.rglob("*"))
    make_plan(load_recipe(str(files_recipe)), home)
    assert sorted(home.root.rglob("*")) == before


def test_what_is_done_is_reused(home: Home, files_recipe: Path, stages: Any) -> None:
    config = load_recipe(str(files_recipe))
    do(config, home, stages, "train_sft")
    found = actions(config, home)
    assert found.pop("train_sft") == "reuse"
    assert found.pop("train_rl") == "run"
    assert {name for name, action in found.items() if action == "reuse"} == {
        "prepare_data:evaluation",
        "prepare_data:demonstrations",
        "prepare_data:prompts",
    }
    other = actions(load_recipe(str(files_recipe), ["rl.algorithm=rloo"]), home)
    assert other["train_sft"] == "reuse"


def test_a_checkpoint_is_resumed_from(home: Home, files_recipe: Path, stages: Any) -> None:
    config = load_recipe(str(files_recipe))
    made = do(config, home, stages, "prepare_data:prompts")
    nodes = {
        n.name: n for n in build_graph(config, store=home.store.root, find_incumbent=lambda _: None)
    }
    request = nodes["train_sft"].build(made)
    checkpoints = home.store.work_dir(request.fingerprint) / "checkpoints"
    (checkpoints / ".step-00000030.77").mkdir(parents=True)
    assert actions(config, home)["train_sft"] == "run"
    (checkpoints / "step-00000010").mkdir()
    (checkpoints / "step-00000020").mkdir()
    stage = next(s for s in make_plan(config, home).stages if s.name == "train_sft")
    assert (stage.action, stage.reason) == ("resume", "from step-00000020")


def test_code_drift_is_told(
    home: Home, files_recipe: Path, stages: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(str(files_recipe))
    do(config, home, stages, "train_sft")
    monkeypatch.setattr("flows.plan.changed_code", lambda code: ["stages/a.py", "stages/b.py"])
    stage = next(s for s in make_plan(config, home).stages if s.name == "train_sft")
    assert stage.action == "reuse"
    assert stage.reason == "reused, though the code has changed since: stages/a.py, stages/b.py"


def test_a_missing_file_is_told(home: Home, files_recipe: Path) -> None:
    with pytest.raises(UserError, match=r"data\.prompts: .*nowhere\.jsonl"):
        make_plan(load_recipe(str(files_recipe), ["data.prompts.path=nowhere.jsonl"]), home)
