"""From a registered model back to its evaluation, data, configuration, code and packages."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text
from rich.tree import Tree

from flows.runs import RunRecord, Runs
from infra.code import changed_code
from infra.environment import Home
from infra.store import Store
from schemas.artifacts import (
    Artifact,
    CreatedBy,
    CreditReport,
    DatasetArtifact,
    EvaluationReport,
    PolicyCheckpoint,
    PromotionDecision,
    RewardModelCheckpoint,
)
from schemas.fingerprint import digest

if TYPE_CHECKING:
    from infra.registry import RegisteredVersion

_PREFIX = "posttrain.lineage."


@dataclass(frozen=True)
class Lineage:
    """A registered version and everything that it came from."""

    version: RegisteredVersion
    decision: PromotionDecision | None
    """None where the store no longer holds it; so with the rest."""
    evaluation: EvaluationReport | None
    model: Artifact | None
    artifacts: dict[str, Artifact]
    """The model's and the evaluation's ancestors that the store holds, by fingerprint."""
    run: RunRecord | None
    """The first run that came to this decision."""


def artifact_name(artifact: Artifact | None) -> str:
    """The stage that made an artifact, with the split of prepared data; empty for None."""
    match artifact:
        case DatasetArtifact():
            return f"{_data_stage(artifact)}:{artifact.split}"
        case PolicyCheckpoint():
            return "train_sft" if artifact.algorithm == "sft" else "train_rl"
        case RewardModelCheckpoint():
            outcome = artifact.kind == "outcome"
            return "train_reward_model" if outcome else "train_process_reward_model"
        case EvaluationReport():
            return "evaluate"
        case CreditReport():
            return "credit"
        case PromotionDecision():
            return "promote"
        case _:
            return ""


def ancestors(store: Store, *artifacts: Artifact) -> dict[str, Artifact]:
    """Everything that artifacts were made from, as far as the store holds it, by fingerprint."""
    found: dict[str, Artifact] = {}
    pending = [parent for artifact in artifacts for parent in artifact.parents]
    while pending:
        fingerprint = pending.pop()
        parent = store.find(fingerprint) if fingerprint not in found else None
        if parent is not None:
            found[fingerprint] = parent
            pending.extend(parent.parents)
    return found


def lineage_tags(store: Store, model: PolicyCheckpoint, run: Mapping[str, str]) -> dict[str, str]:
    """Tags for a registered version: content of every ancestor, configuration, code, packages.

    run: tags of the MLflow run, of which those that name the run and its configuration are taken.
    """
    tags = {_tag(one): one.sha256 for one in ancestors(store, model).values()}
    tags |= _made_by(model.created_by)
    names = ("posttrain.run", "posttrain.recipe", "posttrain.config_digest")
    return tags | {name: run[name] for name in names if name in run}


def lineage_of(home: Home, model: str) -> Lineage:
    """The lineage of `NAME`, `NAME@ALIAS`, `NAME@VERSION` or `NAME/VERSION`."""
    from infra.registry import Registry

    version = Registry(home.mlflow_uri, home.locks).find(model)
    store = home.store
    decision = _find(store, version.tags.get("posttrain.decision"))
    evaluation = _find(store, version.tags.get("posttrain.evaluation"))
    policy = _find(store, version.fingerprint)
    if policy is not None and policy.sha256 != version.sha256:
        policy = None  # the same work, done again, with other bytes than those registered
    known = [one for one in (policy, evaluation) if one is not None]
    assert decision is None or isinstance(decision, PromotionDecision)
    assert evaluation is None or isinstance(evaluation, EvaluationReport)
    return Lineage(
        version=version,
        decision=decision,
        evaluation=evaluation,
        model=policy,
        artifacts=ancestors(store, *known),
        run=_run(store, version),
    )


def tree(lineage: Lineage) -> Tree:
    """The lineage for a terminal."""
    version, tags = lineage.version, lineage.version.tags
    aliases = "".join(f" @{alias}" for alias in version.aliases)
    root = Tree(Text(f"{version.name} version {version.version}{aliases}", style="bold"))
    root.add(_text("content", version.sha256))
    if lineage.decision is not None:
        decision = f"{lineage.decision.outcome}  {lineage.decision.fingerprint[:12]}"
        branch = root.add(_text("decision", decision))
        for check in lineage.decision.checks:
            branch.add(Text(f"{'passed' if check.passed else 'failed'}: {check.reason}"))
        said = lineage.decision.approval
        if said is not None:
            verdict = "approved" if said.granted else "refused"
            branch.add(Text(f"{verdict} by {said.by} at {said.when}: {said.reason}"))
    if lineage.evaluation is not None:
        _add_evaluation(root, lineage.evaluation)
    if lineage.model is not None:
        _add_artifact(root, lineage.model, lineage, set())
    else:
        branch = root.add(_text("train_rl", f"{version.fingerprint[:12]} is not in the store"))
        for name, sha256 in sorted(tags.items()):
            if name.startswith(_PREFIX):
                branch.add(_text(name.removeprefix(_PREFIX), f"content {sha256[:12]}"))
    _add_configuration(root, lineage)
    _add_code(root, lineage)
    return root


def document(lineage: Lineage) -> dict[str, Any]:
    """What `posttrain lineage --json` prints."""
    version = lineage.version
    artifacts = [one for one in (lineage.model, *lineage.artifacts.values()) if one is not None]
    return {
        "name": version.name,
        "version": version.version,
        "aliases": list(version.aliases),
        "sha256": version.sha256,
        "fingerprint": version.fingerprint,
        "run": lineage.run.run if lineage.run else None,
        "decision": _dump(lineage.decision),
        "evaluation": _dump(lineage.evaluation),
        "artifacts": [
            {
                "stage": artifact_name(one),
                "fingerprint": one.fingerprint,
                "sha256": one.sha256,
                "parents": list(one.parents),
                "mlflow_run_id": one.mlflow_run_id,
                "metrics": one.metrics,
                "created_by": one.created_by.model_dump(mode="json"),
            }
            for one in artifacts
        ],
        "tags": version.tags,
    }


def _tag(artifact: Artifact) -> str:
    """The tag of a registered version that holds the content digest of an ancestor."""
    return f"{_PREFIX}{artifact_name(artifact).replace(':', '.')}"


def _data_stage(artifact: DatasetArtifact) -> str:
    """Pairs and step labels are prepared from files, or sampled: the modules that ran tell."""
    sampled = {"preference": "sample_preferences", "steps": "label_steps"}
    stage = sampled.get(artifact.layout, "")
    code = artifact.created_by.code
    return (
        stage if f"stages.{stage}" in code and "stages.prepare_data" not in code else "prepare_data"
    )


def _made_by(created: CreatedBy) -> dict[str, str]:
    return {
        "posttrain.version": created.posttrain,
        "posttrain.python": created.python,
        "posttrain.packages": json.dumps(created.packages, sort_keys=True),
        "posttrain.code": digest(created.code),
    }


def _find(store: Store, fingerprint: str | None) -> Artifact | None:
    return store.find(fingerprint) if fingerprint and fingerprint != "none" else None


def _run(store: Store, version: RegisteredVersion) -> RunRecord | None:
    decision = version.tags.get("posttrain.decision")
    records = [
        record
        for record in Runs(store.root).all()
        if any(row.fingerprint == decision for row in record.stages)
    ]
    return records[-1] if records else None


def _add_evaluation(root: Tree, report: EvaluationReport) -> None:
    branch = root.add(_text("evaluate", _digests(report)))
    incumbent = "SFT baseline" if report.incumbent_is_baseline else "incumbent"
    for label, scores in (("candidate", report.candidate), (incumbent, report.incumbent)):
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in scores.pass_at.items())
        records = f"{scores.num_records} records"
        branch.add(Text(f"{label}: {numbers}, reward {scores.reward:.4f}, {records}"))


def _add_artifact(above: Tree, artifact: Artifact, lineage: Lineage, shown: set[str]) -> None:
    name = artifact_name(artifact)
    seen = artifact.fingerprint in shown
    branch = above.add(_text(name, _digests(artifact) + ("  (see above)" if seen else "")))
    if seen:
        return
    shown.add(artifact.fingerprint)
    then = lineage.version.tags.get(_tag(artifact), artifact.sha256)
    if then != artifact.sha256:
        text = f"made again since: this version came from content {then[:12]}"
        branch.add(Text(text, style="yellow"))
    detail = _detail(artifact)
    if detail:
        branch.add(Text(detail, style="dim"))
    for fingerprint in artifact.parents:
        parent = lineage.artifacts.get(fingerprint)
        if parent is None:
            branch.add(_text("input", f"{fingerprint[:12]} is not in the store"))
        else:
            _add_artifact(branch, parent, lineage, shown)


def _detail(artifact: Artifact) -> str:
    parts: list[str] = []
    if isinstance(artifact, DatasetArtifact):
        parts.append(f"{artifact.num_records} records, {artifact.num_prompts} prompts")
    if isinstance(artifact, PolicyCheckpoint | RewardModelCheckpoint):
        parts.append(f"{artifact.num_parameters:,} parameters, {artifact.num_steps} steps")
    if artifact.mlflow_run_id:
        parts.append(f"MLflow run {artifact.mlflow_run_id}")
    return ", ".join(parts)


def _add_configuration(root: Tree, lineage: Lineage) -> None:
    tags, run = lineage.version.tags, lineage.run
    name = run.run if run else tags.get("posttrain.run", "not known")
    branch = root.add(_text("configuration", f"run {name}"))
    recipe = run.recipe if run else tags.get("posttrain.recipe")
    config = run.config_digest if run else tags.get("posttrain.config_digest")
    if recipe and config:
        branch.add(Text(f"recipe {recipe}, digest {config[:12]}"))
    if run is not None:
        branch.add(Text(f"every field: {run.store}/runs/{run.run}/run.json"))


def _add_code(root: Tree, lineage: Lineage) -> None:
    tags = lineage.version.tags
    created = lineage.model.created_by if lineage.model else None
    if created is not None:
        tags = {**tags, **_made_by(created)}
    if "posttrain.code" not in tags:
        return
    branch = root.add(_text("code", f"posttrain {tags['posttrain.version']}"))
    branch.add(Text(f"digest of all modules {tags['posttrain.code'][:12]}"))
    changed = changed_code(created.code) if created is not None else []
    if changed:
        branch.add(Text(f"changed since: {', '.join(changed)}", style="yellow"))
    packages = json.loads(tags["posttrain.packages"])
    branch = root.add(_text("packages", f"Python {tags['posttrain.python']}"))
    branch.add(Text(", ".join(f"{name} {found}" for name, found in packages.items())))


def _text(label: str, value: str) -> Text:
    return Text(f"{label}  ", style="bold").append(value, style="not bold")


def _digests(artifact: Artifact) -> str:
    return f"content {artifact.sha256[:12]}, fingerprint {artifact.fingerprint[:12]}"


def _dump(artifact: Artifact | None) -> dict[str, Any] | None:
    if artifact is None:
        return None
    return artifact.model_dump(mode="json", exclude={"created_by": {"code"}})
