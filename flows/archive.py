"""What is already there: finished work in the store, and the models of the registry."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from flows.lineage import lineage_tags
from infra.code import created_by
from infra.environment import Home
from infra.files import file_lock
from schemas.artifacts import (
    Artifact,
    EvaluationReport,
    GateCheck,
    PolicyCheckpoint,
    PromotionDecision,
)
from schemas.base import UserError
from schemas.evaluation import GateConfig
from schemas.fingerprint import parents
from schemas.requests import PromoteRequest, StageRequest

if TYPE_CHECKING:
    from infra.registry import RegisteredVersion, Registry

CHALLENGER = "challenger"

_ARTIFACT = "posttrain.artifact"
_EVALUATION = "posttrain.evaluation"
_DECISION = "posttrain.decision"
_INCUMBENT = "posttrain.incumbent"
_ROLLED_BACK = "posttrain.rolled_back"
_NONE = "none"

Judge = Callable[[EvaluationReport, GateConfig, Path], Sequence[GateCheck]]
"""The gate: report, rules, and the folder of the per-record results."""


class Archive:
    """The store and the registry of a home, as one registered model sees them."""

    def __init__(
        self,
        home: Home,
        model: str,
        *,
        patience: float = 0.0,
        on_wait: Callable[[str], None] = lambda text: None,
    ) -> None:
        """patience: seconds to wait for a registry that is away; `on_wait` is told of a wait."""
        self.home = home
        self.model = model
        self.store = home.store
        self._patience = patience
        self._on_wait = on_wait

    @functools.cached_property
    def registry(self) -> Registry:
        """The registry; only what needs it pays for importing MLflow."""
        from infra.registry import Registry

        return Registry(self.home.mlflow_uri, self.home.locks, self._patience, self._on_wait)

    def finished(self, request: StageRequest, *, verify: bool = False) -> Artifact | None:
        """The artifact of a request whose work is done, or None.

        A decision counts only while the registry holds the version that it speaks of.
        """
        find = self.store.find_verified if verify else self.store.find
        artifact = find(request.fingerprint)
        if isinstance(artifact, PromotionDecision):
            assert isinstance(request, PromoteRequest)
            version = self.registry.version_of(self.model, request.candidate.sha256)
            if version is None or version.version != artifact.version:
                return None
        return artifact

    def latest_checkpoint(self, fingerprint: str) -> str | None:
        """Name of the newest checkpoint of unfinished work, or None."""
        folder = self.store.work_folder / fingerprint / "checkpoints"
        names = sorted(path.name for path in folder.glob("[!.]*")) if folder.is_dir() else []
        return names[-1] if names else None

    def incumbent(self, candidate: PolicyCheckpoint) -> PolicyCheckpoint | None:
        """The champion that a candidate has to beat, or None while there is none.

        If the candidate is the champion, the decision that promoted it stands: its incumbent is
        the model that it was compared with then.
        """
        champion = self.registry.champion(self.model)
        if champion is None:
            return None
        if champion.sha256 != candidate.sha256:
            return self._policy(champion)
        former = champion.tags.get(_INCUMBENT, _NONE)
        if former == _NONE:
            return None
        stored = self.store.find(former)
        if isinstance(stored, PolicyCheckpoint):
            return stored
        for version in self.registry.list_models():
            if version.name == self.model and version.fingerprint == former:
                return self._policy(version)
        return None

    def promote(
        self, request: PromoteRequest, judge: Judge, mlflow_run_id: str
    ) -> PromotionDecision | None:
        """Judge a candidate, register it, and make it the champion if every check holds.

        Doing it again changes nothing. Returns None if another model has become the champion since
        the evaluation: evaluate against that one first.
        """
        lock = self.home.locks / f"promotion.{self.model}.lock"
        with file_lock(lock, lambda: None):
            incumbent = self.incumbent(request.candidate)
            if not _judged_against(request.report, incumbent):
                return None
            records = self.store.path(request.report)
            checks = tuple(judge(request.report, request.gate, records))
            promoted = all(check.passed for check in checks)
            run = self.registry.client.get_run(mlflow_run_id).data.tags
            tags = {
                **lineage_tags(self.store, request.candidate, run),
                _ARTIFACT: _portable(request.candidate),
                _EVALUATION: request.report.fingerprint,
                _DECISION: request.fingerprint,
                _INCUMBENT: incumbent.fingerprint if incumbent is not None else _NONE,
            }
            version = self._register(request, tags, mlflow_run_id)
            if promoted:
                self.registry.promote(self.model, version)
            return self._write_decision(request, version, checks, promoted)

    def aliases_now(self, decision: PromotionDecision) -> tuple[tuple[str, ...], str | None]:
        """The aliases that a decision's version holds today, and why it was rolled back, if so."""
        version = self.registry.version(self.model, decision.version)
        rolled_back = version.tags.get(_ROLLED_BACK)
        if not decision.promoted or "champion" in version.aliases:
            rolled_back = None
        return version.aliases, rolled_back

    def _register(self, request: PromoteRequest, tags: dict[str, str], mlflow_run_id: str) -> str:
        candidate = request.candidate
        folder = self.store.path(candidate)
        version = self.registry.register(self.model, candidate, folder, mlflow_run_id, tags)
        # A version that was known before carries the tags of an earlier decision.
        for key, value in tags.items():
            self.registry.client.set_model_version_tag(self.model, version, key, value)
        self.registry.set_alias(self.model, CHALLENGER, version)
        return version

    def _write_decision(
        self,
        request: PromoteRequest,
        version: str,
        checks: tuple[GateCheck, ...],
        promoted: bool,
    ) -> PromotionDecision:
        aliases = self.registry.aliases_of(self.model, version)
        # Left by a registry that is gone, or is another one now.
        if self.store.find(request.fingerprint) is not None:
            self.store.quarantine(request.fingerprint)
        content = self.store.work_dir(request.fingerprint) / "content"
        shutil.rmtree(content, ignore_errors=True)
        content.mkdir()
        numbers = {
            "promoted": promoted,
            "registered_model": self.model,
            "version": version,
            "aliases": aliases,
            "gate": request.gate.model_dump(mode="json"),
            "checks": [check.model_dump(mode="json") for check in checks],
            "candidate": request.report.candidate.model_dump(mode="json"),
            "baseline": request.report.baseline.model_dump(mode="json"),
            "incumbent": request.report.incumbent.model_dump(mode="json"),
            "incumbent_is_baseline": request.report.incumbent_is_baseline,
        }
        text = json.dumps(numbers, indent=2, sort_keys=True)
        (content / "decision.json").write_text(text + "\n", encoding="utf-8")
        decision = PromotionDecision(
            uri=self.store.content_uri(request.fingerprint),
            sha256=self.store.seal(content),
            fingerprint=request.fingerprint,
            parents=parents(request),
            mlflow_run_id=request.runtime.mlflow_run_id,
            created_by=created_by(),
            metrics={"promoted": float(promoted)},
            promoted=promoted,
            registered_model=self.model,
            version=version,
            aliases=aliases,
            checks=checks,
            reasons=_reasons(checks, promoted),
        )
        self.store.publish(request.fingerprint, decision)
        return decision

    def _policy(self, version: RegisteredVersion) -> PolicyCheckpoint:
        """The artifact of a registered version, fetched from the registry if the store lacks it."""
        stored = self.store.find(version.fingerprint) if version.fingerprint else None
        if isinstance(stored, PolicyCheckpoint) and stored.sha256 == version.sha256:
            return stored
        text = version.tags.get(_ARTIFACT)
        if text is None:
            raise UserError(
                f"the champion of {self.model}, version {version.version}, was not registered by "
                "posttrain and cannot be compared with: remove its alias champion, "
                "or set registry.name to another name"
            )
        artifact = PolicyCheckpoint.model_validate_json(text)
        if stored is not None:
            # The same work, with other bytes than those that were shipped: compare with the latter.
            artifact = artifact.model_copy(
                update={
                    "fingerprint": version.sha256,
                    "uri": self.store.content_uri(version.sha256),
                }
            )
            again = self.store.find(version.sha256)
            if isinstance(again, PolicyCheckpoint):
                return again
        with self.store.lock(artifact.fingerprint):
            content = self.store.work_dir(artifact.fingerprint) / "content"
            shutil.rmtree(content, ignore_errors=True)
            self.registry.download(self.model, version.version, content)
            self.store.publish(artifact.fingerprint, artifact)
        return artifact


def _judged_against(report: EvaluationReport, incumbent: PolicyCheckpoint | None) -> bool:
    if incumbent is None:
        return report.incumbent_is_baseline
    return report.incumbent.sha256 == incumbent.sha256


def _portable(artifact: PolicyCheckpoint) -> str:
    """The artifact without the digests of modules, which are too long for a tag."""
    created = artifact.created_by.model_copy(update={"code": {}})
    return artifact.model_copy(update={"created_by": created}).model_dump_json()


def _reasons(checks: tuple[GateCheck, ...], promoted: bool) -> tuple[str, ...]:
    """Why it was promoted: every check. Why it was refused: the checks that failed."""
    return tuple(check.reason for check in checks if promoted or not check.passed)
