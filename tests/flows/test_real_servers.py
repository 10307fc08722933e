"""Whole runs of the tiny recipe on real servers that are restarted, and on PostgreSQL."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from infra.environment import Home
from infra.mlflow_tracking import Tracking
from infra.registry import Registry
from tests.servers import (
    MAIN,
    MlflowServer,
    Postgres,
    PrefectServer,
    command,
    postgres_programs,
    wait_for,
)

pytestmark = [pytest.mark.slow, pytest.mark.servers]

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
SMALL = [
    *("sft.num_epochs=2", "rl.online.num_steps=6"),
    *("data.demonstrations.arguments.count=128", "data.prompts.arguments.count=32"),
]


def arguments(home: Home) -> list[str]:
    sets = [part for one in SMALL for part in ("--set", one)]
    return ["run", str(RECIPE), "--home", str(home.root), "--json", *sets]


def test_a_prefect_server_that_is_killed_and_restarted_in_mid_run(
    home: Home, tmp_path: Path, real_prefect: PrefectServer
) -> None:
    before = {run["id"] for run in real_prefect.ask("flow_runs/filter")}
    process = subprocess.Popen(
        [sys.executable, *MAIN, *arguments(home)],
        cwd=tmp_path,
        env=real_prefect.environment(home),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = tmp_path / "nothing.log"
    log.touch()
    # While a stage works, and so that the next stages begin without a server.
    wait_for(lambda: list(home.store.root.glob("work/*/request.json")), 200, log)
    real_prefect.kill()
    done = len(list(home.store.root.glob("artifacts/*")))
    time.sleep(20)
    assert process.poll() is None, process.communicate()
    real_prefect.start()
    output, errors = process.communicate(timeout=400)
    assert process.returncode == 0, errors[-4000:]
    document = json.loads(output)
    assert len(document["stages"]) > done
    assert {row["status"] for row in document["stages"]} == {"ran"}
    (run,) = (one for one in real_prefect.ask("flow_runs/filter") if one["id"] not in before)
    assert run["state_type"] == "COMPLETED"


@pytest.fixture
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Postgres]:
    if postgres_programs() is None:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    server = Postgres(tmp_path_factory.mktemp("postgres"))
    yield server
    server.end()


def test_a_run_with_postgresql_behind_both_servers(
    home: Home, tmp_path: Path, postgres: Postgres
) -> None:
    for name in ("mlflow", "prefect"):
        (tmp_path / name).mkdir()
    mlflow = MlflowServer(tmp_path / "mlflow", postgres.url("psycopg2", "mlflow"))
    try:
        prefect = PrefectServer(tmp_path / "prefect", postgres.url("asyncpg", "prefect"))
        try:
            environment = {**prefect.environment(home), "MLFLOW_TRACKING_URI": mlflow.uri}
            done = command(*arguments(home), cwd=tmp_path, env=environment)
            assert done.returncode == 0, done.stderr[-4000:]
            document = json.loads(done.stdout)
            again = command(*arguments(home), cwd=tmp_path, env=environment)
            (run,) = prefect.ask("flow_runs/filter")
            tasks = prefect.ask("task_runs/filter", flow_runs={"id": {"any_": [run["id"]]}})
            check_mlflow(mlflow, document, tmp_path)
        finally:
            prefect.process.end()
    finally:
        mlflow.process.end()
    assert run["state_type"] == "COMPLETED"
    assert len(tasks) == len(document["stages"])
    assert "Nothing to do" in again.stderr
    assert tables(postgres, "mlflow") > 20
    assert tables(postgres, "prefect") > 20
    assert not list(home.mlflow_folder.glob("*.db"))


def check_mlflow(mlflow: MlflowServer, document: dict[str, Any], folder: Path) -> None:
    """The tracking server has the runs, and the registry the model, under its aliases."""
    client = Tracking(mlflow.uri).client
    experiment = client.get_experiment_by_name("tiny")
    runs = client.search_runs([experiment.experiment_id])
    assert len(runs) == 1 + len(document["stages"])
    (sft,) = (run for run in runs if run.info.run_name == "train_sft")
    history = client.get_metric_history(sft.info.run_id, "loss")
    steps = [one.step for one in history]
    assert steps == sorted(set(steps)) or steps[:-1] == sorted(set(steps[:-1]))
    (version,) = Registry(mlflow.uri, folder / "locks").list_models()
    assert version.version == document["decision"]["version"] == "1"
    assert sorted(version.aliases) == sorted(document["decision"]["aliases"])


def tables(postgres: Postgres, database: str) -> int:
    """Tables that a server has made in its database."""
    query = "select count(*) from information_schema.tables where table_schema = 'public'"
    done = subprocess.run(
        [
            *("psql", "-h", "127.0.0.1", "-p", str(postgres.port), "-U", "posttrain"),
            *("-d", database, "-t", "-A", "-c", query),
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)
