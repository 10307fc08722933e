"""Every stage run once without a fault: what a trial starts from, and what it must come to."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.graph import Node, build_graph
from flows.recipes import load_recipe
from infra.store import Store
from infra.tracking import read_metrics
from schemas.artifacts import Artifact
from schemas.fingerprint import parents
from schemas.pipeline import PipelineConfig
from schemas.requests import StageRequest
from tests.faults.zygote import ROOT, Zygote

RECIPE = ROOT / "tests" / "faults" / "recipe.yaml"
ALGORITHMS = ("grpo", "ppo", "rloo", "dpo")
TRAINING = (
    "train_sft",
    "train_reward_model",
    "train_process_reward_model",
    *(f"train_rl:{name}" for name in ALGORITHMS),
)
"""Cases whose stage writes checkpoints."""
OTHERS = (
    "prepare_data:demonstrations",
    "prepare_data:preferences_held_out",
    "sample_preferences",
    "label_steps",
    "credit:grpo",
    "evaluate:grpo",
)

Metrics = dict[tuple[int, str], float]


@dataclass(frozen=True)
class Reference:
    """One stage that nothing disturbed."""

    request: StageRequest
    artifact: Artifact
    metrics: Metrics
    cpu: float
    """Processor seconds."""
    num_events: int
    """Operations on files below the trial's root."""


class House:
    """The store in which every stage runs once, when it is asked for, and what each came to."""

    def __init__(self, root: Path, zygote: Zygote) -> None:
        self.root = root
        self.store = Store(root / "store")
        self._references: dict[str, Reference] = {}
        self._zygote = zygote
        self._done: set[str] = set()
        self._lock = threading.Lock()

    def reference(self, case: str) -> Reference:
        """What a stage came to: `train_sft`, `prepare_data:prompts`, `train_rl:ppo`."""
        _, _, algorithm = case.partition(":")
        self.complete(algorithm if algorithm in ALGORITHMS else ALGORITHMS[0])
        return self._references[case]

    def complete(self, algorithm: str) -> None:
        """Run every stage but the promotion with an algorithm."""
        with self._lock:
            if algorithm not in self._done:
                self._run(algorithm)
                self._done.add(algorithm)

    def _run(self, algorithm: str) -> None:
        made: dict[str, Artifact] = {}
        for node in nodes(config(algorithm), self.store):
            if node.stage == "promote":
                break
            request = node.build(made)
            name = _case(node, algorithm)
            made[node.name] = self._reference(name, request).artifact

    def _reference(self, name: str, request: StageRequest) -> Reference:
        for known in self._references.values():
            if known.request.fingerprint == request.fingerprint:
                return known
        work = self.store.work_dir(request.fingerprint)
        (work / "request.json").write_text(request.model_dump_json())
        ended = self._zygote.run(
            entry="stages.main:main",
            argv=[str(work)],
            log=str(work / "stage.log"),
            root=str(self.root),
        )
        assert ended.code == 0, f"{ended}\n{(work / 'stage.log').read_text()[-4000:]}"
        artifact = self.store.find(request.fingerprint)
        assert artifact is not None
        reference = Reference(request, artifact, shipped_metrics(work), ended.cpu, ended.num_events)
        self._references[name] = reference
        return reference

    def copy_inputs(self, request: StageRequest, to: Store) -> StageRequest:
        """Copy what a stage reads to another store; the same request there."""
        for fingerprint in parents(request):
            copy_artifact(self.store, fingerprint, to)
        runtime = request.runtime.model_copy(update={"store": str(to.root)})
        return request.model_copy(update={"runtime": runtime})


def config(algorithm: str, *more: str) -> PipelineConfig:
    """The recipe with one of the algorithms."""
    return load_recipe(str(RECIPE), [f"rl.algorithm={algorithm}", *more])


def nodes(recipe: PipelineConfig, store: Store) -> list[Node]:
    """The stages of the recipe, while no model is a champion."""
    return build_graph(recipe, store=store.root, find_incumbent=lambda _: None)


def copy_artifact(store: Store, fingerprint: str, to: Store) -> None:
    """Copy a finished artifact to another store."""
    target = to.artifacts_folder / fingerprint
    if not target.exists():
        shutil.copytree(store.artifacts_folder / fingerprint, target)


def shipped_metrics(work: Path) -> Metrics:
    """What a tracking server would have: each metric of each step once.

    A stage that starts again before its first checkpoint writes steps again, and they must be the
    same numbers.
    """
    found: Metrics = {}
    for line in read_metrics(work / "metrics.jsonl"):
        for name, value in line.metrics.items():
            key = (line.step, name)
            assert found.setdefault(key, value) == value, f"{key}: {found[key]}, then {value}"
    return found


def content(artifact: Artifact) -> dict[str, Any]:
    """Everything of an artifact that a fault must not change: all but who made it, and for whom."""
    return artifact.model_dump(exclude={"created_by", "mlflow_run_id"})


def steps_in(log: str) -> list[int]:
    """The steps that a piece of a stage's log tells of."""
    return list(_steps(log.splitlines()))


def _steps(lines: Sequence[str]) -> Iterator[int]:
    for line in lines:
        words = line.split()
        if len(words) > 2 and words[0] == "step" and "/" in words[1]:
            yield int(words[1].split("/")[0])


def _case(node: Node, algorithm: str) -> str:
    if node.stage in ("train_rl", "credit", "evaluate"):
        return f"{node.stage}:{algorithm}"
    return node.name
