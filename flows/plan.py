"""What a run would do, without doing it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from flows.archive import Archive
from flows.graph import Node, build_graph
from infra.code import changed_code
from infra.environment import Home
from infra.unavailable import TrackingUnavailable
from schemas.artifacts import Artifact
from schemas.pipeline import PipelineConfig

Action = Literal["reuse", "resume", "run"]


@dataclass(frozen=True)
class PlannedStage:
    """What would happen to one stage, and why."""

    name: str
    """Name of the stage; for `prepare_data` with its split."""
    action: Action
    """`reuse` a finished artifact, `resume` from a checkpoint, or `run` from the start."""
    reason: str
    """One clause for a person."""
    needs: tuple[str, ...] = ()
    """Stages whose artifacts it reads."""
    fingerprint: str | None = None
    """None while it depends on stages that have yet to run."""
    artifact: Artifact | None = None
    """What is reused."""
    changed: tuple[str, ...] = ()
    """Files whose code has changed since the artifact or checkpoint of the same work was made."""


@dataclass(frozen=True)
class Plan:
    """What would happen to every stage of a recipe."""

    stages: tuple[PlannedStage, ...]

    @property
    def all_reused(self) -> bool:
        """True if there is nothing left to do."""
        return all(stage.action == "reuse" for stage in self.stages)


def make_plan(config: PipelineConfig, home: Home, *, rerun_changed_code: bool = False) -> Plan:
    """Look at a recipe's inputs and at the store, and say what would run.

    rerun_changed_code: work that other code has done is done again.
    Raises `UserError` for everything that is wrong with the inputs.
    """
    archive = Archive(home, config.registry.name)
    nodes = build_graph(
        config,
        store=archive.store.root,
        find_incumbent=archive.incumbent,
        find_approval=archive.approval,
    )
    artifacts: dict[str, Artifact] = {}
    stages: list[PlannedStage] = []
    for node in nodes:
        stage = plan_stage(node, artifacts, archive, rerun_changed_code)
        if stage.artifact is not None:
            artifacts[node.name] = stage.artifact
        stages.append(stage)
    return Plan(tuple(stages))


def plan_stage(
    node: Node, artifacts: Mapping[str, Artifact], archive: Archive, rerun_changed_code: bool
) -> PlannedStage:
    """What would happen to one stage, given the artifacts that are reused before it."""
    waits = [name for name in node.needs if name not in artifacts]
    if waits:
        return PlannedStage(node.name, "run", f"after {_listed(tuple(waits))}", node.needs)
    try:
        request = node.build(artifacts)
        found = archive.finished(request)
    except TrackingUnavailable as error:
        return PlannedStage(node.name, "run", f"not known: {error}", node.needs)
    if found is not None:
        changed = tuple(changed_code(found.created_by.code))
        if changed and rerun_changed_code:
            why = f"again, for the code has changed: {_listed(changed)}"
            return PlannedStage(
                node.name, "run", why, node.needs, request.fingerprint, changed=changed
            )
        reason = "the same work is done"
        if changed:
            reason = f"reused, though the code has changed since: {_listed(changed)}"
        return PlannedStage(
            node.name, "reuse", reason, node.needs, request.fingerprint, found, changed
        )
    checkpoint = archive.store.latest_checkpoint(request.fingerprint)
    if checkpoint is not None:
        changed = tuple(changed_code(archive.store.checkpoint_code(request.fingerprint)))
        action: Action = "resume"
        reason = f"from {checkpoint.name}"
        if changed and rerun_changed_code:
            action = "run"
            reason = f"anew, for the code has changed since {checkpoint.name}: {_listed(changed)}"
        elif changed:
            reason += f", though the code has changed since: {_listed(changed)}"
        return PlannedStage(
            node.name, action, reason, node.needs, request.fingerprint, changed=changed
        )
    return PlannedStage(node.name, "run", "not done before", node.needs, request.fingerprint)


def _listed(files: tuple[str, ...]) -> str:
    shown = ", ".join(files[:3])
    return shown if len(files) <= 3 else f"{shown} and {len(files) - 3} more"
