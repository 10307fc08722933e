"""The flow that a schedule starts: the pipeline, unless there is nothing new to learn from."""

# No `from __future__ import annotations`: Prefect resolves the parameters of a served flow.

import os
import sys
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.context import FlowRunContext
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed
from pydantic import Field

from flows import events
from flows.archive import Archive
from flows.pipeline import run_pipeline
from flows.plan import make_plan
from flows.promotion import find_decision
from flows.runs import RunRecord, Runs, config_digest
from infra.environment import Home, quiet_environment
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
def scheduled(config: PipelineConfig, home: str) -> Any:
    """Post-train a model on the data as they are now, and promote it if the gate holds.

    Data files are read when the run starts: what has changed since the last run is learned from,
    and a run that finds nothing new ends at once in the state `NothingNew`. Where the gate asks for
    approval, the run is suspended until somebody fills in its form, and its process ends.

    Args:
        config: The recipe, resolved when it was deployed.
        home: Folder of the store and of MLflow's and Prefect's own files, on the worker.
    """
    place = Home.resolve(home)
    _prepare_process(place)
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
            get_run_logger().info(message)
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
