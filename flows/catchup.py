"""What becomes of nights that were missed: a run that is late and not the newest is not run.

While no worker is there, Prefect keeps the runs of a schedule, and a worker that comes back finds
all of them. They would all take the data as they are now.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Literal, NamedTuple
from uuid import UUID

if TYPE_CHECKING:
    from prefect.client.schemas.objects import FlowRun

Catchup = Literal["latest", "skip"]
MISSED = "Missed"
"""Name of the final state, of type Cancelled, of a night that is not made up for."""


class Night(NamedTuple):
    """One run of a schedule."""

    id: UUID
    due: datetime
    """When it was to start."""


def verdict(
    own: Night, others: Sequence[Night], policy: Catchup, late_after: timedelta, now: datetime
) -> dict[UUID, str]:
    """The nights that are not run, each with the reason.

    others: runs of the same schedule that are due and have not started.
    """
    nights = sorted([own, *others], key=lambda night: (night.due, night.id))
    newest = nights[-1]
    dropped = {
        night.id: f"missed: due at {_clock(night.due)}, and the run due at {_clock(newest.due)} "
        "takes the data of today"
        for night in nights[:-1]
    }
    if policy == "skip" and now - newest.due > late_after:
        dropped[newest.id] = (
            f"missed: due at {_clock(newest.due)}, more than {late_after} ago, and missed runs "
            "are skipped"
        )
    return dropped


def drop_missed(
    run: FlowRun, policy: Catchup, late_after: timedelta, log: Callable[[str], None]
) -> str | None:
    """Cancel the missed nights of a run's deployment; the reason if the run is one of them.

    A run that a person has started, or that goes on after a crash, is never one.
    """
    from prefect.client.orchestration import get_client
    from prefect.states import Cancelled

    if not run.auto_scheduled or run.run_count > 1 or run.deployment_id is None:
        return None
    own = Night(run.id, _due(run))
    now = datetime.now(UTC)
    with get_client(sync_client=True) as client:
        others = [Night(one.id, _due(one)) for one in _waiting(client, run.deployment_id, now)]
        dropped = verdict(own, [one for one in others if one.id != own.id], policy, late_after, now)
        for night, why in dropped.items():
            log(why)
            if night != own.id:
                client.set_flow_run_state(night, Cancelled(name=MISSED, message=why), force=True)
    return dropped.get(own.id)


def _waiting(client: object, deployment_id: UUID, now: datetime) -> list[FlowRun]:
    """Runs of the schedule that are due and were never started."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.filters import (
        DeploymentFilter,
        DeploymentFilterId,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import StateType

    assert isinstance(client, SyncPrefectClient)
    found = client.read_flow_runs(
        deployment_filter=DeploymentFilter(id=DeploymentFilterId(any_=[deployment_id])),
        flow_run_filter=FlowRunFilter(
            state=FlowRunFilterState(type=FlowRunFilterStateType(any_=[StateType.SCHEDULED])),
            expected_start_time=FlowRunFilterExpectedStartTime(before_=now),
        ),
    )
    return [one for one in found if one.auto_scheduled and one.run_count == 0]


def _due(run: FlowRun) -> datetime:
    assert run.expected_start_time is not None
    return run.expected_start_time


def _clock(time: datetime) -> str:
    return f"{time.astimezone(UTC):%Y-%m-%d %H:%M} UTC"
