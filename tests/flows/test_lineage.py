from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from flows.lineage import lineage_of
from flows.pipeline import post_train
from flows.recipes import load_recipe
from infra.environment import Home
from infra.registry import Registry


def invoke(home: Home, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["lineage", *arguments, "--home", str(home.root)])


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "tracked_home")
def test_from_a_version_back_to_its_data(
    home: Home, stages: Any, files_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert invoke(home, "files").exit_code == 2
    document = post_train(load_recipe(str(files_recipe)), home=str(home.root))
    rows = {row["name"]: row["fingerprint"] for row in document["stages"]}

    # What the version's tags alone tell, without this store.
    version = Registry(home.mlflow_uri, home.locks).version("files", "1")
    tags = version.tags
    for name in ("train_sft", "prepare_data:demonstrations", "prepare_data:prompts"):
        artifact = home.store.find(rows[name])
        assert artifact is not None
        assert tags[f"posttrain.lineage.{name.replace(':', '.')}"] == artifact.sha256
    assert tags["posttrain.run"] == document["run"]
    assert tags["posttrain.recipe"] == "files"
    assert len(tags["posttrain.code"]) == len(tags["posttrain.config_digest"]) == 64
    assert "torch" in json.loads(tags["posttrain.packages"])

    for name in ("files", "files@challenger", "files/1"):
        found = lineage_of(home, name)
        assert found.version.version == "1"
        assert found.run is not None
        assert found.run.run == document["run"]
        assert found.artifacts.keys() >= {rows["train_sft"], rows["prepare_data:evaluation"]}

    monkeypatch.setattr("flows.lineage.changed_code", lambda code: ["stages/a.py"])
    shown = invoke(home, "files").stdout
    for words in (
        "files version 1 @challenger @champion",
        "decision  promoted",
        "candidate: pass@1 0.8000",
        "train_sft  content",
        "prepare_data:demonstrations  content",
        "(see above)",
        f"configuration  run {document['run']}",
        "changed since: stages/a.py",
        "packages  Python",
    ):
        assert words in shown, words
    as_json = json.loads(invoke(home, "files", "--json").stdout)
    assert as_json["decision"]["promoted"] is True
    assert {one["stage"] for one in as_json["artifacts"]} >= {"train_rl", "train_sft"}

    # The SFT policy is made again, with other bytes than those that this version came from.
    sft = home.store.find(rows["train_sft"])
    assert sft is not None
    home.store.quarantine(sft.fingerprint)
    content = home.store.work_dir(sft.fingerprint) / "content"
    content.mkdir()
    (content / "other").write_text("other")
    other = sft.model_copy(update={"sha256": home.store.seal(content)})
    home.store.publish(sft.fingerprint, other)
    shown = invoke(home, "files").stdout
    assert f"this version came from content {sft.sha256[:12]}" in shown

    # The store has lost it: the registry's tags still name what it came from.
    home.store.quarantine(version.fingerprint)
    shown = invoke(home, "files").stdout
    assert "is not in the store" in shown
    assert "prepare_data.demonstrations  content" in shown

    for wrong, words in (("files@best", "no alias best"), ("files/9", "no version 9")):
        result = invoke(home, wrong)
        assert result.exit_code == 2
        assert words in result.stderr
