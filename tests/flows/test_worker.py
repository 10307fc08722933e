"""Schedules on a real Prefect server with a real process worker: what fires, breaks and comes back.

Each test writes down what Prefect's API says; `pytest -s` shows it.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows.archive import Archive
from flows.pipeline import post_train
from flows.recipes import load_recipe
from flows.runs import Runs
from infra.environment import Home
from tests.servers import (
    MAIN,
    STANDSTILL_SECONDS,
    PrefectServer,
    Process,
    command,
    wait_for,
    worker,
)

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("prefect_server", "tracked_home")]

RECIPE = Path(__file__).parents[1] / "recipes" / "tiny.yaml"
SMALL = [
    *("sft.num_epochs=2", "sft.checkpoint_every=5"),
    *("rl.online.num_steps=400", "rl.online.checkpoint_every=2"),
    *("data.demonstrations.arguments.count=128", "data.prompts.arguments.count=32"),
]
"""Little work before the RL stage, and more there than any test waits for."""
GENERATOR = """
import os, pathlib, signal

def records():
    mark = pathlib.Path("killed_once")
    if not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    yield {"prompt": "1+1=", "answer": "2"}
"""


class Deployed:
    """A deployment on a pool of its own, and the worker's folder."""

    def __init__(self, server: PrefectServer, home: Home, folder: Path, name: str) -> None:
        self.server = server
        self.home = home
        self.folder = folder
        self.name = name
        self.env = server.environment(home, folder)
        self.log = folder / "worker.log"

    def deploy(self, recipe: Path, *more: str, cron: str = "0 2 1 1 *") -> str:
        done = command(
            *("deploy", str(recipe), "--cron", cron, "--work-pool", self.name),
            *("--name", self.name, "--home", str(self.home.root), *more),
            cwd=self.folder,
            env=self.env,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def worker(self) -> Any:
        return worker(self.name, cwd=self.folder, env=self.env)

    def show(self, run: dict[str, Any]) -> None:
        """A log of what happened to a run, for whoever reads the test's output."""
        for state in self.server.read(f"flow_run_states/?flow_run_id={run['id']}"):
            print(f"{state['timestamp'][:19]}  {self.name:<12} {state['name']:<24}", end="")
            print((state["message"] or "").splitlines()[0] if state["message"] else "")


@pytest.fixture
def deployed(home: Home, tmp_path: Path, real_prefect: PrefectServer) -> Callable[[str], Deployed]:
    return lambda name: Deployed(real_prefect, home, tmp_path, name)


def test_a_schedule_fires_on_a_process_worker(
    home: Home, stages: Any, files_recipe: Path, tmp_path: Path, deployed: Any
) -> None:
    # What "done" does has been done before; "broken" is killed once, then meets a bad record.
    first = post_train(load_recipe(str(files_recipe)), home=str(home.root))
    (tmp_path / "flaky_records.py").write_text(GENERATOR)
    (tmp_path / "data" / "broken.jsonl").write_text('{"prompt": "1+2="}\n')
    broken = [
        *("--set", "data.evaluation={generator: 'flaky_records:records'}"),
        *("--set", "data.demonstrations.path=broken.jsonl"),
    ]
    night = deployed("fires")
    for name, more in (("done", []), ("broken", broken)):
        output = night.deploy(files_recipe, "--name", name, *more, cron="* * * * *")
        assert f"posttrain/{name} runs at * * * * *" in output
    server = night.server

    def first_ended(name: str) -> dict[str, Any] | None:
        runs = server.flow_runs(name)
        return next((run for run in runs if run["state_type"] in ("COMPLETED", "FAILED")), None)

    with night.worker():
        nothing_new = wait_for(lambda: first_ended("done"), 240, night.log)
        failed = wait_for(lambda: first_ended("broken"), 240, night.log)
        for name in ("done", "broken"):
            paused = command(
                *("deploy", str(files_recipe), "--name", name, "--pause"),
                *("--home", str(home.root)),
                cwd=tmp_path,
                env=night.env,
            )
            assert f"posttrain/{name} is paused" in paused.stdout, paused.stderr

    for run in (nothing_new, failed):
        assert run["auto_scheduled"] is True
        night.show(run)
    assert nothing_new["state_name"] == "NothingNew", nothing_new["state"]["message"]
    assert f"reused from {first['run']} (promoted)" in nothing_new["state"]["message"]
    assert failed["state_type"] == "FAILED", failed["state"]["message"]
    tasks = server.ask("task_runs/filter", flow_runs={"id": {"any_": [failed["id"]]}})
    counts = {task["name"]: (task["state_type"], task["run_count"]) for task in tasks}
    assert counts["prepare_data:evaluation"] == ("COMPLETED", 2)
    assert counts["prepare_data:demonstrations"] == ("FAILED", 1)
    records = [one for one in Runs(home.store.root).all() if one.run != first["run"]]
    assert {record.status for record in records} == {"failed"}

    def events() -> list[dict[str, Any]]:
        ours = {"event": {"prefix": ["posttrain."]}}
        found = server.ask("events/filter", filter=ours)["events"]
        return [one for one in found if f"prefect.flow-run.{failed['id']}" in _related(one)]

    (event,) = wait_for(events, STANDSTILL_SECONDS, server.log)  # the server writes them in batches
    assert event["event"] == "posttrain.stage.failed"
    assert event["payload"]["stage"] == "prepare_data:demonstrations"
    assert f"posttrain.run.{event['payload']['run']}" in _related(event)


def _related(event: dict[str, Any]) -> set[str]:
    return {one["prefect.resource.id"] for one in event["related"]}


def test_of_missed_nights_the_newest_is_run_on_the_data_of_today(
    home: Home, stages: Any, files_recipe: Path, tmp_path: Path, deployed: Any
) -> None:
    """The worker was away for four nights; the recipe's data did not change meanwhile."""
    first = post_train(load_recipe(str(files_recipe)), home=str(home.root))
    night = deployed("missed")
    night.deploy(files_recipe, cron="0 2 * * *")
    now = datetime.now(UTC)
    night.server.ask(
        f"deployments/{night.server.deployment('missed')['id']}/schedule",
        start_time=(now - timedelta(days=4)).isoformat(),
        end_time=now.isoformat(),
        min_runs=4,
    )

    def due() -> list[dict[str, Any]]:
        runs = night.server.flow_runs("missed")
        return [run for run in runs if run["expected_start_time"] < now.isoformat()]

    missed = due()
    assert len(missed) == 4
    with night.worker():
        wait_for(
            lambda: all(run["state_type"] in ("COMPLETED", "CANCELLED") for run in due()),
            180,
            night.log,
        )
    *older, newest = due()
    for run in (*older, newest):
        night.show(run)
    assert [run["state_name"] for run in older] == ["Missed"] * 3
    assert all("missed: due at" in run["state"]["message"] for run in older)
    assert newest["state_name"] == "NothingNew"
    assert first["run"] in newest["state"]["message"]


class Training(Deployed):
    """A real run under a worker, which is looked at while it trains."""

    def checkpoint(self) -> psutil.Process | None:
        """The process of the RL stage once it has written a checkpoint."""
        for process in psutil.process_iter(["cmdline", "cwd"]):
            line = process.info["cmdline"] or []
            if "stages.main" not in line or process.info["cwd"] != str(self.folder):
                continue
            work = Path(line[-1])
            request = work / "request.json"
            if request.exists() and json.loads(request.read_text())["stage"] == "train_rl":
                return process if list(work.glob("checkpoints/step-*")) else None
        return None

    def ours(self) -> list[psutil.Process]:
        """Processes of stages that were started from here."""
        return [
            process
            for process in psutil.process_iter(["cmdline", "cwd"])
            if "stages.main" in (process.info["cmdline"] or [])
            and process.info["cwd"] == str(self.folder)
        ]

    def is_registered(self) -> bool:
        """Whether the server has the deployment and all of its automations."""
        names = [one["name"] for one in self.server.ask("automations/filter")]
        return sum(name.startswith(f"posttrain/{self.name}:") for name in names) == 3

    def record(self) -> Any:
        (record,) = Runs(self.home.store.root).all()
        return record


@pytest.fixture
def training(home: Home, tmp_path: Path, real_prefect: PrefectServer) -> Callable[[str], Training]:
    return lambda name: Training(real_prefect, home, tmp_path, name)


def settings(*more: str) -> list[str]:
    return [part for one in (*SMALL, *more) for part in ("--set", one)]


def test_a_run_whose_process_is_killed_comes_back_and_goes_on(training: Any) -> None:
    night: Training = training("killed")
    night.deploy(RECIPE, *settings("rl.online.num_steps=14"), "--recoveries", "1")
    with night.worker():
        check_recovery(night, "killed")


@pytest.mark.servers
def test_a_served_run_whose_process_is_killed_comes_back_and_goes_on(training: Any) -> None:
    night: Training = training("served")
    arguments = [*MAIN, "serve", str(RECIPE), "--cron", "0 2 1 1 *", "--name", "served"]
    home = ["--home", str(night.home.root)]
    process = Process(
        [sys.executable, *arguments, *home, *settings("rl.online.num_steps=14")],
        log=night.log,
        cwd=night.folder,
        env=night.env,
    )
    try:
        wait_for(lambda: "Ctrl-C ends it" in night.log.read_text(), 120, night.log)
        wait_for(night.is_registered, 120, night.log)
        check_recovery(night, "served")
    finally:
        process.end()


def check_recovery(night: Training, name: str) -> None:
    """Start a run, kill its process in the middle, and see it end well all the same."""
    run = night.server.start_run(name)
    stage = wait_for(night.checkpoint, 300, night.log)
    flow = stage.parent()
    assert "stages.main" not in flow.cmdline()
    os.kill(flow.pid, signal.SIGKILL)
    # Crashed is not the end of it, and may be reported more than once.
    wait_for(
        lambda: night.server.run(run)["state_type"] in ("COMPLETED", "FAILED", "CANCELLED"),
        300 + STANDSTILL_SECONDS,
        night.log,
    )
    ended = night.server.run(run)
    night.show(ended)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert ended["run_count"] == 2
    names = night.server.states(run)
    assert names.index("Crashed") < names.index("AwaitingRetry") < len(names) - 1
    record = night.record()  # one run, opened again
    statuses = {row.name: row.status for row in record.stages}
    assert statuses["train_sft"] == "reused"
    assert statuses["train_rl"] == "resumed"
    assert record.status == "finished"


@pytest.mark.servers
def test_a_run_that_is_killed_too_often_stays_crashed(training: Any) -> None:
    night: Training = training("hopeless")
    night.deploy(RECIPE, *settings(), "--recoveries", "1")
    with night.worker():
        run = night.server.start_run("hopeless")
        for count in (1, 2):
            wait_for(
                lambda c=count: night.server.run(run)["run_count"] == c,
                STANDSTILL_SECONDS,
                night.log,
            )
            stage = wait_for(night.checkpoint, 300, night.log)
            os.kill(stage.parent().pid, signal.SIGKILL)
            wait_for(lambda: not night.ours(), 30, night.log)
        # Worker and runner both report a crash, so the state may be there more than once.
        wait_for(
            lambda: night.server.run(run)["state_type"] == "CRASHED", STANDSTILL_SECONDS, night.log
        )
        # It would be back after 30 seconds, and if that was lost, after 90.
        with pytest.raises(AssertionError):
            wait_for(lambda: night.server.run(run)["state_type"] != "CRASHED", 120)
    night.show(night.server.run(run))


@pytest.mark.servers
def test_a_run_that_died_with_its_worker_comes_back(training: Any) -> None:
    """Nobody is left to say that it crashed: its heartbeat is missing."""
    night: Training = training("silent")
    night.deploy(RECIPE, *settings("rl.online.num_steps=60"), "--silence", "90")
    with night.worker() as first:
        run = night.server.start_run("silent")
        stage = wait_for(night.checkpoint, 300, night.log)
        first.process.send_signal(signal.SIGKILL)
        os.kill(stage.parent().pid, signal.SIGKILL)
        wait_for(lambda: not night.ours(), 30, night.log)
    assert night.server.run(run)["state_type"] == "RUNNING"
    with night.worker():
        wait_for(lambda: night.server.run(run)["run_count"] == 2, 240, night.log)
        ended = night.server.wait_until_ended(run, 300, night.log)
    night.show(ended)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    assert "no sign of life for 90 seconds" in str(
        [state["message"] for state in night.server.read(f"flow_run_states/?flow_run_id={run}")]
    )
    assert {row.name: row.status for row in night.record().stages}["train_rl"] == "resumed"


@pytest.mark.servers
def test_a_run_that_is_cancelled_checkpoints_and_the_next_goes_on(training: Any) -> None:
    night: Training = training("cancelled")
    night.deploy(RECIPE, *settings("rl.online.num_steps=40"))
    with night.worker():
        run = night.server.start_run("cancelled")
        stage = wait_for(night.checkpoint, 300, night.log)
        cancelling = {"type": "CANCELLING", "name": "Cancelling"}
        night.server.ask(f"flow_runs/{run}/set_state", state=cancelling)
        asked = datetime.now(UTC)
        wait_for(lambda: not night.ours(), 60, night.log)
        left = (datetime.now(UTC) - asked).total_seconds()
        ended = night.server.wait_until_ended(run, STANDSTILL_SECONDS, night.log)
        night.show(ended)
        assert ended["state_type"] == "CANCELLED"
        assert left < 45  # 10 s until the worker hears of it, and 30 s for the stage
        record = night.record()
        assert record.status == "stopped"
        assert not stage.is_running()

        again = night.server.start_run("cancelled")
        ended = night.server.wait_until_ended(again, 300, night.log)
        night.show(ended)
    assert ended["state_type"] == "COMPLETED", ended["state"]["message"]
    after = night.record()
    assert after.run == record.run
    statuses = {row.name: row.status for row in after.stages}
    assert (statuses["train_sft"], statuses["train_rl"]) == ("reused", "resumed")


def test_a_run_is_suspended_until_somebody_approves(
    home: Home, walk: Callable[[Any], Any], files_recipe: Path, deployed: Any
) -> None:
    config = load_recipe(str(files_recipe), ["gate.approval=true"])
    walk(config)  # everything but the promotion has been done before
    asks = deployed("asks")
    asks.deploy(files_recipe, "--set", "gate.approval=true")
    server = asks.server

    def type_of(run: str) -> str:
        return str(server.run(run)["state_type"])

    with asks.worker() as worker_process:
        first = server.start_run("asks")
        wait_for(lambda: type_of(first) in ("PAUSED", "FAILED", "CRASHED"), 240, asks.log)
        assert server.run(first)["state_name"] == "Suspended", server.run(first)["state"]
        registry = Archive(home, "files").registry
        assert registry.version("files", "1").aliases == ("challenger",)
        # Its process has ended: the worker waits for nothing.
        wait_for(lambda: not _flow_processes(worker_process.process.pid), 60, asks.log)

        # It holds no slot: another run of the deployment starts, and finds nothing new to do.
        second = server.start_run("asks")
        ended = server.wait_until_ended(second, 240, asks.log)
        assert ended["state_name"] == "NothingNew"
        assert "(awaiting approval)" in ended["state"]["message"]

        answer = {"approve": True, "name": "ada", "reason": "I read 20 answers"}
        without = {name: answer[name] for name in ("approve", "name")}
        refused = server.ask(f"flow_runs/{first}/resume", run_input=without)
        assert refused["status"] == "REJECT"
        assert "reason" in refused["details"]["reason"]
        accepted = server.ask(f"flow_runs/{first}/resume", run_input=answer)
        assert accepted["status"] == "ACCEPT"
        ended = server.wait_until_ended(first, 240, asks.log)

    asks.show(ended)
    assert ended["state_name"] == "Approved", ended["state"]["message"]
    assert ended["state"]["message"] == "files version 1: promoted"
    version = registry.version("files", "1")
    assert version.aliases == ("challenger", "champion")
    said = json.loads(version.tags["posttrain.approval"])
    assert (said["by"], said["reason"]) == ("ada", "I read 20 answers")
    # Nothing was done twice: the stages' tasks ran once, and all but one had been done before.
    tasks = server.ask("task_runs/filter", flow_runs={"id": {"any_": [first]}})
    states = {task["name"]: (task["state_name"], task["run_count"]) for task in tasks}
    assert states.pop("promote") == ("Completed", 1)
    assert set(states.values()) == {("Cached", 1)}
    found = wait_for(lambda: _told(server, first, 2), 60, asks.log)
    assert found == ["posttrain.model.awaiting_approval", "posttrain.model.promoted"]


def _flow_processes(pid: int) -> list[psutil.Process]:
    """The worker's children that execute a flow run."""
    children = psutil.Process(pid).children(recursive=True)
    return [one for one in children if one.status() != psutil.STATUS_ZOMBIE]


def _told(server: PrefectServer, run: str, number: int) -> list[str] | None:
    """Names of a flow run's events about models, once there are so many."""
    ours = {"event": {"prefix": ["posttrain.model."]}, "order": "ASC"}
    found = server.ask("events/filter", filter=ours)["events"]
    mine = f"prefect.flow-run.{run}"
    events = [
        one["event"]
        for one in found
        if mine in {related["prefect.resource.id"] for related in one["related"]}
    ]
    return events if len(events) >= number else None
