"""Automations that bring crashed runs back, on a real server; test_worker.py kills real runs."""

from __future__ import annotations

from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.states import State

from flows.recovery import set_recovery
from tests.servers import wait_for

pytestmark = [pytest.mark.servers, pytest.mark.usefixtures("prefect_server")]


@flow
def nothing() -> None:
    """Stands behind a deployment whose runs are moved by hand."""


def crashed_run(client: SyncPrefectClient, deployment: UUID, starts: int) -> UUID:
    run = client.create_flow_run_from_deployment(deployment).id
    for _ in range(starts):
        client.set_flow_run_state(run, State(type=StateType.RUNNING), force=True)
    assert client.read_flow_run(run).run_count == starts
    client.set_flow_run_state(run, State(type=StateType.CRASHED), force=True)
    return run


def test_a_crash_that_was_overlooked_is_made_good() -> None:
    name = f"nothing/{uuid4()}"
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(nothing)
        deployment = client.create_deployment(flow_id, name.split("/")[1])
        set_recovery(deployment, name, recoveries=1, silence_seconds=600)
        [back] = client.read_automations_by_name(f"{name}: back after a crash")
        # As if its action had been lost.
        client.pause_automation(back.id)
        first = crashed_run(client, deployment, starts=1)
        often = crashed_run(client, deployment, starts=2)

        def state(run: UUID) -> str | None:
            found = client.read_flow_run(run).state
            return None if found is None else found.name

        wait_for(lambda: state(first) == "AwaitingRetry", 180)
        assert state(often) == "Crashed"
