"""What is already there: finished work in the store, and the models of the registry."""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from flows.lineage import lineage_tags
from infra.code import created_by
from infra.environment import Home
from infra.files import file_lock
from infra.redaction import redact
from infra.store import Store
from schemas.artifacts import (
    Approval,
    Artifact,
    EvaluationReport,
    GateCheck,
    PolicyCheckpoint,
    PromotionDecision,
)
from schemas.base import UserError
from schemas.fingerprint import fingerprint, parents
from schemas.requests import PromoteRequest, Runtime, StageRequest

if TYPE_CHECKING:
    from infra.registry import RegisteredVersion, Registry

_log = logging.getLogger(__name__)

CHALLENGER = "challenger"

_ARTIFACT = "posttrain.artifact"
_EVALUATION = "posttrain.evaluation"
_DECISION = "posttrain.decision"
_INCUMBENT = "posttrain.incumbent"
_ROLLED_BACK = "posttrain.rolled_back"
_APPROVAL = "posttrain.approval"
_BY_HAND = "posttrain.promoted_by_hand"
_NONE = "none"
_REQUEST_FILE = "request.json"
"""In a decision that waits for a person: what was asked, so that it can be asked again."""

Judge = Callable[[PromoteRequest, Store], Sequence[GateCheck]]
"""The gate: what is asked, and the store that holds its inputs."""


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
        stored = self.store.find_verified(former)
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

        Where the gate asks for approval and none is given yet, the decision waits instead. Doing it
        again changes nothing. Returns None if another model has become the champion since the
        evaluation: evaluate against that one first. Raises `CorruptArtifact` if the registry holds
        other files than those that were judged.
        """
        with self._alone():
            incumbent = self.incumbent(request.candidate)
            if not _judged_against(request.report, incumbent):
                return None
            checks = tuple(judge(request, self.store))
            run = self.registry.client.get_run(mlflow_run_id).data.tags
            tags = {
                **lineage_tags(self.store, request.candidate, run),
                _ARTIFACT: _portable(request.candidate),
                _EVALUATION: request.report.fingerprint,
                _INCUMBENT: incumbent.fingerprint if incumbent is not None else _NONE,
            }
            return self._settle(request, checks, tags, mlflow_run_id)

    def approval(self, request: PromoteRequest) -> Approval | None:
        """What a person said about the decision on a request that has no approval yet, or None."""
        version = self.registry.version_of(self.model, request.candidate.sha256)
        said = _said(version) if version is not None else None
        return said if said is not None and said.decision == fingerprint(request) else None

    def approve(self, which: str, *, granted: bool, by: str, reason: str) -> PromotionDecision:
        """Promote, or refuse, a version whose decision waits for a person.

        which: alias or number. The checks are those that the person saw. Doing it again changes
        nothing. Raises `UserError` where nothing waits, or the champion is another one since.
        """
        with self._alone():
            version = self.registry.chosen(self.model, which)
            name = f"{self.model} version {version.version}"
            decided, said = self._decided(version)
            if said is not None and said.granted != granted:
                verdict = "approved" if said.granted else "refused"
                raise UserError(f"{name} is not awaiting approval: {verdict} by {said.by}")
            if not decided.awaiting_approval:
                if said is None:
                    raise UserError(f"{name} is not awaiting approval: {decided.outcome}")
                return decided
            when = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
            said = said or Approval(
                granted=granted,
                by=by,
                reason=redact(reason),
                when=when,
                decision=decided.fingerprint,
            )
            request = self._waiting_request(decided, said)
            if not _judged_against(request.report, self.incumbent(request.candidate)):
                raise UserError(
                    f"another model has become the champion since {name} was judged: run its "
                    "recipe again, and it is evaluated against that one"
                )
            return self._settle(request, decided.checks, {}, version.run_id)

    def promote_by_hand(self, version: str, reason: str) -> None:
        """Make a version the champion past the gate; why is written down on the version."""
        with self._alone():
            self.registry.verify(self.model, version)
            self.registry.set_tags(self.model, version, {_BY_HAND: reason})
            self.registry.promote(self.model, version)

    def rollback(self, reason: str) -> tuple[str, str]:
        """Make the previous champion the champion again; returns the versions (from, to)."""
        with self._locked():
            return self.registry.rollback(self.model, reason)

    def aliases_now(self, decision: PromotionDecision) -> tuple[tuple[str, ...], str | None]:
        """The aliases that a decision's version holds today, and why it was rolled back, if so."""
        version = self.registry.version(self.model, decision.version)
        rolled_back = version.tags.get(_ROLLED_BACK)
        if not decision.promoted or "champion" in version.aliases:
            rolled_back = None
        return version.aliases, rolled_back

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Nobody else moves the aliases of this model; what a dead process began is finished."""
        with self._locked():
            self.registry.mend(self.model)
            yield

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One at a time of all that use this home: a judgement holds until its aliases are moved.

        The registry has no compare-and-set, so homes that share a registry are not kept apart.
        """
        lock = self.home.locks / f"promotion.{self.model}.lock"
        waits = "another run is promoting a version of %s; waiting"
        with file_lock(lock, lambda: _log.info(waits, self.model)):
            yield

    def _settle(
        self,
        request: PromoteRequest,
        checks: tuple[GateCheck, ...],
        tags: Mapping[str, str],
        mlflow_run_id: str,
    ) -> PromotionDecision:
        """Register the candidate, move the aliases if it may pass, and write the decision."""
        said = request.approval
        passed = all(check.passed for check in checks)
        awaiting = passed and request.gate.approval and said is None
        promoted = passed and not awaiting and (said is None or said.granted)
        own = {**tags, _DECISION: request.fingerprint}
        if said is not None:
            own[_APPROVAL] = said.model_dump_json()
        version = self._register(request, own, mlflow_run_id)
        if promoted:
            self.registry.promote(self.model, version)
        return self._write_decision(request, version, checks, promoted, awaiting)

    def _decided(self, version: RegisteredVersion) -> tuple[PromotionDecision, Approval | None]:
        """The decision on a version, and what a person has said about it, or began to say."""
        decided = self.store.find_verified(version.tags.get(_DECISION, _NONE))
        said = _said(version)
        if decided is None and said is not None:
            decided = self.store.find_verified(said.decision)  # the process died on the way
        elif isinstance(decided, PromotionDecision):
            said = decided.approval
        if not isinstance(decided, PromotionDecision):
            raise UserError(
                f"the store does not hold the decision on {self.model} version {version.version}; "
                "run its recipe again"
            )
        return decided, said

    def _waiting_request(self, decided: PromotionDecision, said: Approval) -> PromoteRequest:
        """The request of a decision that waits, with what a person said."""
        text = (self.store.path(decided) / _REQUEST_FILE).read_text(encoding="utf-8")
        runtime = Runtime(store=str(self.store.root), mlflow_run_id=decided.mlflow_run_id)
        fields = {**json.loads(text), "runtime": runtime.model_dump()}
        request = PromoteRequest.model_validate_json(json.dumps(fields))
        request = request.model_copy(update={"approval": said})
        return request.model_copy(update={"fingerprint": fingerprint(request)})

    def _register(self, request: PromoteRequest, tags: dict[str, str], mlflow_run_id: str) -> str:
        candidate = request.candidate
        folder = self.store.path(candidate)
        version = self.registry.register(self.model, candidate, folder, mlflow_run_id, tags)
        # A version that was known before carries the tags of an earlier decision.
        self.registry.set_tags(self.model, version, tags)
        self.registry.set_alias(self.model, CHALLENGER, version)
        return version

    def _write_decision(
        self,
        request: PromoteRequest,
        version: str,
        checks: tuple[GateCheck, ...],
        promoted: bool,
        awaiting: bool,
    ) -> PromotionDecision:
        aliases = self.registry.aliases_of(self.model, version)
        # Left by a registry that is gone, or is another one now.
        if self.store.find(request.fingerprint) is not None:
            self.store.quarantine(request.fingerprint)
        content = self.store.work_dir(request.fingerprint) / "content"
        shutil.rmtree(content, ignore_errors=True)
        content.mkdir()
        said = request.approval
        numbers = {
            "promoted": promoted,
            "awaiting_approval": awaiting,
            "approval": said.model_dump(mode="json") if said is not None else None,
            "registered_model": self.model,
            "version": version,
            "aliases": aliases,
            "gate": request.gate.model_dump(mode="json"),
            "checks": [check.model_dump(mode="json") for check in checks],
            "candidate": request.report.candidate.model_dump(mode="json"),
            "baseline": request.report.baseline.model_dump(mode="json"),
            "incumbent": request.report.incumbent.model_dump(mode="json"),
            "incumbent_is_baseline": request.report.incumbent_is_baseline,
            "evaluation_records": request.evaluation.sha256,
            "training_records": [[one.split, one.sha256] for one in request.training],
        }
        text = json.dumps(numbers, indent=2, sort_keys=True)
        (content / "decision.json").write_text(text + "\n", encoding="utf-8")
        if awaiting:
            asked = request.model_dump_json(exclude={"runtime"})
            (content / _REQUEST_FILE).write_text(asked + "\n", encoding="utf-8")
        decision = PromotionDecision(
            uri=self.store.content_uri(request.fingerprint),
            sha256=self.store.seal(content),
            fingerprint=request.fingerprint,
            parents=parents(request),
            mlflow_run_id=request.runtime.mlflow_run_id,
            created_by=created_by(),
            metrics={"promoted": float(promoted)},
            promoted=promoted,
            awaiting_approval=awaiting,
            approval=said,
            registered_model=self.model,
            version=version,
            aliases=aliases,
            checks=checks,
            reasons=_reasons(checks, said),
        )
        self.store.publish(request.fingerprint, decision)
        return decision

    def _policy(self, version: RegisteredVersion) -> PolicyCheckpoint:
        """The artifact of a registered version, fetched from the registry if the store lacks it."""
        stored = self.store.find_verified(version.fingerprint) if version.fingerprint else None
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
            again = self.store.find_verified(version.sha256)
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


def _said(version: RegisteredVersion) -> Approval | None:
    """What a person said about a version, the last time that somebody was asked."""
    text = version.tags.get(_APPROVAL)
    return Approval.model_validate_json(text) if text is not None else None


def _reasons(checks: tuple[GateCheck, ...], said: Approval | None) -> tuple[str, ...]:
    """Why the gate refused: the checks that failed. Else every check, and what a person said."""
    failed = tuple(check.reason for check in checks if not check.passed)
    if failed:
        return failed
    reasons = tuple(check.reason for check in checks)
    if said is None:
        return reasons
    return (*reasons, f"{'approved' if said.granted else 'refused'} by {said.by}: {said.reason}")
