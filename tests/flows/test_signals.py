from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from mlflow import MlflowClient

from flows.runs import Runs
from infra.environment import Home

GENERATOR = """
import pathlib, signal, time

def records():
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    while not pathlib.Path("go").exists():
        time.sleep(0.1)
    yield {"prompt": "1+1=", "answer": "2"}
"""


def wait_for(what: Callable[[], bool], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline
        time.sleep(0.1)


@pytest.fixture
def started() -> Iterator[list[subprocess.Popen[str]]]:
    """Processes that do not outlive the test; what they start dies with them."""
    processes: list[subprocess.Popen[str]] = []
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.slow
def test_a_run_that_is_stopped_or_killed_goes_on(
    tracked_home: Home, files_recipe: Path, tmp_path: Path, started: list[subprocess.Popen[str]]
) -> None:
    home = tracked_home
    (tmp_path / "slow_records.py").write_text(GENERATOR)
    broken = json.dumps({"prompt": "1+2="})
    (tmp_path / "data" / "demonstrations.jsonl").write_text(broken + "\n")
    command = [
        *(sys.executable, "-c", "from flows.cli import main; main()"),
        *("run", str(files_recipe), "--home", str(home.root)),
        *("--set", "data.evaluation={generator: 'slow_records:records'}"),
    ]
    repository = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{repository}:{tmp_path}"}

    def start() -> subprocess.Popen[str]:
        process = subprocess.Popen(
            command,
            cwd=tmp_path,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        started.append(process)
        return process

    def ours(module: str) -> list[psutil.Process]:
        """Processes of a module that were started from here."""
        found = []
        for process in psutil.process_iter(["cmdline", "cwd"]):
            if module in (process.info["cmdline"] or []) and process.info["cwd"] == str(tmp_path):
                found.append(process)
        return found

    for number, code in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        process = start()
        wait_for(lambda: len(ours("stages.main")) == 1)
        assert ours("flows.local_server")
        assert not ours("uvicorn")  # Prefect's own, which would outlive a killed run
        time.sleep(0.5)
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
        assert process.returncode == code, errors
        assert "Traceback" not in errors
        wait_for(lambda: not ours("stages.main") and not ours("flows.local_server"), 30)
        (record,) = Runs(home.store.root).all()
        assert record.status == "stopped"

    (tmp_path / "go").touch()
    process = start()
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 2, errors
    assert "demonstrations.jsonl" in errors
    assert "prepare_data:evaluation: ran" in output
    (after,) = Runs(home.store.root).all()
    assert after.run == record.run
    assert after.status == "failed"
    client = MlflowClient(tracking_uri=home.mlflow_uri)
    experiment = client.get_experiment_by_name("files")
    assert experiment is not None
    found = client.search_runs([experiment.experiment_id])
    assert sum("mlflow.parentRunId" not in run.data.tags for run in found) == 1
