"""The services of the compose file at work: the databases, the health checks, and a night's run."""

from __future__ import annotations

import base64
import json
import secrets
import shutil
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import boto3
import psycopg2
import pytest
import yaml

from tests.infra.compose_processes import ComposeProcesses, postgres_programs
from tests.infra.deployment_files import (
    GPU_TEMPLATE,
    REPOSITORY,
    containers,
    gpu_template,
    manifests,
    pods,
    secret_names,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(postgres_programs() is None, reason="needs PostgreSQL's server programs"),
    pytest.mark.skipif(shutil.which("wget") is None, reason="needs wget"),
]
CHECKED = ("postgres", "object-store", "mlflow", "prefect", "worker")
VARIABLES = {name: f"{secrets.token_hex(6)}:p@ss/%{name[0]}" for name in secret_names()}
"""Passwords with every character that breaks an address which a password is pasted into."""
VARIABLES["OBJECT_STORE_ACCESS_KEY"] = secrets.token_hex(8)  # a name, which S3 writes before a `/`


class Stack(ComposeProcesses):
    """All services, and what their health checks said before each of them was started."""

    healthy_before: dict[str, bool]
    tonight: str
    """Prefect's name for the run of two o'clock, which is brought forward."""

    def ask(
        self, path: str, *, credentials: str | None = VARIABLES["PREFECT_AUTH"], **query: Any
    ) -> Any:
        """The answer of Prefect's API."""
        headers = {"content-type": "application/json"}
        if credentials:
            headers["authorization"] = f"Basic {base64.b64encode(credentials.encode()).decode()}"
        return fetch(f"{self.url('prefect')}/api/{path}", headers, json.dumps(query).encode())

    def database(self, name: str, user: str, password: str) -> Any:
        return psycopg2.connect(
            host="127.0.0.1", port=self.ports["postgres"], dbname=name, user=user, password=password
        )


def fetch(url: str, headers: dict[str, str], body: bytes | None = None) -> Any:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    request = urllib.request.Request(url, data=body, headers=headers)
    with opener.open(request, timeout=30) as response:
        text = response.read()
    return json.loads(text)


def bring_forward(stack: Stack) -> str:
    """Let the first run that the schedule has planned begin now; its id."""
    deadline = time.monotonic() + 60
    while not (planned := stack.ask("flow_runs/filter", sort="EXPECTED_START_TIME_ASC")):
        assert time.monotonic() < deadline, stack.log("prefect")
        time.sleep(0.5)
    assert all(one["auto_scheduled"] for one in planned)
    assert {one["expected_start_time"][11:19] for one in planned} == {"02:00:00"}
    now = {"scheduled_time": datetime.now(UTC).isoformat()}
    state = {"type": "SCHEDULED", "name": "Scheduled", "state_details": now}
    stack.ask(f"flow_runs/{planned[0]['id']}/set_state", state=state, force=True)
    return str(planned[0]["id"])


def recipe() -> dict[str, Any]:
    """The tests' tiny recipe with a verifier as its only reward, and less of everything."""
    content: dict[str, Any] = yaml.safe_load(
        (REPOSITORY / "tests" / "recipes" / "tiny.yaml").read_text()
    )
    del content["reward"]["process"]
    for name in ("reward_model", "process_reward_model"):
        del content[name]
    for name in ("preferences", "preferences_held_out", "step_labels", "step_labels_held_out"):
        del content["data"][name]
    content["sft"]["num_epochs"] = 1.0
    content["rl"]["online"]["num_steps"] = 2
    # The recipe's gate judges the process reward too, which is left out here.
    content["gate"] = {"confidence": 0.9}
    return content


@pytest.fixture(scope="module")
def stack() -> Iterator[Stack]:
    # Not pytest's folder, which only its owner may enter: PostgreSQL runs as somebody else.
    folder = Path(tempfile.mkdtemp(prefix="posttrain-compose-"))
    folder.chmod(0o755)
    project = folder / "project"
    project.mkdir()
    (project / "night.yaml").write_text(yaml.safe_dump(recipe()))
    stack = Stack(
        folder,
        {
            **VARIABLES,
            "POSTTRAIN_PROJECT": str(project),
            "POSTTRAIN_RECIPE": "night.yaml",
        },
    )
    stack.healthy_before = {}
    try:
        # The order of `depends_on`, each as soon as its conditions hold.
        for service in stack.services:
            if service in CHECKED:
                stack.healthy_before[service] = stack.healthy(service)
            stack.start(service)
        stack.wait_until_healthy("worker")
        stack.tonight = bring_forward(stack)  # it works while the other tests look around
        yield stack
    finally:
        stack.stop_all()
        shutil.rmtree(folder)


@pytest.mark.parametrize("service", CHECKED)
def test_a_health_check_knows_a_service_that_is_there(stack: Stack, service: str) -> None:
    assert stack.healthy_before[service] is False
    assert stack.healthy(service) is True


def test_each_server_has_a_database_of_its_own(stack: Stack) -> None:
    tables = {"prefect": "flow_run", "mlflow": "registered_models"}
    for name, table in tables.items():
        password = VARIABLES[f"{name.upper()}_DATABASE_PASSWORD"]
        with stack.database(name, name, password) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT tableowner FROM pg_tables WHERE tablename = %s", (table,))
            assert cursor.fetchall() == [(name,)]
        with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
            stack.database(name, name, "guessed")
        (other,) = tables.keys() - {name}
        with pytest.raises(psycopg2.OperationalError, match="permission denied for database"):
            stack.database(other, name, password)


def test_prefect_asks_who_is_there(stack: Stack) -> None:
    for credentials in (None, "admin:admin"):
        with pytest.raises(urllib.error.HTTPError, match="401"):
            stack.ask("flows/filter", credentials=credentials)
    (flow,) = stack.ask("flows/filter")
    assert flow["name"] == "posttrain"


def test_mlflow_answers_to_its_names_only(stack: Stack) -> None:
    url = f"{stack.url('mlflow')}/api/2.0/mlflow/experiments/search?max_results=1"
    for name in ("mlflow:5000", f"127.0.0.1:{stack.ports['mlflow']}"):
        assert fetch(url, {"host": name})["experiments"]
    with pytest.raises(urllib.error.HTTPError, match="403"):
        fetch(url, {"host": "evil.example"})


def test_mlflow_answers_a_probe_by_the_address_of_its_pod(stack: Stack) -> None:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
        urllib.request.Request(f"{stack.url('mlflow')}/health", headers={"host": "10.1.2.3:5000"})
    ) as response:
        assert response.read() == b"OK"


def test_mlflow_starts_no_job_runner(stack: Stack) -> None:
    family = [" ".join(one.cmdline()) for one in stack.processes_of("mlflow")]
    assert 1 <= len(family) <= 5
    assert not [one for one in family if "huey" in one or "mlflow.server.jobs" in one]


def test_the_bucket_is_made_once(stack: Stack) -> None:
    stack.start("create-bucket")
    assert stack.processes["create-bucket"].wait(timeout=60) == 0


def test_the_gpu_pool_takes_its_template(stack: Stack) -> None:
    """The command of the Kubernetes worker's first container, against this server."""
    (worker,) = (pod for name, pod in pods(manifests()) if name == "worker")
    (container,) = (one for one in containers(worker) if one["name"] == "pool")
    option = "--base-job-template="
    command = [
        f"{option}{GPU_TEMPLATE}" if one.startswith(option) else one for one in container["command"]
    ]
    for _ in range(2):  # again: the same pool
        done = subprocess.run(
            command, env=stack.environment("worker"), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    (pool,) = stack.ask("work_pools/filter", work_pools={"name": {"any_": ["gpu"]}})
    assert pool["type"] == "kubernetes"
    assert pool["base_job_template"] == gpu_template()


def test_a_scheduled_run_ends_in_the_registry(stack: Stack) -> None:
    deadline = time.monotonic() + 240
    ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

    def run() -> Any:
        (found,) = stack.ask("flow_runs/filter", flow_runs={"id": {"any_": [stack.tonight]}})
        return found

    while (found := run())["state_type"] not in ended:
        assert time.monotonic() < deadline, stack.log("worker")
        time.sleep(1)
    assert found["state_type"] == "COMPLETED", stack.log("worker")

    # The store on the volume, the models in MLflow, their files in the object store.
    assert list((stack.folder / "volumes" / "posttrain" / "home" / "store" / "artifacts").iterdir())
    models = fetch(f"{stack.url('mlflow')}/api/2.0/mlflow/registered-models/search", {})
    assert [one["name"] for one in models["registered_models"]] == ["tiny"]
    client = boto3.client(
        "s3",
        endpoint_url=stack.url("object-store"),
        region_name="us-east-1",
        aws_access_key_id=VARIABLES["OBJECT_STORE_ACCESS_KEY"],
        aws_secret_access_key=VARIABLES["OBJECT_STORE_SECRET_KEY"],
    )
    files = [one["Key"] for one in client.list_objects_v2(Bucket="mlflow")["Contents"]]
    assert [one for one in files if one.endswith("model.safetensors")]
    # The project is mounted read-only.
    assert [one.name for one in (stack.folder / "project").iterdir()] == ["night.yaml"]


def test_no_secret_reaches_a_log(stack: Stack) -> None:
    for service in stack.processes:
        log = stack.log(service)
        assert not [name for name, value in VARIABLES.items() if value in log], service


def test_a_database_that_is_away_is_noticed(stack: Stack) -> None:
    """Last, for it ends the stack: the check of Prefect fails, the server itself lives on."""
    stack.stop("worker")
    stack.stop("postgres")
    assert not stack.healthy("postgres")
    assert not stack.healthy("prefect")
    url = f"{stack.url('prefect')}/api/health"
    assert fetch(url, {}) is True
    stack.stop("mlflow")
    assert not stack.healthy("mlflow")
