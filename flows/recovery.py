"""Brings a scheduled run back whose process has died: two automations a deployment.

A worker says that a run crashed whose process it sees ending. Where the worker died with it, nobody
does: then the run's heartbeat is missing. A crashed run is scheduled again, and goes on from its
last checkpoints.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING
from uuid import UUID

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

HEARTBEAT_SECONDS = 30
"""How often a run says that it is alive; Prefect allows no less."""
_HEARTBEAT = "prefect.flow-run.heartbeat"
_CRASHED = "prefect.flow-run.Crashed"


def set_recovery(
    deployment_id: UUID, full_name: str, recoveries: int, silence_seconds: float
) -> None:
    """Make the automations of a deployment, or bring them up to date; they are found by name.

    recoveries: how often a run is brought back; 0 leaves it crashed.
    silence_seconds: a run whose heartbeat is missing for so long has crashed.
    """
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        _put(client, _silent(deployment_id, full_name, silence_seconds))
        _put(client, _back(deployment_id, full_name, recoveries))


def _silent(deployment_id: UUID, full_name: str, silence_seconds: float) -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=f"{full_name}: crashed without a word",
        description="A run whose heartbeat is missing is marked as crashed.",
        trigger=EventTrigger(
            after={_HEARTBEAT},
            # The last event of a run has the name of its final state, and that can be any.
            expect={"prefect.flow-run.*"},
            match={"prefect.resource.id": ["prefect.flow-run.*"]},
            match_related=_of(deployment_id),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_seconds),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no sign of life for {silence_seconds:g} seconds",
            )
        ],
    )


def _back(deployment_id: UUID, full_name: str, recoveries: int) -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=f"{full_name}: back after a crash",
        description=f"A crashed run is started again, {recoveries} times at most.",
        enabled=recoveries > 0,
        trigger=EventTrigger(
            expect={_CRASHED},
            match={
                "prefect.resource.id": ["prefect.flow-run.*"],
                # The event says how often the run was started: what never started is not in here.
                "prefect.run-count": [str(count) for count in range(1, max(recoveries, 1) + 1)],
            },
            match_related=_of(deployment_id),
            for_each={"prefect.resource.id"},
            posture=Posture.Reactive,
            threshold=1,
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.SCHEDULED,
                name="AwaitingRetry",
                message="brought back after a crash",
                force=True,
            )
        ],
    )


def _of(deployment_id: UUID) -> dict[str, str]:
    return {
        "prefect.resource.role": "deployment",
        "prefect.resource.id": f"prefect.deployment.{deployment_id}",
    }


def _put(client: SyncPrefectClient, automation: AutomationCore) -> None:
    first, *others = [*client.read_automations_by_name(automation.name), None]
    if first is None:
        client.create_automation(automation)
        return
    client.update_automation(first.id, automation)
    for other in others:
        if other is not None:
            client.delete_automation(other.id)
