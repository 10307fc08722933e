from __future__ import annotations

import json
import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.gc import Waste, delete, find_waste
from flows.pipeline import post_train
from flows.recipes import load_recipe
from flows.runs import Runs, StageRow
from infra.environment import Home

LATER = datetime.now(UTC) + timedelta(days=60)

pytestmark = pytest.mark.usefixtures("tracked_home")


@pytest.fixture
def requests(walk: Callable[[Any], list[Any]], files_recipe: Path) -> list[Any]:
    """Every stage of the recipe but the promotion, done by nobody's run."""
    return walk(load_recipe(str(files_recipe)))[:-1]


def names(waste: list[Waste], kind: str = "artifact") -> list[str]:
    return sorted(one.what for one in waste if one.kind == kind)


def in_sixty_days(home: Home) -> list[Waste]:
    return find_waste(home, 30, LATER)


def row(request: Any) -> StageRow:
    return StageRow(
        name=request.stage,
        status="ran",
        seconds=0.0,
        peak_memory_bytes=None,
        fingerprint=request.fingerprint,
        artifact="",
    )


def test_nothing_young_goes(home: Home, requests: list[Any]) -> None:
    assert find_waste(home, 30) == []
    assert len(names(in_sixty_days(home))) == len(requests)


def test_what_a_recent_run_used_stays_with_all_before_it(
    home: Home, files_recipe: Path, requests: list[Any]
) -> None:
    config = load_recipe(str(files_recipe))
    by_stage = {request.stage: request for request in requests}
    with Runs(home.store.root).open(config) as run:
        run.update(status="finished", ended=LATER, stages=(row(by_stage["train_sft"]),))
    # The SFT policy's own data stay, and the held-out records that those were checked against.
    waste = in_sixty_days(home)
    assert names(waste) == ["credit", "evaluate", "prepare_data:prompts", "train_rl"]
    assert all(59 < one.days < 61 for one in waste)
    assert all(one.num_bytes > 0 for one in waste if one.kind == "artifact")


def test_what_a_run_or_a_stage_at_work_uses_stays(
    home: Home, files_recipe: Path, requests: list[Any]
) -> None:
    by_stage = {request.stage: request for request in requests}
    with Runs(home.store.root).open(load_recipe(str(files_recipe))) as run:
        run.update(stages=(row(by_stage["train_rl"]),))
        assert names(in_sixty_days(home)) == ["credit", "evaluate"]
    everything = in_sixty_days(home)

    # A stage that a run of another version has started: only its lock and its request tell.
    evaluate = by_stage["evaluate"]
    work = home.store.work_dir("0" * 64)
    (work / "request.json").write_text(evaluate.model_dump_json())
    os.utime(work / "request.json", (0, 0))
    os.utime(work, (0, 0))
    with home.store.lock("0" * 64):
        kept = {one.fingerprint for one in in_sixty_days(home)}
        assert "0" * 64 not in kept
        assert evaluate.candidate.fingerprint not in kept
        # It began after the list was made: what it reads is seen once more before each deletion.
        gone = {one.fingerprint for one in delete(home, everything)}
        assert evaluate.candidate.fingerprint not in gone
        assert home.store.find(evaluate.candidate.fingerprint) is not None
    assert "0" * 64 in {one.fingerprint for one in in_sixty_days(home)}


def test_what_is_locked_is_not_deleted(home: Home, requests: list[Any]) -> None:
    waste = in_sixty_days(home)
    first = requests[0].fingerprint
    with home.store.lock(first):
        delete(home, waste)
    assert home.store.find(first) is not None
    assert list(home.store.artifacts_folder.iterdir()) == [home.store.artifacts_folder / first]
    assert not home.store.trash_folder.exists()


def test_the_command(home: Home, requests: list[Any]) -> None:
    for path in home.store.root.rglob("*"):
        os.utime(path, (0, 0))
    home.store.quarantine(requests[-1].fingerprint)
    arguments = ["gc", "--home", str(home.root)]
    shown = CliRunner().invoke(app, [*arguments, "--dry-run"])
    assert shown.exit_code == 0, shown.output
    assert "train_sft" in shown.stdout
    assert "Would delete" in shown.stdout
    assert home.store.find(requests[0].fingerprint) is not None
    document = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    kinds = {folder["kind"] for folder in document["folders"]}
    assert document["deleted"] is True
    assert kinds == {"artifact", "work", "quarantine"}
    assert not list(home.store.artifacts_folder.iterdir())
    assert "Nothing to delete" in CliRunner().invoke(app, arguments).stdout


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_what_an_alias_needs_stays(home: Home, stages: Any, files_recipe: Path) -> None:
    config = load_recipe(str(files_recipe))
    first = post_train(config, home=str(home.root))
    stages.pass_at_1 = {"candidate": 0.6, "baseline": 0.7}
    second = post_train(config.model_copy(update={"seed": 1}), home=str(home.root))
    third = post_train(config.model_copy(update={"seed": 2}), home=str(home.root))
    # Version 1 is the champion and version 3 the challenger; version 2 was refused, long ago.
    assert [one["decision"]["version"] for one in (first, second, third)] == ["1", "2", "3"]
    gone = {one.fingerprint for one in in_sixty_days(home)}
    seconds = {r["name"]: r["fingerprint"] for r in second["stages"]}
    kept = {r["fingerprint"] for r in (*first["stages"], *third["stages"])}
    assert {seconds["train_rl"], seconds["evaluate"], seconds["promote"]} <= gone
    assert gone & kept == set()
