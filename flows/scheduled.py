"""The flow that a schedule starts: the pipeline, unless there is nothing new to learn from."""

# No `from __future__ import annotations`: Prefect resolves the parameters of a served flow.

import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed

from flows.pipeline import run_pipeline
from flows.plan import make_plan
from flows.runs import RunRecord, Runs, config_digest
from flows.sync import syncing
from infra.environment import Home, quiet_environment
from schemas.pipeline import PipelineConfig

NOTHING_NEW = "NothingNew"
"""Name of the final state of a run whose data and configuration are those of an earlier one."""


@flow(name="posttrain", flow_run_name="{config.name}", persist_result=False)
def scheduled(config: PipelineConfig, home: str) -> Any:
    """Post-train a model on the data as they are now, and promote it if the gate holds.

    Data files are read when the run starts: what has changed since the last run is learned from,
    and a run that finds nothing new ends at once in the state `NothingNew`.

    Args:
        config: The recipe, resolved when it was deployed.
        home: Folder of the store and of MLflow's and Prefect's own files, on the worker.
    """
    place = Home.resolve(home)
    _prepare_process(place)
    with syncing(place, lambda one: get_run_logger().info("told MLflow of %s", one.run)):
        done = _done_before(config, place)
        if done is not None:
            message = f"nothing new: every stage is reused from {done.run} ({done.outcome})"
            get_run_logger().info(message)
            return Completed(name=NOTHING_NEW, message=message)
        return run_pipeline(config, place)


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
