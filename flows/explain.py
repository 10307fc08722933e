"""Why each stage would be reused or run: what differs from the nearest work done before."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.text import Text

from flows.archive import Archive
from flows.graph import Node, build_graph
from flows.plan import PlannedStage, plan_stage
from infra.code import package_versions
from infra.environment import Home
from infra.store import Store
from infra.unavailable import TrackingUnavailable
from schemas.artifacts import Artifact
from schemas.fingerprint import fingerprint_fields
from schemas.pipeline import PipelineConfig
from schemas.requests import StageRequest

_SECTIONS = {
    "train_sft": "sft",
    "train_rl": "rl",
    "credit": "rl",
    "evaluate": "evaluation",
}
"""Section of the recipe that a stage's `config` comes from, where it has another name."""
_MISSING = "(not set)"
_NEAR = 5
"""Fields in which unfinished work may differ to be spoken of when a stage starts anew."""


@dataclass(frozen=True)
class Change:
    """One leaf in which a stage's work differs from earlier work."""

    place: str
    """Dotted name in the fingerprint's fields."""
    before: Any
    """Value then; `(not set)` where there was none."""
    now: Any
    """Value now; `(not set)` where there is none."""


@dataclass(frozen=True)
class Explanation:
    """What would happen to a stage, and the reasons, one line each."""

    planned: PlannedStage
    reasons: tuple[str, ...]
    nearest: str | None = None
    """Fingerprint of the earlier artifact that it was compared with."""
    changes: tuple[Change, ...] = ()
    """The stage's own differences; those of inputs that are yet to be made are not known."""


def explain(
    config: PipelineConfig, home: Home, *, rerun_changed_code: bool = False
) -> list[Explanation]:
    """The plan of a recipe, with what has changed against the nearest earlier artifact.

    For a stage behind one that has to run, the latter's nearest earlier artifact stands in, so
    that the stage's own differences show.
    """
    archive = Archive(home, config.registry.name)
    reused: dict[str, Artifact] = {}
    known: dict[str, Artifact] = {}
    explanations: list[Explanation] = []
    for node in build_graph(
        config,
        store=archive.store.root,
        find_incumbent=archive.incumbent,
        find_approval=archive.approval,
    ):
        planned = plan_stage(node, reused, archive, rerun_changed_code)
        request = _request(node, known)
        explanation = _explain(node, planned, request, archive.store)
        explanations.append(explanation)
        if planned.artifact is not None:
            reused[node.name] = known[node.name] = planned.artifact
        elif explanation.nearest is not None:
            stand_in = archive.store.find(explanation.nearest)
            if stand_in is not None:
                known[node.name] = stand_in
    return explanations


def differences(before: Any, now: Any) -> tuple[Change, ...]:
    """Every leaf that two nested values do not share, by place."""
    old, new = dict(_leaves(before, "")), dict(_leaves(now, ""))
    return tuple(
        Change(place, old.get(place, _MISSING), new.get(place, _MISSING))
        for place in sorted(old.keys() | new.keys())
        if old.get(place, _MISSING) != new.get(place, _MISSING)
    )


def nearest(store: Store, fields: dict[str, Any]) -> tuple[str, tuple[Change, ...]] | None:
    """The artifact of the same stage with the fewest differing leaves; the newest of equals."""
    best: tuple[int, float, str, tuple[Change, ...]] | None = None
    for fingerprint, earlier, made in store.identities():
        if (earlier.get("stage"), earlier.get("split")) != (fields["stage"], fields.get("split")):
            continue
        changes = differences(earlier, fields)
        if best is None or (len(changes), -made) < best[:2]:
            best = (len(changes), -made, fingerprint, changes)
    return None if best is None else (best[2], best[3])


def left_behind(node: Node, request: StageRequest, store: Store) -> str | None:
    """What to say where a stage starts anew though work much like it was begun; else None.

    That is work of the same stage with a checkpoint, which no other run is at, and which differs
    in a few fields at most.
    """
    fields = fingerprint_fields(request)
    best: tuple[tuple[Change, ...], str, str] | None = None
    for fingerprint, earlier, checkpoint in store.unfinished():
        if fingerprint == request.fingerprint or earlier.get("stage") != fields["stage"]:
            continue
        changes = differences(earlier, fields)
        if len(changes) > _NEAR or (best is not None and len(changes) >= len(best[0])):
            continue
        with store.try_lock(fingerprint) as free:
            if free:
                best = changes, fingerprint, checkpoint
    if best is None:
        return None
    what = "; ".join(_describe(node, change) for change in best[0])
    return f"starting anew: {what} (checkpoint {best[2]} of {best[1][:12]} is not used)"


def print_explanations(console: Console, explanations: list[Explanation]) -> None:
    """One block a stage: what would happen, and under it why."""
    styles = {"reuse": "green", "resume": "yellow", "run": "cyan"}
    for one in explanations:
        planned = one.planned
        line = Text(f"{planned.name}: ")
        line.append(planned.action, style=styles[planned.action])
        if planned.fingerprint:
            line.append(f"  {planned.fingerprint[:12]}", style="dim")
        console.print(line)
        for reason in one.reasons:
            console.print(Text(f"    {reason}"), soft_wrap=True)


def document(explanations: list[Explanation]) -> dict[str, Any]:
    """What `--explain --json` prints."""
    return {
        "explain": [
            {
                "name": one.planned.name,
                "action": one.planned.action,
                "fingerprint": one.planned.fingerprint,
                "nearest": one.nearest,
                "reasons": list(one.reasons),
                "changes": [vars(change) for change in one.changes],
                "changed_code": list(one.planned.changed),
            }
            for one in explanations
        ]
    }


def _request(node: Node, known: dict[str, Artifact]) -> StageRequest | None:
    """What the stage would be asked; None while its inputs or the registry's answer are missing."""
    if any(name not in known for name in node.needs):
        return None
    try:
        return node.build(known)
    except TrackingUnavailable:
        return None


def _explain(
    node: Node, planned: PlannedStage, request: StageRequest | None, store: Store
) -> Explanation:
    if planned.artifact is not None:
        return Explanation(planned, (planned.reason, *_packages(planned.artifact)))
    if planned.changed and planned.fingerprint and store.find(planned.fingerprint):
        return Explanation(planned, (planned.reason,), planned.fingerprint)
    reasons = [] if planned.reason == "not done before" else [planned.reason]
    if planned.action == "run" and planned.fingerprint is not None and request is not None:
        begun = left_behind(node, request, store)
        reasons.extend([] if begun is None else [begun])
    found = nearest(store, fingerprint_fields(request)) if request is not None else None
    if found is None:
        reasons.append(f"no earlier artifact of {node.name} to compare with")
        return Explanation(planned, tuple(reasons))
    fingerprint, changes = found
    if fingerprint == planned.fingerprint:
        # A decision whose registry is another one now.
        reasons.append("the same work is done, but the registry does not hold its model")
    elif planned.fingerprint is None and not changes:
        reasons.append("nothing else has changed: reused if what comes before stays the same")
    else:
        reasons.append(f"against {fingerprint[:12]}, the nearest done before:")
        reasons.extend(f"  {_describe(node, change)}" for change in changes)
    return Explanation(planned, tuple(reasons), fingerprint, changes)


def _packages(artifact: Artifact) -> Iterator[str]:
    """Packages that have another version now than when an artifact was made."""
    then, now = artifact.created_by.packages, package_versions()
    changed = [
        f"{name} {then.get(name, 'absent')} → {now.get(name, 'absent')}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if changed:
        yield f"though packages have changed since: {', '.join(changed)}"


def _describe(node: Node, change: Change) -> str:
    head, _, rest = change.place.partition(".")
    what = f"{_shown(change.before)} → {_shown(change.now)}"
    if head == "version":
        return f"the stage's own version: {what}"
    if head == "sources":
        return f"{_source(node, rest)}: {what}"
    if head == "config":
        section = _SECTIONS.get(node.stage, node.stage)
        return f"{section}.{rest}: {what}"
    if head == "source":
        return f"data.{node.name.partition(':')[2]}.{rest}: {what}"
    if _is_digest(change.now) or _is_digest(change.before):
        return f"input {change.place}: {what}"
    return f"{change.place}: {what}"


def _source(node: Node, name: str) -> str:
    """What a digest of `request.sources` stands for."""
    split = node.name.partition(":")[2]
    if split:
        kinds = {"path": "content of the file", "generator": "module of the function"}
        return f"{kinds.get(name, 'module of the function')} data.{split}.{name}"
    if name.startswith("model:"):
        return f"file {name.removeprefix('model:')} of model.path"
    return f"module of the function {name}"


def _leaves(value: Any, place: str) -> Iterator[tuple[str, Any]]:
    items: Any = None
    if isinstance(value, dict) and value:
        items = value.items()
    elif isinstance(value, list | tuple) and value:
        items = enumerate(value)
    if items is None:
        yield place, [] if value == () else value
        return
    for key, item in items:
        yield from _leaves(item, f"{place}.{key}" if place else str(key))


def _is_digest(value: Any) -> bool:
    return isinstance(value, str) and len(value) == 64 and not value.strip("0123456789abcdef")


def _shown(value: Any) -> str:
    text = value[:12] if _is_digest(value) else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
