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
from prefect.client.schemas.objects import FlowRun, State
from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Cancelled, Completed
from pydantic import Field

from flows import events
from flows.archive import Archive
from flows.catchup import MISSED, Catchup, drop_missed
from flows.pipeline import run_pipeline
from flows.plan import make_plan
from flows.promotion import find_decision
from flows.runs import RunRecord, Runs, config_digest
from flows.sync import syncing
from infra.environment import Home, quiet_environment
from infra.files import file_lock
from infra.redaction import redact_process
from schemas.artifacts import PromotionDecision
from schemas.pipeline import PipelineConfig

NOTHING_NEW = "NothingNew"
"""Name of the final state of a run whose data and configuration are those of an earlier one."""
APPROVAL_SECONDS = 7 * 24 * 3600
"""How long a run stays suspended; after that the command line still takes an approval."""


class Answer(RunInput):
    """The form of a run that waits for approval."""

    approve: bool
    """Promote the model? Else it is refused."""
    name: str = Field(min_length=1)
    """Who decides."""
    reason: str = Field(min_length=1)
    """Why."""


@flow(name="posttrain", flow_run_name="{config.name}", persist_result=False)
def scheduled(
    config: PipelineConfig, home: str, catchup: Catchup = "latest", late_after: float = 3600.0
) -> Any:
    """Post-train a model on the data as they are now, and promote it if the gate holds.

    Data files are read when the run starts: what has changed since the last run is learned from,
    and a run that finds nothing new ends at once in the state `NothingNew`. Where the gate asks for
    approval, the run is suspended until somebody fills in its form, and its process ends.

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
        return _work(config, place, log)


def _work(config: PipelineConfig, place: Home, log: Callable[[str], None]) -> Any:
    done = _done_before(config, place)
    if done is None:
        document = run_pipeline(config, place)
        record = Runs(place.store.root).read(document["run"])
        decision = find_decision(place, record.run)
    else:
        record, decision = done
        document = record.document()
        if not (decision.awaiting_approval and _was_suspended()):
            message = f"nothing new: every stage is reused from {record.run} ({record.outcome})"
            log(message)
            return Completed(name=NOTHING_NEW, message=message)
    if decision.awaiting_approval and _can_be_suspended():
        return _ask(place, record, decision)
    return document


def _ask(place: Home, record: RunRecord, decision: PromotionDecision) -> State[Any]:
    """End this process until somebody decides; started again, do what they say."""
    model = decision.registered_model
    told = "\n".join(f"- {reason}" for reason in decision.reasons)
    answer = suspend_flow_run(
        wait_for_input=Answer.with_initial_data(
            description=f"# Promote {model} version {decision.version}?\n\n{told}\n"
        ),
        timeout=APPROVAL_SECONDS,
        key=f"approval-{decision.fingerprint[:16]}",
    )
    final = Archive(place, model).approve(
        decision.version, granted=answer.approve, by=answer.name, reason=answer.reason
    )
    events.decided(record.run, record.recipe, final)
    message = f"{model} version {final.version}: {final.outcome}"
    return Completed(name="Approved" if final.promoted else "Rejected", message=message)


def _was_suspended() -> bool:
    """Whether this run has asked already, and is started again with the answer."""
    context = FlowRunContext.get()
    if context is None or context.flow_run is None:
        return False
    policy = context.flow_run.empirical_policy
    return policy is not None and bool(policy.pause_keys)


def _can_be_suspended() -> bool:
    """Only a deployment's run is started again when somebody resumes it."""
    context = FlowRunContext.get()
    return bool(context and context.flow_run and context.flow_run.deployment_id)


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
    """Quiet libraries, no secrets in the logs, and the user's functions importable from here."""
    redact_process()
    for name, value in quiet_environment(place).items():
        if not name.startswith("PREFECT_"):  # Prefect is at work already, as its worker wants it
            os.environ.setdefault(name, value)
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))


def _done_before(config: PipelineConfig, place: Home) -> tuple[RunRecord, PromotionDecision] | None:
    """The finished run of this configuration, if no stage has anything left to do."""
    record = Runs(place.store.root).latest_finished(config_digest(config))
    if record is None:
        return None
    plan = make_plan(config, place)
    decision = plan.stages[-1].artifact
    if not plan.all_reused or not isinstance(decision, PromotionDecision):
        return None
    return record, decision
