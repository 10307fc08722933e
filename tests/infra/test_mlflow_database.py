"""A local database is made whole or not at all, by one process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest
from mlflow import MlflowClient

from infra.environment import Home
from infra.mlflow_database import make_database

pytestmark = pytest.mark.slow

OPEN = (
    "import sys; from infra.environment import quiet_environment;"
    "from infra.mlflow_database import make_database; make_database(sys.argv[1])"
)


def opened(uri: str) -> MlflowClient:
    make_database(uri)
    return MlflowClient(tracking_uri=uri, registry_uri=uri)


def opening(uri: str) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", OPEN, uri], stderr=subprocess.PIPE)


@pytest.mark.usefixtures("home")
def test_two_processes_at_once(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    processes = [opening(uri) for _ in range(2)]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
    (experiment,) = opened(uri).search_experiments()
    assert experiment.artifact_location.startswith((tmp_path / "artifacts").as_uri())


@pytest.mark.parametrize("size", [1, 100_000])
def test_a_kill_while_the_tables_are_made(tmp_path: Path, home: Home, size: int) -> None:
    assert home  # MLflow kept quiet
    path = tmp_path / "mlflow.db"
    process = opening(f"sqlite:///{path}")
    deadline = time.monotonic() + 300
    while not any(left.stat().st_size >= size for left in tmp_path.glob(".mlflow.db.*[0-9]")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.001)
    process.kill()
    process.communicate()
    assert not path.exists()
    assert opened(f"sqlite:///{path}").search_experiments()
    assert {left.name for left in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
