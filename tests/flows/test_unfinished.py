"""Unfinished work: what is gone on from, what is left behind, and what is said about it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.explain import explain
from flows.graph import Node, build_graph
from flows.plan import plan_stage
from flows.recipes import load_recipe
from flows.runs import Runs
from flows.session import Session
from infra.environment import Home
from infra.store import Store
from schemas.fingerprint import fingerprint_fields
from schemas.pipeline import PipelineConfig
from schemas.requests import StageRequest

Walk = Callable[[Any], list[Any]]


class Notes:
    """Keeps what a run says by the way."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def started(self, name: str) -> None: ...

    def line(self, name: str, text: str) -> None: ...

    def done(self, row: Any) -> None: ...

    def note(self, text: str) -> None:
        self.notes.append(text)


def begin(store: Store, request: StageRequest, step: int, code: dict[str, str]) -> Path:
    """The checkpoint of a stage that was killed after some steps."""
    store.note_identity(request.fingerprint, fingerprint_fields(request))
    folder = store.work_dir(request.fingerprint) / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(json.dumps({"step": step, "extra": {}, "code": code}))
    return folder


def sft_of(config: PipelineConfig, home: Home, stages: Any) -> tuple[Node, StageRequest, Any]:
    """The node and the request of SFT, with what comes before it done."""
    made: dict[str, Any] = {}
    for node in build_graph(config, store=home.store.root, find_incumbent=lambda _: None):
        request = node.build(made)
        if node.name == "train_sft":
            return node, request, made
        made[node.name] = home.store.find(request.fingerprint) or stages.publish(
            request, home.store
        )
    raise AssertionError


def look(
    config: PipelineConfig, home: Home, node: Node, request: StageRequest, rerun: bool = False
) -> list[str]:
    """What a run says before it starts a stage."""
    notes = Notes()
    lines: list[str] = []
    tracking: Any = None
    with Runs(home.store.root).open(config) as run:
        session = Session(config, home, run, tracking, notes, rerun)
        with home.store.lock(request.fingerprint):
            session._look_at_checkpoint(node, request, lines.append)
    assert [f"{node.name}: {line}" for line in lines] == notes.notes
    return lines


def test_a_changed_field_is_named_when_unfinished_work_is_left_behind(
    home: Home, files_recipe: Path, stages: Any
) -> None:
    before = load_recipe(str(files_recipe))
    _, begun, _ = sft_of(before, home, stages)
    begin(home.store, begun, 6, {})
    now = load_recipe(str(files_recipe), ["sft.batch_size=8"])
    node, request, _ = sft_of(now, home, stages)
    said = (
        "starting anew: sft.batch_size: 32 → 8 "
        f"(checkpoint step-00000006 of {begun.fingerprint[:12]} is not used)"
    )
    assert look(now, home, node, request) == [said]
    explained = {one.planned.name: one for one in explain(now, home)}
    assert said in explained["train_sft"].reasons
    # The same configuration goes on from it, and there is nothing to say.
    same, again, _ = sft_of(before, home, stages)
    assert look(before, home, same, again) == []


def test_changed_data_are_named(home: Home, files_recipe: Path, stages: Any) -> None:
    config = load_recipe(str(files_recipe))
    _, begun, _ = sft_of(config, home, stages)
    begin(home.store, begun, 6, {})
    path = files_recipe.parent / "data" / "demonstrations.jsonl"
    path.write_text(path.read_text().replace("1+2=", "2+1="))
    node, request, _ = sft_of(config, home, stages)
    (line,) = look(config, home, node, request)
    assert line.startswith("starting anew: input demonstrations: ")


def test_the_nearest_counts_and_what_is_far_or_at_work_does_not(
    home: Home, files_recipe: Path, stages: Any
) -> None:
    def begun(*overrides: str) -> StageRequest:
        _, request, _ = sft_of(load_recipe(str(files_recipe), list(overrides)), home, stages)
        begin(home.store, request, 2, {})
        return request

    config = load_recipe(str(files_recipe))
    node, request, _ = sft_of(config, home, stages)
    changes = [
        "batch_size=1",
        "num_epochs=3",
        "max_steps=7",
        "log_every=3",
        "max_truncated_fraction=0.2",
    ]
    begun("seed=3", *(f"sft.{change}" for change in changes))
    assert look(config, home, node, request) == []  # six fields: other work altogether
    begun("seed=3", *(f"sft.{change}" for change in changes[:4]))
    (line,) = look(config, home, node, request)
    assert line.count(" → ") == 5
    near = begun("seed=4")
    (line,) = look(config, home, node, request)
    assert line.startswith("starting anew: seed: 4 → 0 ")
    with home.store.lock(near.fingerprint):
        (line,) = look(config, home, node, request)
    assert line.count(" → ") == 5


def test_a_checkpoint_of_other_code_is_gone_on_from_and_told(
    home: Home, files_recipe: Path, stages: Any
) -> None:
    config = load_recipe(str(files_recipe))
    node, request, made = sft_of(config, home, stages)
    begin(home.store, request, 6, {"infra.files": "another digest"})
    assert look(config, home, node, request) == [
        "resuming from step-00000006, though other code wrote it; changed since: infra/files.py "
        "(--rerun-changed-code starts anew)"
    ]
    session_archive = _archive(home)
    planned = plan_stage(node, made, session_archive, False)
    assert planned.action == "resume"
    assert planned.reason == (
        "from step-00000006, though the code has changed since: infra/files.py"
    )
    planned = plan_stage(node, made, session_archive, True)
    assert planned.action == "run"
    assert planned.reason == ("anew, for the code has changed since step-00000006: infra/files.py")


def test_rerun_changed_code_puts_unfinished_work_of_other_code_aside(
    home: Home, files_recipe: Path, stages: Any
) -> None:
    config = load_recipe(str(files_recipe))
    node, request, _ = sft_of(config, home, stages)
    begin(home.store, request, 6, {"infra.files": "another digest"})
    assert look(config, home, node, request, rerun=True) == [
        "anew, for the code has changed since its checkpoint: infra/files.py"
    ]
    assert home.store.latest_checkpoint(request.fingerprint) is None
    (kept,) = home.store.quarantine_folder.iterdir()
    assert (kept / "checkpoints" / "step-00000006").is_dir()
    # What this code has begun is gone on from.
    begin(home.store, request, 3, _digests("infra.files"))
    assert look(config, home, node, request, rerun=True) == []
    assert home.store.latest_checkpoint(request.fingerprint) is not None


def test_a_run_says_that_training_was_unstable(home: Home, files_recipe: Path, stages: Any) -> None:
    config = load_recipe(str(files_recipe))
    node, request, _ = sft_of(config, home, stages)
    artifact = stages.publish(request, home.store)
    notes = Notes()
    tracking: Any = None
    with Runs(home.store.root).open(config) as run:
        session = Session(config, home, run, tracking, notes)
        for counts in ({}, {"stability/num_skipped": 2.0, "stability/num_rewinds": 1.0}):
            session._note_interventions(node, artifact.model_copy(update={"metrics": counts}))
    assert notes.notes == [
        "train_sft: training was unstable: 2 steps were left out and it went back 1 times; "
        f"why is in {artifact.uri}/posttrain.json"
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"code": 3}', '{"step": 1}'])
def test_a_damaged_checkpoint_is_left_to_the_stage(home: Home, text: str) -> None:
    folder = home.store.work_dir("a" * 64) / "checkpoints" / "step-00000001"
    folder.mkdir(parents=True)
    (folder / "state.json").write_text(text)
    assert home.store.checkpoint_code("a" * 64) == {}


def _archive(home: Home) -> Any:
    from flows.archive import Archive

    return Archive(home, "files")


def _digests(*modules: str) -> dict[str, str]:
    from infra.code import loaded_code

    return {name: digest for name, digest in loaded_code().items() if name in modules}
