"""Schedules: a recipe as a Prefect deployment, on a work pool or served by this process."""

from __future__ import annotations

import urllib.error
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from infra.environment import Home
from schemas.base import UserError
from schemas.pipeline import PipelineConfig

if TYPE_CHECKING:
    from prefect.deployments.runner import RunnerDeployment

DEFAULT_API = "http://127.0.0.1:4200/api"
"""Where `prefect server start` listens unless it is told otherwise."""


def require_server(url: str, home: Home) -> None:
    """Refuse to schedule anything where no Prefect server answers."""
    local = urlsplit(url).hostname in ("127.0.0.1", "::1", "localhost")
    handlers = [urllib.request.ProxyHandler({})] if local else []
    try:
        with urllib.request.build_opener(*handlers).open(f"{url.rstrip('/')}/health", timeout=10):
            return
    except urllib.error.HTTPError:
        return  # somebody is there; Prefect's client says what is wrong
    except (urllib.error.URLError, OSError, ValueError):
        raise UserError(
            f"no Prefect server answers at the address in PREFECT_API_URL (default {DEFAULT_API}): "
            f"start one with PREFECT_HOME={home.prefect_home} prefect server start, "
            "or set PREFECT_API_URL"
        ) from None


def build_deployment(
    config: PipelineConfig, home: Home, *, name: str, cron: str, timezone: str | None
) -> RunnerDeployment:
    """The deployment of a recipe: one run at a time, and a run that meets another is dropped.

    Nights that were missed while no worker was there are so run once: the first of the late runs
    takes the data as they are, the others meet it, or find nothing new.
    """
    from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyLimitStrategy
    from prefect.deployments.runner import RunnerDeployment
    from prefect.schedules import Cron
    from prefect.types.entrypoint import EntrypointType

    from flows.scheduled import scheduled

    # Relative to where the recipe was deployed, not to where a worker happens to run.
    root = str(Path(config.data.root).expanduser().absolute())
    config = config.model_copy(update={"data": config.data.model_copy(update={"root": root})})
    try:
        return RunnerDeployment.from_flow(
            scheduled,
            name=name,
            schedule=Cron(cron, timezone=timezone),
            parameters={"config": config.model_dump(mode="json"), "home": str(home.root)},
            description=config.description or None,
            tags=["posttrain", config.name],
            concurrency_limit=ConcurrencyLimitConfig(
                limit=1, collision_strategy=ConcurrencyLimitStrategy.CANCEL_NEW
            ),
            entrypoint_type=EntrypointType.MODULE_PATH,
        )
    except ValueError as error:
        zone = f" in time zone {timezone}" if timezone else ""
        raise UserError(f"--cron {cron!r}{zone} is no schedule: {_first_line(error)}") from error


def deploy(deployment: RunnerDeployment, pool: str) -> str:
    """Register a deployment on a work pool, which is made if it is missing; its full name.

    Runs start in the folder that this is called from: the user's functions are found there.
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
    deployment.storage = LocalStorage(str(Path.cwd()))
    deployment.apply(work_pool_name=pool)
    return deployment.full_name


def serve(deployment: RunnerDeployment) -> None:
    """Serve a deployment until this process is stopped; its schedule is paused then."""
    import prefect

    prefect.serve(deployment, limit=1, print_starting_message=False)


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
