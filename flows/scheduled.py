"""The flow that a schedule starts: the pipeline, unless there is nothing new to learn from."""

# No `from __future__ import annotations`: Prefect resolves the parameters of a served flow.

import contextlib
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import FlowRun
from prefect.context import FlowRunContext
from prefect.states import Cancelled, Completed

from flows.catchup import MISSED, Catchup, drop_missed
from flows.pipeline import run_pipeline
from flows.plan import make_plan
from flows.runs import RunRecord, Runs, config_digest
from flows.sync import syncing
from infra.environment import Home, quiet_environment
from infra.files import file_lock
from schemas.pipeline import PipelineConfig

NOTHING_NEW = "NothingNew"
"""Name of the final state of a run whose data and configuration are those of an earlier one."""


@flow(name="posttrain", flow_run_name="{config.name}", persist_result=False)
def scheduled(
    config: PipelineConfig, home: str, catchup: Catchup = "latest", late_after: float = 3600.0
) -> Any:
    """Post-train a model on the data as they are now, and promote it if the gate holds.

    Data files are read when the run starts: what has changed since the last run is learned from,
    and a run that finds nothing new ends at once in the state `NothingNew`.

    Args:
        config: The recipe, resolved when it was deployed.
        home: Folder of the store and of MLflow's and Prefect's own files, on the worker.
        catchup: Of the runs that were missed, `latest` runs the newest, and `skip` runs none.
        late_after: Seconds after which a run that did not start counts as missed, for `skip`.
    """
    place = Home.resolve(home)
    _prepare_process(place)
    log = get_run_logger().info
    context = FlowRunContext.get()
    run = context.flow_run if context is not None else None
    if run is not None:
        missed = drop_missed(run, catchup, timedelta(seconds=late_after), log)
        if missed is not None:
            return Cancelled(name=MISSED, message=missed)
    with _alone(run, place, log), syncing(place, lambda one: log("told MLflow of %s", one.run)):
        done = _done_before(config, place)
        if done is not None:
            message = f"nothing new: every stage is reused from {done.run} ({done.outcome})"
            log(message)
            return Completed(name=NOTHING_NEW, message=message)
        return run_pipeline(config, place)


def _alone(
    run: FlowRun | None, place: Home, log: Callable[[str], None]
) -> contextlib.AbstractContextManager[object]:
    """Keep the runs of a deployment apart, whatever Prefect's server has forgotten meanwhile.

    It gives a deployment's place away when a server that was down for minutes has not heard of the
    run that holds it; and a run that only seemed to be dead is started a second time.
    """
    if run is None or run.deployment_id is None:
        return contextlib.nullcontext()
    lock = place.locks / f"deployment.{run.deployment_id}.lock"
    return file_lock(lock, lambda: log("another run of this deployment is at work; waiting for it"))


def _prepare_process(place: Home) -> None:
    """Quiet libraries, and the user's own functions importable from the working folder."""
    for name, value in quiet_environment(place).items():
        if not name.startswith("PREFECT_"):  # Prefect is at work already, as its worker wants it
            os.environ.setdefault(name, value)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _done_before(config: PipelineConfig, place: Home) -> RunRecord | None:
    """The finished run of this configuration, if no stage has anything left to do."""
    record = Runs(place.store.root).latest_finished(config_digest(config))
    if record is None or not make_plan(config, place).all_reused:
        return None
    return record
