from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Pending
from typer.testing import CliRunner

from flows.archive import Archive
from flows.cli import app
from flows.deploy import build_deployment, deploy
from flows.local_server import _free_port
from flows.pipeline import post_train
from flows.recipes import load_recipe
from flows.runs import Runs
from infra.environment import Home, quiet_environment
from schemas.base import UserError

REPOSITORY = Path(__file__).parents[2]
ENDED = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
GENERATOR = """
import os, pathlib, signal

def records():
    mark = pathlib.Path("killed_once")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield {"prompt": "1+1=", "answer": "2"}
"""


def test_a_deployment_runs_once_at_a_time_and_its_form_is_described(
    home: Home, files_recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_recipe(str(files_recipe), ["data.root=data"])
    made = build_deployment(config, home, name="nightly", cron="0 2 * * *", timezone="Asia/Tokyo")
    assert made.full_name == "posttrain/nightly"
    assert made.entrypoint == "flows.scheduled.scheduled"
    assert made.concurrency_limit == 1
    assert made.concurrency_options is not None
    assert made.concurrency_options.collision_strategy.value == "CANCEL_NEW"
    assert made.schedules is not None
    schedule: Any = made.schedules[0].schedule
    assert (schedule.cron, schedule.timezone) == ("0 2 * * *", "Asia/Tokyo")
    assert made.parameters["config"]["data"]["root"] == str(tmp_path / "data")
    assert made.parameters["home"] == str(home.root)
    form = made._parameter_openapi_schema.model_dump()
    assert form["properties"]["config"]["description"].startswith("The recipe")
    for section in ("PipelineConfig", "GRPOConfig", "ComputeConfig"):
        for name, field in form["definitions"][section]["properties"].items():
            # A section is described where it is defined.
            assert "$ref" in field or field["description"], f"{section}.{name}"


@pytest.mark.parametrize(("cron", "zone"), [("0 99 * * *", None), ("0 2 * * *", "Nowhere/X")])
def test_a_bad_schedule(home: Home, files_recipe: Path, cron: str, zone: str | None) -> None:
    config = load_recipe(str(files_recipe))
    with pytest.raises(UserError, match="is no schedule: Invalid"):
        build_deployment(config, home, name="x", cron=cron, timezone=zone)


def test_without_a_server_the_remedy_is_told(
    home: Home, files_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{_free_port()}/api")
    arguments = ["--cron", "0 2 * * *", "--home", str(home.root)]
    for command in (["deploy", "--work-pool", "night"], ["serve"]):
        result = CliRunner().invoke(app, [command[0], str(files_recipe), *command[1:], *arguments])
        assert result.exit_code == 2
        assert "prefect server start" in result.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_a_run_that_meets_another_is_dropped(home: Home, files_recipe: Path) -> None:
    config = load_recipe(str(files_recipe))
    made = build_deployment(config, home, name="alone", cron="0 2 * * *", timezone=None)
    deploy(made, "alone")
    deploy(made, "alone")  # again: the same deployment
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(made.full_name)
        assert [schedule.active for schedule in deployment.schedules] == [True]
        states = []
        for _ in range(2):
            run = client.create_flow_run_from_deployment(deployment.id)
            client.set_flow_run_state(run.id, Pending())
            states.append(client.read_flow_run(run.id).state_type)
    assert states == [StateType.PENDING, StateType.CANCELLED]


class Server:
    """A real Prefect server, asked over HTTP."""

    def __init__(self, url: str, environment: dict[str, str]) -> None:
        self.url = url
        self.environment = environment

    def ask(self, path: str, **query: Any) -> Any:
        request = urllib.request.Request(
            f"{self.url}/{path}",
            data=json.dumps(query).encode(),
            headers={"content-type": "application/json"},
        )
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(request, timeout=30) as response:
            return json.load(response)

    def run(self, *command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=120,
        )

    def flow_runs(self, deployment: str) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.ask(
            "flow_runs/filter",
            deployments={"name": {"any_": [deployment]}},
            sort="EXPECTED_START_TIME_ASC",
        )
        return found


def wait_for(what: Callable[[], Any], seconds: float, log: Path) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.5)
    return found


@pytest.fixture
def server(home: Home, tmp_path: Path) -> Iterator[Server]:
    port = _free_port()
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("PREFECT_")},
        **quiet_environment(home),
        "PREFECT_API_URL": url,
        "PYTHONPATH": f"{REPOSITORY}:{tmp_path}",
    }
    log = tmp_path / "server.log"
    command = ["-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, *command, "--no-ui"],
            env={**environment, "PREFECT_API_URL": ""},
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    found = Server(url, environment)
    try:
        wait_for(lambda: _answers(found), 120, log)
        yield found
    finally:
        _end(process)


def _answers(server: Server) -> bool:
    try:
        return isinstance(server.ask("flow_runs/filter"), list)
    except OSError:
        return False


def _end(process: subprocess.Popen[bytes]) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(timeout=20)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server", "tracked_home")
def test_a_schedule_fires_on_a_process_worker(
    home: Home, stages: Any, files_recipe: Path, tmp_path: Path, server: Server
) -> None:
    # What "done" does has been done before; "broken" is killed once, then meets a bad record.
    first = post_train(load_recipe(str(files_recipe)), home=str(home.root))
    (tmp_path / "flaky_records.py").write_text(GENERATOR)
    (tmp_path / "data" / "broken.jsonl").write_text('{"prompt": "1+2="}\n')
    shared = ["--cron", "* * * * *", "--work-pool", "night", "--home", str(home.root)]
    broken = [
        *("--set", "data.evaluation={generator: 'flaky_records:records'}"),
        *("--set", "data.demonstrations.path=broken.jsonl"),
    ]
    main = ["-c", "from flows.cli import main; main()", "deploy", str(files_recipe)]
    for name, more in (("done", []), ("broken", broken)):
        deployed = server.run(*main, *shared, "--name", name, *more, cwd=tmp_path)
        assert deployed.returncode == 0, deployed.stderr
        assert f"posttrain/{name} runs at * * * * *" in deployed.stdout

    log = tmp_path / "worker.log"
    command = ["-m", "prefect", "worker", "start", "--pool", "night", "--type", "process"]
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=server.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        scheduled = wait_for(lambda: server.flow_runs("done"), 60, log)
        assert scheduled[0]["auto_scheduled"] is True
        ended = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")

        def first_ended(name: str) -> dict[str, Any] | None:
            runs = [run for run in server.flow_runs(name) if run["state_type"] in ended]
            return runs[0] if runs else None

        nothing_new = wait_for(lambda: first_ended("done"), 180, log)
        failed = wait_for(lambda: first_ended("broken"), 180, log)
    finally:
        _end(worker)

    assert nothing_new["state_name"] == "NothingNew", nothing_new["state"]["message"]
    assert f"reused from {first['run']} (promoted)" in nothing_new["state"]["message"]
    assert failed["state_type"] == "FAILED", failed["state"]["message"]
    tasks = server.ask("task_runs/filter", flow_runs={"id": {"any_": [failed["id"]]}})
    counts = {task["name"]: (task["state_type"], task["run_count"]) for task in tasks}
    assert counts["prepare_data:evaluation"] == ("COMPLETED", 2)
    assert counts["prepare_data:demonstrations"] == ("FAILED", 1)
    record = next(one for one in Runs(home.store.root).all() if one.run != first["run"])
    assert record.status == "failed"

    def events() -> list[dict[str, Any]]:
        ours = {"event": {"prefix": ["posttrain."]}}
        found = server.ask("events/filter", filter=ours)["events"]
        return [one for one in found if one["payload"]["run"] == record.run]

    (event,) = wait_for(events, 60, tmp_path / "server.log")  # the server writes them in batches
    assert event["event"] == "posttrain.stage.failed"
    assert event["payload"]["stage"] == "prepare_data:demonstrations"
    related = {one["prefect.resource.id"] for one in event["related"]}
    assert f"prefect.flow-run.{failed['id']}" in related
    assert f"posttrain.run.{record.run}" in related

    paused = server.run(*main, "--name", "done", "--pause", "--home", str(home.root), cwd=tmp_path)
    assert "posttrain/done is paused" in paused.stdout, paused.stderr


@pytest.mark.slow
@pytest.mark.usefixtures("tracked_home")
def test_a_run_is_suspended_until_somebody_approves(
    home: Home, walk: Callable[[Any], Any], files_recipe: Path, tmp_path: Path, server: Server
) -> None:
    config = load_recipe(str(files_recipe), ["gate.approval=true"])
    walk(config)  # everything but the promotion has been done before
    main = ["-c", "from flows.cli import main; main()", "deploy", str(files_recipe)]
    shared = ["--set", "gate.approval=true", "--cron", "0 2 1 1 *", "--home", str(home.root)]
    deployed = server.run(*main, *shared, "--work-pool", "day", "--name", "asks", cwd=tmp_path)
    assert deployed.returncode == 0, deployed.stderr
    (deployment,) = server.ask("deployments/filter", deployments={"name": {"any_": ["asks"]}})

    def start() -> str:
        run = server.ask(f"deployments/{deployment['id']}/create_flow_run", state=None)
        return str(run["id"])

    def state(run: str) -> dict[str, Any]:
        (found,) = server.ask("flow_runs/filter", flow_runs={"id": {"any_": [run]}})
        return dict(found["state"])

    log = tmp_path / "worker.log"
    command = ["-m", "prefect", "worker", "start", "--pool", "day", "--type", "process"]
    with log.open("wb") as output:
        worker = subprocess.Popen(
            [sys.executable, *command],
            cwd=tmp_path,
            env=server.environment,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:
        first = start()
        wait_for(lambda: state(first)["type"] in ("PAUSED", "FAILED", "CRASHED"), 180, log)
        assert (state(first)["type"], state(first)["name"]) == ("PAUSED", "Suspended"), state(first)
        registry = Archive(home, "files").registry
        version = registry.version("files", "1")
        assert version.aliases == ("challenger",)
        # Its process has ended: the worker waits for nothing.
        wait_for(lambda: not _flow_processes(worker.pid), 60, log)

        # It holds no slot: another run of the deployment starts, and finds nothing new to do.
        second = start()
        wait_for(lambda: state(second)["type"] in ENDED, 180, log)
        assert state(second)["name"] == "NothingNew"
        assert "(awaiting approval)" in state(second)["message"]

        answer = {"approve": True, "name": "ada", "reason": "I read 20 answers"}
        without = {name: answer[name] for name in ("approve", "name")}
        refused = server.ask(f"flow_runs/{first}/resume", run_input=without)
        assert refused["status"] == "REJECT"
        assert "reason" in refused["details"]["reason"]
        accepted = server.ask(f"flow_runs/{first}/resume", run_input=answer)
        assert accepted["status"] == "ACCEPT"
        wait_for(lambda: state(first)["type"] in ENDED, 180, log)
    finally:
        _end(worker)

    assert state(first)["name"] == "Approved", state(first)["message"]
    assert state(first)["message"] == "files version 1: promoted"
    version = registry.version("files", "1")
    assert version.aliases == ("challenger", "champion")
    said = json.loads(version.tags["posttrain.approval"])
    assert (said["by"], said["reason"]) == ("ada", "I read 20 answers")
    # Nothing was done twice: the stages' tasks ran once, and all but one had been done before.
    tasks = server.ask("task_runs/filter", flow_runs={"id": {"any_": [first]}})
    states = {task["name"]: (task["state_name"], task["run_count"]) for task in tasks}
    assert states.pop("promote") == ("Completed", 1)
    assert set(states.values()) == {("Cached", 1)}
    found = wait_for(lambda: _told(server, 2), 60, tmp_path / "server.log")
    assert found == ["posttrain.model.awaiting_approval", "posttrain.model.promoted"]


def _flow_processes(pid: int) -> list[psutil.Process]:
    """The worker's children that execute a flow run."""
    children = psutil.Process(pid).children(recursive=True)
    return [one for one in children if one.status() != psutil.STATUS_ZOMBIE]


def _told(server: Server, number: int) -> list[str] | None:
    """Names of the events about models, once there are so many."""
    ours = {"event": {"prefix": ["posttrain.model."]}, "order": "ASC"}
    events = [one["event"] for one in server.ask("events/filter", filter=ours)["events"]]
    return events if len(events) >= number else None
