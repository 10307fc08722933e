"""One run at work: executes stages, and writes down what came of them. Knows nothing of Prefect."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from flows.archive import Archive
from flows.explain import left_behind
from flows.graph import Node, build_graph
from flows.installed import check_installed
from flows.listener import Listener, listener
from flows.runs import OpenRun, Runs, StageRow, StageStatus
from infra.code import changed_code
from infra.environment import Home
from infra.launch import StageFailed, run_stage, terminate_all
from infra.outbox import PIPELINE, RunStatus
from infra.redaction import redact, redact_error
from infra.tail import last_lines
from infra.unavailable import TrackingUnavailable
from schemas.artifacts import (
    Artifact,
    EvaluationReport,
    ModelScores,
    PromotionDecision,
    RewardModelCheckpoint,
)
from schemas.base import UserError
from schemas.fingerprint import fingerprint_fields
from schemas.pipeline import PipelineConfig
from schemas.requests import AnyRequest, PromoteRequest, StageRequest
from stages.data.records import iter_records
from stages.gate.slices import find_slices

if TYPE_CHECKING:
    from infra.run_tracking import RunTracking

# What a stage says about its own work: counts of records, the audit trail of PPO's credit mode, the
# comparison of estimators.
_DOCUMENTS = ("report.json", "posttrain.json", "credit.json")
_CLOSE_SECONDS = 20.0
"""How long a finished run waits for MLflow to take the rest of what it has to say."""
_STOP_SECONDS = 5.0
"""The same for a run that failed, or that somebody wants to end."""


class Session:
    """The state of one run: its graph, its artifacts so far, its record, and its tracking."""

    def __init__(
        self,
        config: PipelineConfig,
        home: Home,
        run: OpenRun,
        tracking: RunTracking,
        watcher: Listener,
        rerun_changed_code: bool = False,
    ) -> None:
        self.config = config
        self.home = home
        self.run = run
        self.tracking = tracking
        self.watcher = watcher
        self.archive = Archive(
            home,
            config.registry.name,
            patience=config.compute.registry_timeout,
            on_wait=watcher.note,
        )
        self.store = self.archive.store
        self.nodes = build_graph(
            config,
            store=self.store.root,
            find_incumbent=self.archive.incumbent,
            find_approval=self.archive.approval,
        )
        self.artifacts: dict[str, Artifact] = {}
        self._spent: dict[str, float] = {}
        self._rerun_changed_code = rerun_changed_code
        self._rerun: set[str] = set()

    @property
    def mlflow_run_id(self) -> str | None:
        """The MLflow run of the pipeline, or None while MLflow has not said it."""
        return self.run.record.mlflow_run_id

    def reuse(self, node: Node, log: Callable[[str], None] = lambda text: None) -> Artifact | None:
        """The artifact of a stage whose work is done, verified to the byte; else None."""
        with self._registry_named(node):
            request = node.build(self.artifacts)

        def on_wait(text: str) -> None:
            self.watcher.note(f"{node.name}: {text}")
            log(text)

        # Under the lock: what the record names before it is released, nobody clears away.
        with self.store.lock(request.fingerprint, on_wait=on_wait):
            with self._registry_named(node):
                artifact = self.archive.finished(request, verify=True)
            if artifact is None or self._put_aside(node, artifact):
                return None
            self._note_identity(request)
            self._tell_the_rest(artifact)
            self._accept(node, artifact, "reused", 0.0, None)
        return artifact

    def _tell_the_rest(self, artifact: Artifact) -> None:
        """Tell MLflow what an earlier try of this run could not, if it was stopped at its end."""
        key = artifact.fingerprint
        with self._tolerating_tracking():
            if not self.tracking.is_unfinished(key):
                return
            with self.tracking.metrics_of(key, self.store.work_folder / key / "metrics.jsonl"):
                pass  # all of it is there
            if not isinstance(artifact, PromotionDecision):
                self._log_artifact(key, artifact)
            self.tracking.finish(key, "FINISHED")

    def _put_aside(self, node: Node, artifact: Artifact) -> bool:
        """Put away, once in a run, what other code has made, if that is asked for."""
        if not self._rerun_changed_code or artifact.fingerprint in self._rerun:
            return False
        changed = changed_code(artifact.created_by.code)
        if not changed:
            return False
        reader = Runs(self.store.root).reader_of(artifact.fingerprint, but=self.run.record.run)
        if reader is not None:
            raise UserError(
                f"{node.name} cannot be run again while run {reader} uses its artifact: "
                "wait for that run, or leave out --rerun-changed-code"
            )
        self._rerun.add(artifact.fingerprint)
        self.store.quarantine(artifact.fingerprint)
        self.watcher.note(f"{node.name}: again, for the code has changed: {', '.join(changed)}")
        return True

    def _look_at_checkpoint(
        self, node: Node, request: StageRequest, log: Callable[[str], None]
    ) -> None:
        """Say what a stage goes on from; put aside, if that is asked for, what other code began.

        Where it goes on from nothing, say so if work much like it was begun before.
        """
        checkpoint = self.store.latest_checkpoint(request.fingerprint)
        if checkpoint is None:
            text = left_behind(node, request, self.store)
        else:
            changed = changed_code(self.store.checkpoint_code(request.fingerprint))
            text = None
            if changed and self._rerun_changed_code:
                self.store.quarantine_work(request.fingerprint)
                text = f"anew, for the code has changed since its checkpoint: {', '.join(changed)}"
            elif changed:
                text = (
                    f"resuming from {checkpoint.name}, though other code wrote it; changed since: "
                    f"{', '.join(changed)} (--rerun-changed-code starts anew)"
                )
        if text is not None:
            self.watcher.note(f"{node.name}: {text}")
            log(text)

    def _note_interventions(self, node: Node, artifact: Artifact) -> None:
        """Say that steps of a stage were left out or taken back: nobody asked for that in vain."""
        skipped = artifact.metrics.get("stability/num_skipped", 0.0)
        rewinds = artifact.metrics.get("stability/num_rewinds", 0.0)
        if skipped or rewinds:
            self.watcher.note(
                f"{node.name}: training was unstable: {skipped:.0f} steps were left out and it "
                f"went back {rewinds:.0f} times; why is in {artifact.uri}/posttrain.json"
            )

    def _note_identity(self, request: StageRequest) -> None:
        """Keep what the fingerprint is made of; it serves people only, so it may fail."""
        with contextlib.suppress(OSError):
            self.store.note_identity(request.fingerprint, fingerprint_fields(request))

    def execute(self, node: Node, log: Callable[[str], None]) -> Artifact | None:
        """Do the work of a stage. Returns None only for a promotion that must be evaluated again.

        Called again by a retry, it goes on from the last checkpoint.
        """
        started = time.monotonic()
        request = node.build(self.artifacts)
        self.watcher.started(node.name)

        def on_line(text: str) -> None:
            self.watcher.line(node.name, text)
            log(text)

        try:
            with self._tracked(node, request) as key:
                self._note_mlflow_run()
                mlflow_run_id = self.tracking.run_id(key)
                runtime = request.runtime.model_copy(update={"mlflow_run_id": mlflow_run_id})
                request = request.model_copy(update={"runtime": runtime})
                if isinstance(request, PromoteRequest):
                    with self._registry_named(node):
                        return self._promote(node, request, started)
                return self._run_stage(node, request, key, on_line)
        finally:
            spent = self._spent.get(node.name, 0.0) + time.monotonic() - started
            self._spent[node.name] = spent

    def finish(self) -> None:
        """Write down the results of a run that went through."""
        report = self.artifacts["evaluate"]
        decision = self.artifacts["promote"]
        assert isinstance(report, EvaluationReport)
        assert isinstance(decision, PromotionDecision)
        tags = {
            "posttrain.outcome": decision.outcome,
            "posttrain.decision": decision.fingerprint,
            "posttrain.model_version": f"{decision.registered_model}/{decision.version}",
        }
        scores = {f"candidate/{k}": v for k, v in _scores(report.candidate).items()}
        scores |= {f"baseline/{k}": v for k, v in _scores(report.baseline).items()}
        scores |= {f"incumbent/{k}": v for k, v in _scores(report.incumbent).items()}
        with self._tolerating_tracking():
            self.tracking.set_tags(PIPELINE, tags)
            self.tracking.log_metrics(PIPELINE, scores)
            self.tracking.finish(PIPELINE, "FINISHED")
        # Last: a run that is written down as finished is never begun again, and so has nothing
        # left to say. One that dies before this says it all again, to the same end.
        self.run.update(
            status="finished",
            ended=datetime.now(UTC),
            evaluation=evaluation_document(report),
            reward_models=reward_models_document(self.artifacts),
            decision=decision_document(decision, Archive(self.home, self.archive.model)),
            outcome=decision.outcome,
        )

    def fail(self, error: BaseException) -> None:
        """Write down that a run did not go through."""
        stopped = not isinstance(error, Exception)
        self.run.update(
            status="stopped" if stopped else "failed",
            ended=datetime.now(UTC),
            outcome="stopped from outside" if stopped else str(error),
        )
        with self._tolerating_tracking():
            self.tracking.finish(PIPELINE, "KILLED" if stopped else "FAILED")

    def _run_stage(
        self,
        node: Node,
        request: StageRequest,
        key: str,
        on_line: Callable[[str], None],
    ) -> Artifact:
        with self.store.lock(request.fingerprint, on_wait=on_line):
            # Another run may have done the work while this one waited.
            found = self.archive.finished(request, verify=True)
            if found is not None:
                self._accept(node, found, "reused", 0.0, None)
                return found
            self._look_at_checkpoint(node, request, on_line)
            self._note_identity(request)
            work = self.store.work_dir(request.fingerprint)
            metrics = self.tracking.metrics_of(key, work / "metrics.jsonl")
            with metrics, _log_quoted(work / "stage.log"):
                outcome = run_stage(
                    cast(AnyRequest, request),
                    store=self.store,
                    on_line=on_line,
                    timeout=self.config.compute.timeout_of(node.stage),
                    hang_timeout=self.config.compute.hang_timeout,
                    env={},
                )
        artifact = outcome.artifact
        with self._tolerating_tracking():
            self._log_artifact(key, artifact)
        self._note_interventions(node, artifact)
        status: StageStatus = "ran" if outcome.resumed_from_step is None else "resumed"
        seconds = self._spent.get(node.name, 0.0) + outcome.seconds
        self._accept(node, artifact, status, seconds, outcome.peak_memory_bytes)
        return artifact

    def _log_artifact(self, key: str, artifact: Artifact) -> None:
        """The final numbers of a stage, its content digest, and what it says about its work."""
        self.tracking.log_metrics(key, artifact.metrics)
        self.tracking.set_tags(key, {"posttrain.sha256": artifact.sha256})
        for name in _DOCUMENTS:
            document = self.store.root / artifact.uri / name
            if document.is_file():
                self.tracking.log_file(key, document)

    def _promote(self, node: Node, request: PromoteRequest, started: float) -> Artifact | None:
        from stages.promote import decide  # torch, for the bootstrap

        with self.store.lock(request.fingerprint, on_wait=self.watcher.note):
            # Another run may have decided while this one waited.
            found = self.archive.finished(request, verify=True)
            if found is not None:
                self._accept(node, found, "reused", 0.0, None)
                return found
            self._note_identity(request)
            # A registered version names the run that it comes from.
            run_id = self.tracking.delivered_run_id(self.config.compute.registry_timeout)
            decision = self.archive.promote(request, decide, run_id)
        if decision is None:
            self.watcher.note(
                f"another model became the champion of {self.config.registry.name} meanwhile; "
                "evaluating against it"
            )
            return None
        self._accept(node, decision, "ran", time.monotonic() - started, None)
        return decision

    def _accept(
        self,
        node: Node,
        artifact: Artifact,
        status: StageStatus,
        seconds: float,
        peak_memory_bytes: int | None,
    ) -> None:
        if node.name == "prepare_data:evaluation" and self.config.gate.slices:
            # Now, and not after a night of training: do the records have the fields?
            find_slices(iter_records(self.store.path(artifact)), self.config.gate.slices)
        self.artifacts[node.name] = artifact
        row = StageRow(
            name=node.name,
            status=status,
            seconds=round(seconds, 3),
            peak_memory_bytes=peak_memory_bytes,
            fingerprint=artifact.fingerprint,
            artifact=artifact.uri,
        )
        self.run.write(self.run.record.with_row(row))
        self.watcher.done(row)
        tag = f"{status} {artifact.fingerprint}"
        if status == "reused" and artifact.mlflow_run_id:
            tag += f" from MLflow run {artifact.mlflow_run_id}"
        with self._tolerating_tracking():
            name = node.name.replace(":", ".")
            self.tracking.set_tags(PIPELINE, {f"posttrain.stage.{name}": tag})

    @contextlib.contextmanager
    def _tracked(self, node: Node, request: StageRequest) -> Iterator[str]:
        """The nested MLflow run of a stage, by its key; the same one in a retry."""
        key = self.tracking.open_stage(node.name, request.fingerprint, _params(request))
        status: RunStatus = "KILLED"
        try:
            yield key
            status = "FINISHED"
        except Exception as error:
            status = "FAILED"
            redact_error(error)  # Prefect keeps it
            raise
        finally:
            with self._tolerating_tracking():
                self.tracking.finish(key, status)

    @contextlib.contextmanager
    def _registry_named(self, node: Node) -> Iterator[None]:
        """Say of a registry that was waited for in vain what is kept and how to go on."""
        try:
            yield
        except TrackingUnavailable as error:
            if error.waited == 0:
                raise
            named = TrackingUnavailable(
                f"{node.name} needs MLflow's registry, which was waited for {error.waited:g} "
                f"seconds: {error}. What was done before it is kept in {self.store.root}: the same "
                "command goes on from there"
            )
            named.waited = error.waited
            raise named from error

    def _note_mlflow_run(self) -> None:
        if self.run.record.mlflow_run_id is None:
            run_id = self.tracking.run_id()
            if run_id is not None:
                self.run.update(mlflow_run_id=run_id)

    @contextlib.contextmanager
    def _tolerating_tracking(self) -> Iterator[None]:
        """What the store holds may be missing in MLflow: work that is done is not lost for that."""
        try:
            yield
        except Exception as error:
            self.watcher.note(redact(f"not kept for MLflow: {error}"))


@contextlib.contextmanager
def open_session(
    config: PipelineConfig, home: Home, *, rerun_changed_code: bool = False
) -> Iterator[Session]:
    """A run of a recipe: the unfinished one of the same configuration, or a new one.

    rerun_changed_code: work that other code has done is done again.
    """
    from infra.run_tracking import RunTracking

    check_installed(config)
    with Runs(home.store.root).open(config) as run:
        tracking = RunTracking(run.outbox, home.mlflow_uri)
        tracking.open(
            config.name,
            run.record.run,
            {
                "posttrain.run": run.record.run,
                "posttrain.recipe": config.name,
                "posttrain.config_digest": run.record.config_digest,
                "posttrain.store": str(home.store.root),
            },
        )
        watcher = listener()
        try:
            yield from _worked(config, home, run, tracking, watcher, rerun_changed_code)
        finally:
            _close(run, tracking, watcher)


def _worked(
    config: PipelineConfig,
    home: Home,
    run: OpenRun,
    tracking: RunTracking,
    watcher: Listener,
    rerun_changed_code: bool,
) -> Iterator[Session]:
    try:
        session = Session(config, home, run, tracking, watcher, rerun_changed_code)
    except UserError as error:
        redact_error(error)
        run.update(status="failed", ended=datetime.now(UTC), outcome=str(error))
        tracking.finish(PIPELINE, "FAILED")
        raise
    try:
        yield session
        session.finish()
    except BaseException as error:
        session.fail(redact_error(error))
        raise
    finally:
        terminate_all()


def _close(run: OpenRun, tracking: RunTracking, watcher: Listener) -> None:
    """Let MLflow have what it has missed, for some seconds; what is left waits on disk."""
    finished = run.record.status == "finished"
    complete = tracking.close(_CLOSE_SECONDS if finished else _STOP_SECONDS)
    found = tracking.known_run_id()
    if found not in (None, run.record.mlflow_run_id):
        run.update(mlflow_run_id=found)
    if not complete:
        watcher.note(
            f"MLflow has not been told everything: it waits in {tracking.outbox.folder}, and goes "
            "with the next run or with posttrain sync"
        )
    elif finished:
        tracking.outbox.forget()


def evaluation_document(report: EvaluationReport) -> dict[str, Any]:
    """The scores of the three models, as `--json` prints them."""
    return {
        "candidate": _scores(report.candidate),
        "baseline": _scores(report.baseline),
        "incumbent": _scores(report.incumbent),
    }


def reward_models_document(artifacts: dict[str, Artifact]) -> dict[str, Any]:
    """The held-out numbers of the reward models, None where there is none."""
    outcome = artifacts.get("train_reward_model")
    process = artifacts.get("train_process_reward_model")
    return {
        "outcome": _picked(outcome, ("accuracy",)),
        "process": _picked(process, ("step_accuracy", "first_error_f1")),
    }


def decision_document(decision: PromotionDecision, archive: Archive) -> dict[str, Any]:
    """What the gate said, with the aliases as they are now, or as they were then."""
    try:
        aliases, rolled_back = archive.aliases_now(decision)
    except TrackingUnavailable:
        aliases, rolled_back = decision.aliases, None
    reasons = list(decision.reasons)
    if decision.awaiting_approval:
        reasons.append(awaiting_text(decision))
    if rolled_back is not None:
        reasons.append(f"rolled back since then: {rolled_back}")
    return {
        "promoted": decision.promoted,
        "awaiting_approval": decision.awaiting_approval,
        "registered_model": decision.registered_model,
        "version": decision.version,
        "aliases": list(aliases),
        "reasons": reasons,
    }


def awaiting_text(decision: PromotionDecision) -> str:
    """What a person can do about a decision that waits."""
    model = f"{decision.registered_model}@{decision.version}"
    return (
        f"awaiting approval: posttrain promote {model} --approve --reason WHY, "
        "or --reject; --explain shows every number"
    )


@contextlib.contextmanager
def _log_quoted(log: Path) -> Iterator[None]:
    """Notes the last lines of a stage's log on its failure, unless the failure quotes them."""
    try:
        yield
    except StageFailed as error:
        lines = last_lines(log, 8)
        if lines and "\n  | " not in str(error):
            error.add_note("\n".join(f"  | {line}" for line in lines))
        raise


def _picked(artifact: Artifact | None, names: tuple[str, ...]) -> dict[str, float] | None:
    if artifact is None:
        return None
    assert isinstance(artifact, RewardModelCheckpoint)
    return {name: artifact.metrics[name] for name in names}


def _scores(scores: ModelScores) -> dict[str, float]:
    return {
        "pass@1": scores.pass_at["pass@1"],
        "num_records": scores.num_records,
        "kl": scores.kl,
        "length": scores.length,
        "truncated_fraction": scores.truncated_fraction,
    }


def _params(request: StageRequest) -> dict[str, Any]:
    """The configuration of a stage: everything but where it runs and what it reads."""
    params: dict[str, Any] = {}
    for name in type(request).model_fields:
        value = getattr(request, name)
        if name in ("runtime", "sources") or _is_artifact(value) or value in (None, ()):
            continue
        params[name] = value.model_dump(mode="json") if hasattr(value, "model_dump") else value
    return params


def _is_artifact(value: Any) -> bool:
    return isinstance(value, Artifact) or (
        isinstance(value, tuple) and any(isinstance(item, Artifact) for item in value)
    )
