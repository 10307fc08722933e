from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from flows.cli import app
from infra.environment import Home
from infra.launch import StageFailed
from schemas.base import UserError

RUN_KEYS = {
    "run",
    "recipe",
    "seed",
    "store",
    "mlflow_run_id",
    "stages",
    "evaluation",
    "reward_models",
    "decision",
}
STAGE_KEYS = {"name", "status", "seconds", "peak_memory_bytes", "fingerprint", "artifact"}
SCORE_KEYS = {"pass@1", "num_records", "kl", "length", "truncated_fraction"}
DECISION_KEYS = {
    "promoted",
    "awaiting_approval",
    "registered_model",
    "version",
    "aliases",
    "reasons",
}


def invoke(home: Home, *arguments: object) -> Result:
    return CliRunner().invoke(app, [*map(str, arguments), "--home", str(home.root)])


def posttrain(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from flows.cli import main; main()", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from flows import cli\n"
        "sys.argv = ['posttrain', '--help']\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "print([m for m in ('torch', 'prefect', 'mlflow', 'transformers') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.splitlines()[-1] == "[]"
    commands = (
        *("run", "deploy", "serve", "show", "credit", "runs", "sync", "models", "gc", "lineage"),
        *("promote", "rollback"),
    )
    for command in commands:
        assert command in done.stdout


def test_a_users_error_is_one_message_and_exit_code_2(home: Home) -> None:
    started = time.monotonic()
    done = posttrain("run", "quickstart", "--set", "sed=1", "--home", home.root)
    assert done.returncode == 2
    assert done.stderr == "error: --set: unknown field sed; did you mean seed?\n"
    assert done.stdout == ""
    assert time.monotonic() - started < 10
    assert posttrain("run", "quikstart", "--home", home.root).returncode == 2
    assert posttrain("run").returncode == 2
    assert posttrain("run", "quickstart", "--no-such-option").returncode == 2
    assert posttrain("nothing").returncode == 2


def test_a_dry_run_prints_the_plan_and_does_nothing(home: Home, files_recipe: Path) -> None:
    result = invoke(home, "run", files_recipe, "--dry-run")
    assert result.exit_code == 0, result.output
    assert "prepare_data:evaluation" in result.stdout
    assert "train_rl" in result.stdout
    assert not home.store.root.exists()
    document = json.loads(invoke(home, "run", files_recipe, "--dry-run", "--json").stdout)
    assert [stage["action"] for stage in document["plan"]] == ["run"] * len(document["plan"])


def test_a_dry_run_looks_at_the_files(home: Home, files_recipe: Path) -> None:
    result = invoke(home, "run", files_recipe, "--dry-run", "--set", "data.prompts.path=no.jsonl")
    assert result.exit_code == 2
    assert "data.prompts: " in result.stderr


def test_a_home_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    result = CliRunner().invoke(app, ["runs", "--home", str(tmp_path / "file" / "home")])
    assert result.exit_code == 2
    assert "choose another with --home" in result.stderr


def test_nothing_has_run_yet(home: Home) -> None:
    assert "Nothing has run" in invoke(home, "runs").stdout
    result = invoke(home, "show", "latest")
    assert result.exit_code == 2
    assert "nothing has run there yet" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "tracked_home")
class TestRun:
    def test_the_document_and_the_second_call(
        self, home: Home, stages: Any, files_recipe: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        arguments = ("run", files_recipe, "--set", "gate.min_improvement=0.1", "--json")
        result = invoke(home, *arguments)
        assert result.exit_code == 0, result.output
        document = json.loads(result.stdout)
        assert document.keys() == RUN_KEYS
        assert document["recipe"] == "files"
        assert document["store"] == str(home.store.root)
        for row in document["stages"]:
            assert row.keys() == STAGE_KEYS
            assert row["status"] == "ran"
            assert (home.store.root / row["artifact"]).is_dir()
        assert document["evaluation"].keys() == {"candidate", "baseline", "incumbent"}
        for scores in document["evaluation"].values():
            assert scores.keys() == SCORE_KEYS
        assert document["reward_models"] == {"outcome": None, "process": None}
        assert document["decision"].keys() == DECISION_KEYS
        assert document["decision"]["promoted"] is True
        assert document["decision"]["aliases"] == ["challenger", "champion"]
        assert "train_sft" in result.stderr

        stages.requests.clear()
        monkeypatch.setattr("flows.pipeline.post_train", None)  # Prefect is not needed
        again = invoke(home, *arguments)
        assert again.exit_code == 0, again.output
        assert stages.requests == []
        second = json.loads(again.stdout)
        assert {row["status"] for row in second["stages"]} == {"reused"}
        assert second["run"] == document["run"]
        assert second["evaluation"] == document["evaluation"]
        assert second["decision"] == document["decision"]
        assert f"all {len(second['stages'])} stages are reused" in again.stderr

        people = invoke(home, *arguments[:-1])
        for words in ("SFT baseline", "80.0%", "promoted: files version 1", "mlflow server"):
            assert words in people.stdout

    def test_the_other_commands(self, home: Home, stages: Any, files_recipe: Path) -> None:
        first = json.loads(invoke(home, "run", files_recipe, "--json").stdout)
        stages.pass_at_1 = {"candidate": 0.9, "baseline": 0.8}
        second = json.loads(invoke(home, "run", files_recipe, "--set", "seed=1", "--json").stdout)
        assert second["decision"]["version"] == "2"
        assert second["decision"]["aliases"] == ["challenger", "champion"]

        listed = json.loads(invoke(home, "runs", "--json").stdout)
        assert [line["run"] for line in listed] == [second["run"], first["run"]]
        assert first["run"] in invoke(home, "runs").stdout
        shown = json.loads(invoke(home, "show", first["run"], "--json").stdout)
        assert shown == first
        assert "@champion" in invoke(home, "models").stdout

        assert invoke(home, "rollback", "files").exit_code == 2
        back = invoke(home, "rollback", "files", "--reason", "it swears")
        assert back.exit_code == 0, back.output
        assert "version 1 is @champion again in place of version 2" in back.stdout
        # A model that was rolled back is not promoted by running its recipe again.
        rerun = json.loads(invoke(home, "run", files_recipe, "--set", "seed=1", "--json").stdout)
        assert rerun["decision"]["aliases"] == ["challenger"]
        assert "it swears" in rerun["decision"]["reasons"][-1]

        by_hand = invoke(home, "promote", "files", "challenger", "--reason", "we looked")
        assert by_hand.exit_code == 0, by_hand.output
        versions = json.loads(invoke(home, "models", "--json").stdout)
        assert [one["aliases"] for one in versions] == [["previous"], ["challenger", "champion"]]
        unknown = invoke(home, "promote", "files", "77", "--reason", "x")
        assert unknown.exit_code == 2
        assert "has no version 77" in unknown.stderr

    def test_a_decision_is_explained(self, home: Home, stages: Any, files_recipe: Path) -> None:
        run = json.loads(invoke(home, "run", files_recipe, "--json").stdout)["run"]
        found = json.loads(invoke(home, "promote", "files", "--explain", "--json").stdout)
        for target in (run, "latest", "files@champion", "files@1", "files/1"):
            again = invoke(home, "promote", target, "--explain", "--json")
            assert json.loads(again.stdout) == found, target
        assert (found["outcome"], found["aliases"]) == ("promoted", ["challenger", "champion"])
        assert found["gate"]["num_resamples"] == 2000
        (check,) = found["checks"]
        assert (check["rule"], check["passed"]) == ("min_improvement", True)
        assert check["observed"] == pytest.approx(0.3)
        assert found["candidate"]["pass_at"] == {"pass@1": 0.8}
        shown = invoke(home, "promote", "files", "--explain").stdout
        for words in (
            "files version 1 @challenger @champion: promoted",
            "min_improvement",
            "0.3000",
            "pass@1 moved by +0.30",
            "truncated_fraction",
        ):
            assert words in shown, words
        for target, words in (("nobody", "no registered model nobody"), ("files@9", "no version")):
            unknown = invoke(home, "promote", target, "--explain")
            assert unknown.exit_code == 2
            assert words in unknown.stderr

        stages.script["train_sft"] = [StageFailed("fell over", 1, None, False)]
        invoke(home, "run", files_recipe, "--set", "seed=1")
        failed = invoke(home, "promote", "latest", "--explain")
        assert failed.exit_code == 2
        assert "came to no decision: it is failed" in failed.stderr

        home.store.quarantine(found["decision"])
        lost = invoke(home, "promote", "files", "--explain")
        assert lost.exit_code == 2
        assert "does not hold the decision on model files version 1" in lost.stderr

    def test_a_run_that_waits_for_a_person(
        self, home: Home, stages: Any, files_recipe: Path
    ) -> None:
        arguments = ("run", files_recipe, "--set", "gate.approval=true")
        document = json.loads(invoke(home, *arguments, "--json").stdout)
        decision = document["decision"]
        assert (decision["promoted"], decision["awaiting_approval"]) == (False, True)
        assert decision["aliases"] == ["challenger"]
        assert "posttrain promote files@1 --approve --reason WHY" in decision["reasons"][-1]
        (line,) = json.loads(invoke(home, "runs", "--json").stdout)
        assert (line["status"], line["outcome"]) == ("finished", "awaiting approval")
        again = invoke(home, *arguments)
        assert "Nothing to do" in again.stdout
        assert "awaiting approval: files version 1 (@challenger)" in again.stdout
        assert "awaiting approval" in invoke(home, "promote", "files@1", "--explain").stdout

        missing = invoke(home, "promote", "files@1", "--approve")
        assert missing.exit_code == 2
        assert "--reason is needed" in missing.stderr
        unnamed = invoke(home, "promote", "files", "--approve", "--reason", "fine")
        assert unnamed.exit_code == 2
        assert "name a version of files: files@VERSION" in unnamed.stderr

        by = ("--by", "ada", "--reason", "read them")
        done = invoke(home, "promote", "files@1", "--approve", *by)
        assert done.exit_code == 0, done.output
        assert "files version 1: promoted @challenger @champion" in done.stdout
        stages.requests.clear()
        after = json.loads(invoke(home, *arguments, "--json").stdout)
        assert stages.requests == []
        assert after["decision"]["promoted"] is True
        assert after["decision"]["aliases"] == ["challenger", "champion"]
        assert after["decision"]["reasons"][-1] == "approved by ada: read them"
        shown = invoke(home, "promote", "files", "--explain").stdout
        assert "approved by ada at 2" in shown
        tree = invoke(home, "lineage", "files").stdout
        assert "approved by ada at 2" in tree
        rejected = invoke(home, "promote", "files@1", "--reject", "--reason", "no")
        assert rejected.exit_code == 2
        assert "not awaiting approval: approved by ada" in rejected.stderr

    def test_a_changed_model_is_refused_in_one_message(
        self, home: Home, stages: Any, files_recipe: Path
    ) -> None:
        invoke(home, "run", files_recipe)
        stages.pass_at_1 = {"candidate": 0.9, "baseline": 0.8}
        invoke(home, "run", files_recipe, "--set", "seed=1")
        for path in (home.mlflow_folder / "artifacts").rglob("made_by.json"):
            path.write_bytes(path.read_bytes()[:-1] + b"!")
        before = invoke(home, "models").stdout
        for command in (("rollback", "files"), ("promote", "files@1")):
            refused = invoke(home, *command, "--reason", "x")
            assert refused.exit_code == 1
            (message,) = refused.stderr.splitlines()
            assert message.startswith("error: model files version 1 is not the content")
        assert invoke(home, "models").stdout == before

    def test_failures_and_users_errors(self, home: Home, stages: Any, files_recipe: Path) -> None:
        stages.script["train_sft"] = [StageFailed("train_sft fell over", 1, None, False)]
        result = invoke(home, "run", files_recipe)
        assert result.exit_code == 1
        assert "error: train_sft fell over" in result.stderr
        assert "run the same command again to go on" in result.stderr
        stages.script["train_sft"] = [UserError("records 1: mend it")]
        result = invoke(home, "run", files_recipe)
        assert result.exit_code == 2
        assert result.stderr.endswith("error: records 1: mend it\n")
        (line,) = json.loads(invoke(home, "runs", "--json").stdout)
        assert (line["status"], line["outcome"]) == ("failed", "records 1: mend it")

        stages.script["train_sft"] = [KeyboardInterrupt()]
        assert invoke(home, "run", files_recipe).exit_code == 130
        (line,) = json.loads(invoke(home, "runs", "--json").stdout)
        assert line["status"] == "stopped"

        document = json.loads(invoke(home, "run", files_recipe, "--json").stdout)
        assert document["run"] == line["run"]
        reused = [row["name"] for row in document["stages"] if row["status"] == "reused"]
        assert reused == ["prepare_data:evaluation", "prepare_data:demonstrations",
                          "prepare_data:prompts"]  # fmt: skip
