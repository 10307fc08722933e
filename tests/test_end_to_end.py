"""The command as a user types it: real Prefect, real MLflow, real processes, and a kill -9."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
RECIPE = ROOT / "tests" / "recipes" / "tiny.yaml"
KEYS = {
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


def command(home: Path, *more: str) -> list[str]:
    return [
        str(Path(sys.executable).parent / "posttrain"),
        "run",
        str(RECIPE),
        "--home",
        str(home),
        "--json",
        *more,
    ]


def run(home: Path, *more: str) -> dict[str, Any]:
    done = subprocess.run(command(home, *more), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def stage(document: dict[str, Any], name: str) -> dict[str, Any]:
    return next(row for row in document["stages"] if row["name"] == name)


def content(document: dict[str, Any], name: str) -> str:
    """Digest of a stage's content."""
    row = stage(document, name)
    artifact = Path(document["store"], "artifacts", row["fingerprint"], "artifact.json")
    digest: str = json.loads(artifact.read_text())["sha256"]
    return digest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    home = tmp_path_factory.mktemp("whole")
    return home, run(home)


def test_the_document_and_the_registered_model(whole: tuple[Path, dict[str, Any]]) -> None:
    home, document = whole
    assert document.keys() == KEYS
    assert {row["status"] for row in document["stages"]} == {"ran"}
    assert all(row["seconds"] >= 0 for row in document["stages"])
    for name in ("candidate", "baseline", "incumbent"):
        scores = document["evaluation"][name]
        assert scores.keys() == {"pass@1", "num_records", "kl", "length", "truncated_fraction"}
        assert scores["num_records"] == 12
    assert document["reward_models"]["outcome"].keys() == {"accuracy"}
    assert document["reward_models"]["process"].keys() == {"step_accuracy", "first_error_f1"}
    decision = document["decision"]
    assert decision["version"] == "1"
    assert "challenger" in decision["aliases"]
    assert decision["promoted"] == ("champion" in decision["aliases"])
    assert decision["reasons"]
    _opens_from_the_registry(home, decision["promoted"])


def _opens_from_the_registry(home: Path, promoted: bool) -> None:
    alias = "champion" if promoted else "challenger"
    script = (
        "import mlflow, transformers\n"
        f"mlflow.set_tracking_uri('sqlite:///{home}/mlflow/mlflow.db')\n"
        f"folder = mlflow.artifacts.download_artifacts('models:/tiny@{alias}')\n"
        "model = transformers.AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = transformers.AutoTokenizer.from_pretrained(folder)\n"
        "assert model.config.hidden_size == 32 and tokenizer('1').input_ids\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_second_call_reuses_everything(whole: tuple[Path, dict[str, Any]]) -> None:
    home, first = whole
    started = time.monotonic()
    second = run(home)
    assert {row["status"] for row in second["stages"]} == {"reused"}
    assert second["mlflow_run_id"] == first["mlflow_run_id"]
    assert second["decision"] == first["decision"]
    assert time.monotonic() - started < 60  # a bound against starting the servers again


def test_another_algorithm_reuses_what_comes_before_it(whole: tuple[Path, dict[str, Any]]) -> None:
    home, first = whole
    other = run(home, "--set", "rl.algorithm=dpo")
    for name in ("train_sft", "train_reward_model", "train_process_reward_model"):
        assert stage(other, name)["status"] == "reused"
        assert stage(other, name)["fingerprint"] == stage(first, name)["fingerprint"]
    assert stage(other, "train_rl")["status"] == "ran"
    assert other["decision"]["version"] == "2"


def test_killed_in_the_middle_it_goes_on_to_the_same_bits(
    whole: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    _, expected = whole
    process = subprocess.Popen(
        command(tmp_path), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    child = _wait_for_checkpoint(tmp_path, stage(expected, "train_rl")["fingerprint"], process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 30
    while child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, "the stage outlived the flow that started it"
        time.sleep(0.1)
    document = run(tmp_path)
    assert stage(document, "train_sft")["status"] == "reused"
    assert stage(document, "train_rl")["status"] == "resumed"
    for name in ("train_sft", "train_rl", "evaluate"):
        assert content(document, name) == content(expected, name), name
    assert document["evaluation"] == expected["evaluation"]
    assert document["decision"] == expected["decision"]
    _one_run_only(tmp_path)


def _wait_for_checkpoint(
    home: Path, fingerprint: str, process: subprocess.Popen[bytes]
) -> psutil.Process:
    """Wait until the RL stage has written a checkpoint; returns the stage's process."""
    checkpoints = home / "store" / "work" / fingerprint / "checkpoints"
    deadline = time.monotonic() + 400
    while not list(checkpoints.glob("step-*")):
        assert process.poll() is None, "the run ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    children = psutil.Process(process.pid).children(recursive=True)
    return next(c for c in children if "stages.main" in c.cmdline())


def _one_run_only(home: Path) -> None:
    script = (
        "from mlflow import MlflowClient\n"
        f"client = MlflowClient('sqlite:///{home}/mlflow/mlflow.db')\n"
        "ids = [e.experiment_id for e in client.search_experiments()]\n"
        "runs = client.search_runs(ids)\n"
        "names = sorted(run.info.run_name for run in runs)\n"
        "assert len(names) == len(set(names)), names\n"
        "assert len([r for r in runs if 'mlflow.parentRunId' not in r.data.tags]) == 1, names\n"
        "assert len(client.search_model_versions(\"name='tiny'\")) == 1\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env={**os.environ}
    )
    assert done.returncode == 0, done.stderr[-2000:]
