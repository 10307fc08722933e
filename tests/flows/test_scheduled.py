"""What a schedule starts reads the data of the day, and ends at once where nothing is new."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flows.recipes import load_recipe
from flows.runs import Runs
from flows.scheduled import scheduled
from infra.environment import Home

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server", "tracked_home")]


def test_new_data_is_learned_from_and_old_data_ends_the_run(
    home: Home, stages: Any, files_recipe: Path, tmp_path: Path
) -> None:
    config = load_recipe(str(files_recipe))

    def night() -> tuple[str, str, list[str]]:
        """Name and message of the final state, and the stages that were started."""
        stages.requests.clear()
        state = scheduled(config, str(home.root), return_state=True)
        return state.name, state.message or "", list(stages.names)

    name, _, started = night()
    assert (name, started[-1]) == ("Completed", "evaluate")
    (first,) = Runs(home.store.root).all()

    name, message, started = night()
    assert (name, started) == ("NothingNew", [])
    assert message == f"nothing new: every stage is reused from {first.run} (promoted)"
    assert len(Runs(home.store.root).all()) == 1

    with (tmp_path / "data" / "demonstrations.jsonl").open("a") as file:
        file.write(json.dumps({"prompt": "2+3=", "completion": "5"}) + "\n")
    name, _, started = night()
    assert name == "Completed"
    assert started[:2] == ["prepare_data:demonstrations", "train_sft"]
    second, _ = Runs(home.store.root).all()
    before = {row.name: row.fingerprint for row in first.stages}
    after = {row.name: row.fingerprint for row in second.stages}
    assert after["prepare_data:evaluation"] == before["prepare_data:evaluation"]
    for changed in ("prepare_data:demonstrations", "train_sft", "train_rl", "evaluate"):
        assert after[changed] != before[changed], changed
