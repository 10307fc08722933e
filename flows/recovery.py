"""Brings a scheduled run back whose process has died: three automations a deployment.

A worker says that a run crashed whose process it sees ending. Where the worker died with it, nobody
does: then the run's heartbeat is missing. A crashed run is scheduled again, and goes on from its
last checkpoints. A busy server may lose that action, and Prefect does not try it again: so a run
that stays crashed is scheduled a minute later.
"""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.events.schemas.automations import AutomationCore

HEARTBEAT_SECONDS = 30
"""How often a run says that it is alive; Prefect allows no less."""
_HEARTBEAT = "prefect.flow-run.heartbeat"
_CRASHED = "prefect.flow-run.Crashed"
_ANY = "prefect.flow-run.*"
_OVERLOOKED = timedelta(seconds=60)
"""How long a run may stay crashed before it is tried again to bring it back."""


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
        _put(client, _back(deployment_id, full_name, recoveries, at_once=True))
        _put(client, _back(deployment_id, full_name, recoveries, at_once=False))


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


def _back(deployment_id: UUID, full_name: str, recoveries: int, *, at_once: bool) -> AutomationCore:
    from prefect.client.schemas.objects import StateType
    from prefect.events.actions import ChangeFlowRunState
    from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture

    # At once, on the event of the crash; or later, where no other event of the run has followed it.
    when: dict[str, Any] = {"posture": Posture.Reactive, "expect": {_CRASHED}}
    if not at_once:
        when = {
            "posture": Posture.Proactive,
            "after": {_CRASHED},
            "expect": {_ANY},
            "within": _OVERLOOKED,
        }
    return AutomationCore(
        name=f"{full_name}: back after a crash" + ("" if at_once else " that was overlooked"),
        description=f"A crashed run is started again, {recoveries} times at most.",
        enabled=recoveries > 0,
        trigger=EventTrigger(
            match={
                "prefect.resource.id": [_ANY],
                # The event says how often the run was started: what never started is not in here.
                "prefect.run-count": [str(count) for count in range(1, max(recoveries, 1) + 1)],
            },
            match_related=_of(deployment_id),
            for_each={"prefect.resource.id"},
            threshold=1,
            **when,
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
