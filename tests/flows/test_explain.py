from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from flows.cli import app
from flows.explain import Change, Explanation, differences, explain
from flows.graph import build_graph
from flows.listener import Silent
from flows.pipeline import post_train
from flows.recipes import load_recipe
from flows.runs import Runs
from flows.session import Session
from infra.environment import Home
from schemas.base import UserError
from schemas.fingerprint import fingerprint_fields

Walk = Callable[[Any], list[Any]]


@pytest.fixture
def done(home: Home, walk: Walk, files_recipe: Path) -> Path:
    """The recipe, every stage of it done but the promotion, with what each was made of."""
    for request in walk(load_recipe(str(files_recipe))):
        home.store.note_identity(request.fingerprint, fingerprint_fields(request))
    return files_recipe


def explained(
    home: Home, recipe: Path, *overrides: str, rerun: bool = False
) -> dict[str, Explanation]:
    config = load_recipe(str(recipe), list(overrides))
    found = explain(config, home, rerun_changed_code=rerun)
    return {one.planned.name: one for one in found}


def test_differences_are_found_leaf_by_leaf() -> None:
    before = {"a": {"b": 1, "c": [1, 2]}, "gone": {}, "same": [()]}
    now = {"a": {"b": 2, "c": [1, 3, 4]}, "new": None, "same": [[]]}
    assert differences(before, now) == (
        Change("a.b", 1, 2),
        Change("a.c.1", 2, 3),
        Change("a.c.2", "(not set)", 4),
        Change("gone", {}, "(not set)"),
        Change("new", "(not set)", None),
    )


def test_at_first_there_is_nothing_to_compare_with(home: Home, files_recipe: Path) -> None:
    one = explained(home, files_recipe)["train_sft"]
    assert one.planned.action == "run"
    assert one.reasons[-1] == "no earlier artifact of train_sft to compare with"


def test_what_is_done_is_reused(home: Home, done: Path) -> None:
    one = explained(home, done)["train_rl"]
    assert (one.planned.action, one.reasons) == ("reuse", ("the same work is done",))


def test_the_field_is_named_and_the_later_stages_differ_in_nothing_else(
    home: Home, done: Path
) -> None:
    found = explained(home, done, "sft.optimizer.learning_rate=0.002")
    assert found["prepare_data:demonstrations"].planned.action == "reuse"
    sft = found["train_sft"]
    assert sft.planned.action == "run"
    assert sft.reasons[-1] == "  sft.optimizer.learning_rate: 0.001 → 0.002"
    assert [change.place for change in sft.changes] == ["config.optimizer.learning_rate"]
    assert found["train_rl"].changes == ()
    assert found["train_rl"].reasons == (
        "after train_sft",
        "nothing else has changed: reused if what comes before stays the same",
    )


def test_a_changed_file_is_named(home: Home, done: Path) -> None:
    path = done.parent / "data" / "prompts.jsonl"
    path.write_text(path.read_text().replace("2+2=", "3+1="))
    found = explained(home, done)
    assert "content of the file data.prompts.path: " in found["prepare_data:prompts"].reasons[-1]
    assert found["train_sft"].planned.action == "reuse"


def test_the_nearest_is_the_one_with_the_fewest_differences(
    home: Home, done: Path, walk: Walk
) -> None:
    overrides = ["sft.optimizer.learning_rate=0.5", "seed=7"]
    for request in walk(load_recipe(str(done), overrides)):
        home.store.note_identity(request.fingerprint, fingerprint_fields(request))
    sft = explained(home, done, "sft.optimizer.learning_rate=0.6", "seed=7")["train_sft"]
    assert sft.reasons[-1] == "  sft.optimizer.learning_rate: 0.5 → 0.6"


def test_changed_code_and_packages_are_told(
    home: Home, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.plan.changed_code", lambda code: ["stages/a.py"])
    monkeypatch.setattr("flows.explain.package_versions", lambda: {})
    one = explained(home, done)["train_sft"]
    assert one.planned.action == "reuse"
    assert one.reasons[0].endswith("the code has changed since: stages/a.py")
    assert one.reasons[1].startswith("though packages have changed since: ")
    again = explained(home, done, rerun=True)["prepare_data:evaluation"]
    assert again.planned.action == "run"
    assert again.reasons == ("again, for the code has changed: stages/a.py",)


def test_the_command(home: Home, done: Path) -> None:
    arguments = ["run", str(done), "--explain", "--set", "seed=3", "--home", str(home.root)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "seed: 0 → 3" in result.stdout
    assert '"place": "seed"' in CliRunner().invoke(app, [*arguments, "--json"]).stdout


def test_what_another_run_uses_is_not_put_aside(
    home: Home, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(str(done))
    node = build_graph(config, store=home.store.root, find_incumbent=lambda _: None)[0]
    monkeypatch.setattr("flows.session.changed_code", lambda code: ["stages/a.py"])
    runs = Runs(home.store.root)
    tracking: Any = None
    with runs.open(config) as reader, runs.open(config) as second:
        first = Session(config, home, reader, tracking, Silent())
        assert first.reuse(node) is not None
        again = Session(config, home, second, tracking, Silent(), rerun_changed_code=True)
        with pytest.raises(UserError, match=f"while run {reader.record.run} uses its artifact"):
            again.reuse(node)
    with runs.open(config.model_copy(update={"seed": 5})) as third:
        alone = Session(config, home, third, tracking, Silent(), rerun_changed_code=True)
        assert alone.reuse(node) is None  # put aside: to be done again
        assert home.store.find(node.build({}).fingerprint) is None


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "tracked_home")
def test_changed_code_is_run_again(
    home: Home, stages: Any, files_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_recipe(str(files_recipe))
    post_train(config, home=str(home.root))
    assert {fields["stage"] for _, fields, _ in home.store.identities()} >= {"promote", "train_rl"}
    stages.requests.clear()

    def found(code: dict[str, str]) -> list[str]:
        return ["infra/store.py"] if stages.names == [] else []

    monkeypatch.setattr("flows.session.changed_code", found)
    document = post_train(config, home=str(home.root), rerun_changed_code=True)
    # Only the first stage counts as changed: its content is the same, so the rest is reused.
    assert stages.names == ["prepare_data:evaluation"]
    assert [row["status"] for row in document["stages"]].count("ran") == 1
