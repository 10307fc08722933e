"""The Prefect flow: thin tasks that execute stages, retry them, and report on them."""

import errno
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from flows import events
from flows.graph import Node
from flows.session import Session, open_session
from flows.slot import device_slot
from infra.environment import Home
from infra.launch import StageFailed
from infra.unavailable import TrackingUnavailable
from schemas.artifacts import Artifact, PromotionDecision
from schemas.base import UserError
from schemas.pipeline import PipelineConfig

_MAX_EVALUATIONS = 5
"""How often a champion may change under a run before it gives up."""
_FIRST_DELAY_SECONDS = 1
"""Before the first retry; it doubles with each."""
_CACHED = "Cached"


def is_infrastructure_failure(error: object) -> bool:
    """Whether running a stage again may help: a crash, a lost node, a time-out, a broken link.

    An error that the user has to mend is not one, and neither is a full disk, nor a registry that
    has been waited for in vain.
    """
    match error:
        case TrackingUnavailable():
            return error.waited == 0
        case UserError():
            return False
        case StageFailed():
            return error.retryable
        case OSError():
            return error.errno not in (errno.ENOSPC, errno.EDQUOT)
        case _:
            return isinstance(error, TimeoutError)


def _may_retry(_task: Task[..., Any], _run: TaskRun, state: State[Any]) -> bool:
    return is_infrastructure_failure(state.result(raise_on_failure=False))


@task(
    task_run_name="{name}",
    cache_policy=NO_CACHE,
    persist_result=False,
    retry_jitter_factor=0.3,
    retry_condition_fn=_may_retry,
)
def run_stage_task(session: Session, node: Node, name: str) -> Any:
    """Execute one stage, or hand out the artifact of the same work done before.

    Its result is None for a promotion that has to be evaluated again.
    """
    logger = get_run_logger()
    found = session.reuse(node, logger.info)
    if found is not None:
        return Completed(name=_CACHED, message=f"reused {found.uri}", data=found)
    with device_slot(session.config.compute.slot, node.stage, logger.info):
        return session.execute(node, logger.info)


@flow(name="post_train", flow_run_name="{config.name}", persist_result=False)
def post_train(
    config: PipelineConfig, home: str, rerun_changed_code: bool = False
) -> dict[str, Any]:
    """Post-train a model through every stage of a recipe, and promote it if the gate holds.

    rerun_changed_code: work that other code has done is done again.
    Returns what `posttrain run --json` prints.
    """
    return run_pipeline(config, Home.resolve(home), rerun_changed_code=rerun_changed_code)


def run_pipeline(
    config: PipelineConfig, home: Home, *, rerun_changed_code: bool = False
) -> dict[str, Any]:
    """Every stage of a recipe, as tasks of the flow that calls this."""
    with open_session(config, home, rerun_changed_code=rerun_changed_code) as session:
        *before, evaluate, promote = session.nodes
        for node in before:
            _run(session, node)
        for _ in range(_MAX_EVALUATIONS):
            _run(session, evaluate)
            if _run(session, promote) is not None:
                break
        else:
            raise RuntimeError(
                f"the champion of {config.registry.name} changed {_MAX_EVALUATIONS} times while "
                "this run was evaluating; run the same command again"
            )
    return session.run.record.document()


def stage_task(stage: str, retries: int) -> Task[[Session, Node, str], Any]:
    """The task of a stage, with its retries: after 1, 2, 4, ... seconds, give or take a third."""
    # Prefect works the delays out for the number of retries that it is given with them.
    return run_stage_task.with_options(
        name=stage,
        retries=retries,
        retry_delay_seconds=exponential_backoff(backoff_factor=_FIRST_DELAY_SECONDS),
    )


def _run(session: Session, node: Node) -> Artifact | None:
    stage = stage_task(node.stage, session.config.compute.retries)
    state = stage(session, node, node.name, return_state=True)
    if state.is_failed() or state.is_crashed():
        events.stage_failed(session, node, state.result(raise_on_failure=False))
    artifact: Artifact | None = state.result()
    if isinstance(artifact, PromotionDecision):
        if state.name != _CACHED:
            events.decided(session.run.record.run, session.config.name, artifact)
        events.decision_page(session, artifact)
    return artifact
