"""Schedules: a recipe as a Prefect deployment, on a work pool or served by this process."""

from __future__ import annotations

import contextlib
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import UUID

from flows.catchup import Catchup
from flows.recovery import HEARTBEAT_SECONDS, set_recovery
from infra.environment import PREFECT_RETRIES, Home
from schemas.base import UserError
from schemas.pipeline import PipelineConfig

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

DEFAULT_API = "http://127.0.0.1:4200/api"
"""Where `prefect server start` listens unless it is told otherwise."""
_PROCESS = {
    "PREFECT_FLOWS_HEARTBEAT_FREQUENCY": str(HEARTBEAT_SECONDS),
    "PREFECT_CLIENT_MAX_RETRIES": PREFECT_RETRIES,
}
"""What the process of a scheduled run finds in its environment."""
_LEASES = (
    "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE=prefect.server.concurrency.lease_storage.filesystem"
)
"""Else a server that is restarted forgets who holds a slot, and the slot is never free again."""

_ATTEMPTS = 9


def require_server(url: str, home: Home, seconds: float = 10.0) -> None:
    """Refuse to schedule anything where no Prefect server answers.

    seconds: how long one attempt may take. A server that takes the connection is asked again, nine
    times in all: on SQLite it may stand still for a minute.

    Raises UserError where nobody listens, or nobody answers.
    """
    local = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    handlers = [urllib.request.ProxyHandler({})] if local else []
    opener = urllib.request.build_opener(*handlers)
    for _ in range(_ATTEMPTS):
        try:
            with opener.open(f"{url.rstrip('/')}/health", timeout=seconds):
                return
        except urllib.error.HTTPError:
            return  # somebody is there; Prefect's client says what is wrong
        except TimeoutError:
            continue  # connected, without an answer; where nobody connects it is a URLError
        except (urllib.error.URLError, OSError, ValueError):
            raise UserError(
                "no Prefect server answers at the address in PREFECT_API_URL "
                f"(default {DEFAULT_API}): start one with PREFECT_HOME={home.prefect_home} "
                f"{_LEASES} prefect server start, or set PREFECT_API_URL"
            ) from None
    raise UserError(
        f"the Prefect server at {url} takes connections and gave no answer for "
        f"{_ATTEMPTS * seconds:.0f} s: look at its log, and start it again"
    )


@dataclass(frozen=True)
class Schedule:
    """When a recipe runs, and what becomes of runs that were missed or have crashed."""

    cron: str
    """When it runs, in five fields."""
    timezone: str | None = None
    """Name of a time zone; None is UTC."""
    catchup: Catchup = "latest"
    """What becomes of runs that were missed: the newest of them is run, or none."""
    late_after: float = 3600.0
    """Seconds after which a run that did not start counts as missed, for `skip`."""
    recoveries: int = 3
    """How often a run whose process died is brought back."""
    silence: float = 300.0
    """Seconds without a sign of life after which a run counts as crashed."""


def build_deployment(
    config: PipelineConfig, home: Home, *, name: str, schedule: Schedule
) -> RunnerDeployment:
    """The deployment of a recipe: one run at a time.

    A run that meets another waits for it where the newest of the missed runs is made up for, and
    is dropped where missed runs are skipped.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.scheduled import scheduled

    # Relative to where the recipe was deployed, not to where a worker happens to run.
    root = str(Path(config.data.root).expanduser().absolute())
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    waits = schedule.catchup == "latest"
    collision = ConcurrencyLimitStrategy.ENQUEUE if waits else ConcurrencyLimitStrategy.CANCEL_NEW
    try:
        return RunnerDeployment.from_flow(
            scheduled,
            name=name,
            schedule=Cron(schedule.cron, timezone=schedule.timezone),
            parameters={
                "config": config.model_dump(mode="json"),
                "home": str(home.root),
                "catchup": schedule.catchup,
                "late_after": schedule.late_after,
            },
            description=config.description or None,
            tags=["posttrain", config.name],
            concurrency_limit=ConcurrencyLimitConfig(limit=1, collision_strategy=collision),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:
        zone = f" in time zone {schedule.timezone}" if schedule.timezone else ""
        raise UserError(
            f"--cron {schedule.cron!r}{zone} is no schedule: {_first_line(error)}"
        ) from error


def deploy(
    deployment: RunnerDeployment, pool: str, schedule: Schedule, *, paused: bool = False
) -> bool:
    """Register a deployment on a work pool, which is made if it is missing.

    Runs start in the folder that this is called from: the user's functions are found there. A
    deployment that was paused stays so. Returns whether it is.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.actions import WorkPoolCreate
    from prefect.exceptions import ObjectNotFound
    from prefect.runner.storage import LocalStorage

    with get_client(sync_client=True) as client:
        try:
            client.read_work_pool(pool)
        except ObjectNotFound:
            client.create_work_pool(WorkPoolCreate(name=pool, type="process"))
        with contextlib.suppress(ObjectNotFound):
            paused = paused or client.read_deployment_by_name(deployment.full_name).paused
    deployment.paused = paused
    deployment.storage = LocalStorage(str(Path.cwd()))
    deployment.job_variables = {"env": _PROCESS}
    _apply(deployment, pool, schedule)
    return paused


def serve(deployment: RunnerDeployment, schedule: Schedule) -> None:
    """Serve a deployment until this process is stopped; its schedule is paused then."""
    import prefect

    os.environ.update(_PROCESS)  # which the processes of the runs inherit
    _apply(deployment, None, schedule)
    prefect.serve(deployment, limit=1, print_starting_message=False)


def _apply(deployment: RunnerDeployment, pool: str | None, schedule: Schedule) -> None:
    deployment_id = deployment.apply(work_pool_name=pool)
    assert isinstance(deployment_id, UUID)  # and not the coroutine of an asynchronous caller
    set_recovery(deployment_id, deployment.full_name, schedule.recoveries, schedule.silence)


def set_paused(name: str, paused: bool) -> str:
    """Pause a deployment's schedule, or go on with it; the deployment's full name."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from flows.scheduled import scheduled

    full_name = f"{scheduled.name}/{name}"
    with get_client(sync_client=True) as client:
        try:
            deployment = client.read_deployment_by_name(full_name)
        except ObjectNotFound:
            raise UserError(
                f"there is no deployment {full_name}; posttrain deploy makes one"
            ) from None
        if paused:
            client.pause_deployment(deployment.id)
        else:
            client.resume_deployment(deployment.id)
    return full_name


def _first_line(error: ValueError) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    found = next((line for line in lines if line.startswith("Value error, ")), lines[-1])
    return found.removeprefix("Value error, ").partition(" [type=")[0]
