"""Brings a scheduled run back whose process has died: three automations a deployment.

A worker says that a run crashed whose process it sees ending. Where the worker died with it, nobody
does: then the run's heartbeat is missing. A crashed run is scheduled again, and goes on from its
last checkpoints. A busy server may lose that action, and Prefect does not try it again: so a run
that stays crashed is scheduled once more.
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
_ANY = "prefect.flow-run.*"
_BACK = timedelta(seconds=30)
"""How long a run stays crashed before it is brought back.

A worker reports a crash twice: when the process ends, and after it has imported the flow to look
for its hooks, which takes seconds. The second report is refused while the run is crashed, and would
mark it as crashed again once it is scheduled or runs.
"""
_OVERLOOKED = timedelta(seconds=90)
"""How long it may stay crashed before it is tried again to bring it back."""


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
        back, overlooked = f"{full_name}: back after a crash", " that was overlooked"
        _put(client, _back(back, deployment_id, recoveries, _BACK))
        _put(client, _back(back + overlooked, deployment_id, recoveries, _OVERLOOKED))


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
            expect={_ANY},
            match={"prefect.resource.id": [_ANY]},
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


def _back(
    name: str, deployment_id: UUID, recoveries: int, crashed_for: timedelta
) -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    return AutomationCore(
        name=name,
        description=f"A crashed run is started again, {recoveries} times at most.",
        enabled=recoveries > 0,
        trigger=EventTrigger(
            after={_CRASHED},
            expect={_ANY},
            match={
                "prefect.resource.id": [_ANY],
                # The event says how often the run was started: what never started is not in here.
                "prefect.run-count": [str(count) for count in range(1, max(recoveries, 1) + 1)],
            },
            match_related=_of(deployment_id),
            for_each={"prefect.resource.id"},
            posture=Posture.Proactive,
            threshold=1,
            within=crashed_for,
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
