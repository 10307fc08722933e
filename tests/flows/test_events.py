from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.pipeline import post_train
from flows.recipes import load_recipe
from infra.environment import Home
from infra.launch import StageFailed

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server", "tracked_home")]


@pytest.fixture
def emitted(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    found: list[tuple[str, dict[str, str], dict[str, Any]]] = []

    def record(event: str, resource: dict[str, str], *, related: Any, payload: Any) -> None:
        assert related[0]["prefect.resource.id"].startswith("posttrain.run.")
        found.append((event, resource, payload))

    monkeypatch.setattr("flows.events.emit_event", record)
    return found


def test_decisions_are_told_once_and_shown(
    home: Home, stages: Any, files_recipe: Path, emitted: list[Any]
) -> None:
    config = load_recipe(str(files_recipe))
    document = post_train(config, home=str(home.root))
    ((event, resource, payload),) = emitted
    assert event == "posttrain.model.promoted"
    assert resource["prefect.resource.id"] == "posttrain.model.files"
    assert payload["run"] == document["run"]
    assert payload["version"] == "1"
    emitted.clear()
    post_train(config, home=str(home.root))
    assert emitted == []  # reused: nothing was decided

    stages.pass_at_1 = {"candidate": 0.6, "baseline": 0.7}
    other = post_train(config.model_copy(update={"seed": 1}), home=str(home.root))
    assert [event for event, *_ in emitted] == ["posttrain.model.refused"]
    with get_client(sync_client=True) as client:
        pages = [str(one.data) for one in client.read_artifacts() if one.key == "posttrain-files"]
    (refused,) = (page for page in pages if other["run"] in page)
    assert refused.startswith("# files version 2: refused")
    assert "| min_improvement | **no** | -0.1000 | 0.0000 |" in refused
    assert "MLflow run `" in refused


def test_a_decision_that_waits_is_told(
    home: Home, stages: Any, files_recipe: Path, emitted: list[Any]
) -> None:
    config = load_recipe(str(files_recipe), ["gate.approval=true", "name=waits"])
    post_train(config, home=str(home.root))
    assert [event for event, *_ in emitted] == ["posttrain.model.awaiting_approval"]
    with get_client(sync_client=True) as client:
        (page,) = [str(one.data) for one in client.read_artifacts() if one.key == "posttrain-waits"]
    assert page.startswith("# files version 1: awaiting approval")


def test_a_stage_is_told_when_it_is_given_up(
    home: Home, stages: Any, files_recipe: Path, emitted: list[Any]
) -> None:
    config = load_recipe(str(files_recipe), ["compute.retries=1"])
    stages.script["train_sft"] = [StageFailed("killed", None, 9, True)]
    stages.script["train_rl"] = [StageFailed("broke", 1, None, False)]
    with pytest.raises(StageFailed, match="broke"):
        post_train(config, home=str(home.root))
    ((event, resource, payload),) = emitted
    assert event == "posttrain.stage.failed"
    assert resource["stage"] == payload["stage"] == "train_rl"
    assert payload["error"] == "broke"
