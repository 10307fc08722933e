from __future__ import annotations

import socket
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.states import Pending
from typer.testing import CliRunner

from flows.cli import app
from flows.deploy import Schedule, build_deployment, deploy, require_server, set_paused
from flows.recipes import load_recipe
from infra.environment import Home
from schemas.base import UserError
from tests.servers import PrefectServer, free_port

NIGHTLY = Schedule("0 2 * * *")


def test_a_deployment_runs_once_at_a_time_and_its_form_is_described(
    home: Home, files_recipe: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    config = load_recipe(str(files_recipe), ["data.root=data"])
    schedule = Schedule("0 2 * * *", "Asia/Tokyo")
    made = build_deployment(config, home, name="nightly", schedule=schedule)
    assert made.full_name == "posttrain/nightly"
    assert made.entrypoint == "flows.scheduled.scheduled"
    assert made.concurrency_limit == 1
    assert made.concurrency_options is not None
    assert made.concurrency_options.collision_strategy.value == "ENQUEUE"
    assert made.schedules is not None
    schedule: Any = made.schedules[0].schedule
    assert (schedule.cron, schedule.timezone) == ("0 2 * * *", "Asia/Tokyo")
    assert made.parameters["config"]["data"]["root"] == str(tmp_path / "data")
    assert made.parameters["home"] == str(home.root)
    check_form(made._parameter_openapi_schema.model_dump())


def check_form(form: dict[str, Any]) -> None:
    """Every parameter, and every field of the recipe, says what it is."""
    assert form["properties"]["config"]["description"].startswith("The recipe")
    assert set(form["properties"]) == {"config", "home", "catchup", "late_after"}
    assert all(field["description"] for field in form["properties"].values())
    assert form["properties"]["catchup"]["enum"] == ["latest", "skip"]
    for section in ("PipelineConfig", "GRPOConfig", "ComputeConfig"):
        for name, field in form["definitions"][section]["properties"].items():
            # A section is described where it is defined.
            assert "$ref" in field or field["description"], f"{section}.{name}"


@pytest.mark.parametrize(("cron", "zone"), [("0 99 * * *", None), ("0 2 * * *", "Nowhere/X")])
def test_a_bad_schedule(home: Home, files_recipe: Path, cron: str, zone: str | None) -> None:
    config = load_recipe(str(files_recipe))
    with pytest.raises(UserError, match="is no schedule: Invalid"):
        build_deployment(config, home, name="x", schedule=Schedule(cron, zone))


def test_without_a_server_the_remedy_is_told(
    home: Home, files_recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", f"http://127.0.0.1:{free_port()}/api")
    arguments = ["--cron", "0 2 * * *", "--home", str(home.root)]
    for command in (["deploy", "--work-pool", "night"], ["serve"]):
        result = CliRunner().invoke(app, [command[0], str(files_recipe), *command[1:], *arguments])
        assert result.exit_code == 2
        assert "prefect server start" in result.stderr


class LateServer(ThreadingHTTPServer):
    """Takes every connection, and answers none of the first two requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Late)
        self.asked = 0
        self.released = Event()


class Late(BaseHTTPRequestHandler):
    server: LateServer

    def do_GET(self) -> None:
        self.server.asked += 1
        if self.server.asked <= 2:
            self.server.released.wait()
            return
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:
        """Into no test's output."""


def test_a_server_that_stands_still_is_asked_again(home: Home) -> None:
    with LateServer() as server:
        Thread(target=server.serve_forever, daemon=True).start()
        require_server(f"http://127.0.0.1:{server.server_port}/api", home, seconds=0.5)
        assert server.asked == 3
        server.released.set()
        server.shutdown()


def test_a_server_that_never_answers_is_named(home: Home) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=16) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=rf"http://{address}/api takes connections.* for 1 s"):
            require_server(f"http://{address}/api", home, seconds=0.1)


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
@pytest.mark.parametrize(
    ("catchup", "second"), [("latest", "AwaitingConcurrencySlot"), ("skip", "Cancelled")]
)
def test_a_run_that_meets_another_waits_or_is_dropped(
    home: Home, files_recipe: Path, catchup: Any, second: str
) -> None:
    config = load_recipe(str(files_recipe))
    schedule = Schedule("0 2 * * *", catchup=catchup)
    made = build_deployment(config, home, name=f"alone-{catchup}", schedule=schedule)
    deploy(made, "alone", schedule)
    deploy(made, "alone", schedule)  # again: the same deployment
    with get_client(sync_client=True) as client:
        deployment = client.read_deployment_by_name(made.full_name)
        assert [schedule.active for schedule in deployment.schedules] == [True]
        states = []
        for _ in range(2):
            run = client.create_flow_run_from_deployment(deployment.id)
            client.set_flow_run_state(run.id, Pending())
            states.append(client.read_flow_run(run.id).state)
    assert states[0] is not None and states[0].type == StateType.PENDING
    assert states[1] is not None and states[1].name == second


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_what_the_server_keeps_of_a_deployment(
    home: Home, files_recipe: Path, real_prefect: PrefectServer
) -> None:
    made = build_deployment(
        load_recipe(str(files_recipe)), home, name="kept", schedule=Schedule("0 2 * * *")
    )
    assert deploy(made, "kept", NIGHTLY, paused=True) is True
    kept = real_prefect.deployment("kept")
    check_form(kept["parameter_openapi_schema"])
    assert kept["paused"] is True
    assert kept["global_concurrency_limit"]["limit"] == 1
    assert kept["job_variables"]["env"] == {
        "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": "30",
        "PREFECT_CLIENT_MAX_RETRIES": "7",
    }

    # Paused it stays, until somebody goes on with it.
    assert deploy(made, "kept", NIGHTLY) is True
    assert set_paused("kept", False) == "posttrain/kept"
    assert deploy(made, "kept", NIGHTLY) is False
    assert real_prefect.deployment("kept")["paused"] is False


@pytest.mark.slow
@pytest.mark.usefixtures("prefect_server")
def test_the_automations_of_a_deployment_are_made_once_and_changed(
    home: Home, files_recipe: Path, real_prefect: PrefectServer
) -> None:
    made = build_deployment(load_recipe(str(files_recipe)), home, name="auto", schedule=NIGHTLY)

    def automations() -> list[dict[str, Any]]:
        found = real_prefect.ask("automations/filter")
        mine = [one for one in found if one["name"].startswith("posttrain/auto:")]
        return sorted(mine, key=lambda one: str(one["name"]))

    deploy(made, "auto", NIGHTLY)
    first = automations()
    deploy(made, "auto", Schedule("0 2 * * *", recoveries=1, silence=90))
    back, overlooked, silent = automations()
    assert [one["id"] for one in (back, overlooked, silent)] == [one["id"] for one in first]
    assert first[0]["trigger"]["match"]["prefect.run-count"] == ["1", "2", "3"]
    for one in (back, overlooked):
        assert one["trigger"]["match"]["prefect.run-count"] == ["1"]
    assert (first[2]["trigger"]["within"], silent["trigger"]["within"]) == (300.0, 90.0)
    identifier = real_prefect.deployment("auto")["id"]
    for one in (back, overlooked, silent):
        assert one["enabled"] is True
        related = one["trigger"]["match_related"]
        assert related["prefect.resource.id"] == f"prefect.deployment.{identifier}"
    deploy(made, "auto", Schedule("0 2 * * *", recoveries=0))
    assert [one["enabled"] for one in automations()] == [False, False, True]
