"""A process that promotes a candidate as a run does: `python -m tests.flows.racing`.

Arguments: home, name of the candidate, its pass@1, number of processes in the race.
"""

from __future__ import annotations

import json
import sys
import time

from flows.archive import Archive
from infra.environment import Home
from infra.mlflow_tracking import Tracking
from infra.store import Store
from schemas.artifacts import (
    DatasetArtifact,
    EvaluationReport,
    GateCheck,
    ModelScores,
    PolicyCheckpoint,
)
from schemas.evaluation import GateConfig, RegistryConfig
from schemas.fingerprint import fingerprint
from schemas.requests import PromoteRequest, Runtime
from tests.artifacts import CONTRACT, NOBODY

MODEL = "racing"


def published(store: Store, kind: type, name: str, **fields: object) -> object:
    """An artifact with one file, by its name; the first process makes it."""
    with store.lock(name):
        found = store.find(name)
        if found is not None:
            return found
        content = store.work_dir(name) / "content"
        content.mkdir(exist_ok=True)
        (content / "config.json").write_text(name)
        base = {"uri": store.content_uri(name), "sha256": store.seal(content)}
        artifact = kind(**base, fingerprint=name, created_by=NOBODY, **fields)
        store.publish(name, artifact)
        return artifact


def policy(store: Store, name: str) -> PolicyCheckpoint:
    made = published(
        store,
        PolicyCheckpoint,
        name,
        algorithm="grpo",
        contract=CONTRACT,
        num_parameters=1,
        num_steps=1,
    )
    assert isinstance(made, PolicyCheckpoint)
    return made


def scores(sha256: str, value: float) -> ModelScores:
    return ModelScores(
        sha256=sha256,
        num_records=4,
        num_samples=1,
        pass_at={"pass@1": value},
        reward=value,
        kl=0.1,
        length=10.0,
        truncated_fraction=0.0,
    )


def request(
    store: Store,
    name: str,
    value: float,
    incumbent: tuple[PolicyCheckpoint, float] | None,
    **gate: object,
) -> PromoteRequest:
    """A candidate, evaluated against an incumbent, or against the baseline with pass@1 of .5."""
    baseline = policy(store, "baseline")
    against, its_value = incumbent or (baseline, 0.5)
    report = published(
        store,
        EvaluationReport,
        f"report-{name}-{against.fingerprint}",
        candidate=scores(policy(store, name).sha256, value),
        baseline=scores(baseline.sha256, 0.5),
        incumbent=scores(against.sha256, its_value),
        incumbent_is_baseline=incumbent is None,
    )
    data = published(
        store,
        DatasetArtifact,
        "evaluation",
        split="evaluation",
        layout="verifiable",
        num_records=4,
        num_prompts=4,
    )
    assert isinstance(report, EvaluationReport)
    assert isinstance(data, DatasetArtifact)
    made = PromoteRequest(
        runtime=Runtime(store=str(store.root)),
        gate=GateConfig.model_validate(gate),
        registry=RegistryConfig(name=MODEL),
        candidate=policy(store, name),
        report=report,
        evaluation=data,
        training=(),
    )
    return made.model_copy(update={"fingerprint": fingerprint(made)})


def judge(asked: PromoteRequest, store: Store) -> tuple[GateCheck, ...]:
    gain = asked.report.candidate.reward - asked.report.incumbent.reward
    return (
        GateCheck(
            rule="gain", passed=gain > 0, observed=gain, required=0.0, reason=f"gain {gain:+.1f}"
        ),
    )


def open_run(home: Home, name: str) -> str:
    return Tracking(home.mlflow_uri).open_pipeline_run(MODEL, name, {"posttrain.run": name})


def main(root: str, name: str, value: str, num_processes: str) -> None:
    home = Home.resolve(root)
    archive = Archive(home, MODEL)
    asked = request(archive.store, name, float(value), None)
    run_id = open_run(home, name)
    ready = home.root / "ready"
    (ready / name).touch()
    deadline = time.monotonic() + 120
    while len(list(ready.iterdir())) < int(num_processes):
        assert time.monotonic() < deadline
        time.sleep(0.01)

    def slowly(asked: PromoteRequest, store: Store) -> tuple[GateCheck, ...]:
        time.sleep(1.0)  # long enough for the other to come to the same point, were it let
        return judge(asked, store)

    num_evaluations = 1
    while (decision := archive.promote(asked, slowly, run_id)) is None:
        incumbent = archive.incumbent(asked.candidate)
        assert incumbent is not None
        its_value = float((archive.store.path(incumbent) / "config.json").read_text()[1:]) / 10
        asked = request(archive.store, name, float(value), (incumbent, its_value))
        num_evaluations += 1
    print(
        json.dumps(
            {
                "name": name,
                "num_evaluations": num_evaluations,
                "promoted": decision.promoted,
                "incumbent": asked.report.incumbent.sha256,
                "version": decision.version,
            }
        )
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
