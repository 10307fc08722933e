"""A scripted stage runner and a small recipe, shared by the tests of the flows."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from infra.code import created_by
from infra.environment import Home
from infra.launch import StageOutcome
from infra.store import Store
from schemas.artifacts import (
    Artifact,
    CreditReport,
    DatasetArtifact,
    EvaluationReport,
    GateCheck,
    ModelScores,
    PolicyCheckpoint,
    RewardModelCheckpoint,
)
from schemas.fingerprint import parents
from schemas.requests import (
    CreditRequest,
    EvaluateRequest,
    PrepareDataRequest,
    PromoteRequest,
    StageRequest,
    TrainProcessRewardModelRequest,
    TrainRewardModelRequest,
)
from tests.artifacts import CONTRACT
from tests.servers import PrefectServer


class FakeStages:
    """Stands in for `run_stage`: writes small artifacts, and fails where its script says so."""

    def __init__(self) -> None:
        self.requests: list[StageRequest] = []
        self.script: dict[str, list[BaseException]] = defaultdict(list)
        """Errors that a stage raises, one a call, before it works."""
        self.timeouts: dict[str, float | None] = {}
        """Seconds that each stage was given."""
        self.pass_at_1 = {"candidate": 0.8, "baseline": 0.5}
        self.before: Callable[[StageRequest], None] = lambda request: None
        self.extra: dict[str, Any] = {}
        """Further fields of every record."""

    @property
    def names(self) -> list[str]:
        """The stages that were started, in order."""
        return [_name(request) for request in self.requests]

    def __call__(
        self,
        request: Any,
        *,
        store: Store,
        on_line: Callable[[str], None],
        timeout: float | None = None,
        hang_timeout: float | None = None,
        env: Mapping[str, str] | None = None,
    ) -> StageOutcome:
        assert store.lock_descriptor(request.fingerprint) is not None
        self.requests.append(request)
        self.timeouts[_name(request)] = timeout
        self.before(request)
        on_line(f"working on {_name(request)}")
        if self.script[_name(request)]:
            raise self.script[_name(request)].pop(0)
        return StageOutcome(self.publish(request, store), 0.5, 2**20, None)

    def publish(self, request: StageRequest, store: Store) -> Artifact:
        """What the stage would have made: a file that says what was asked."""
        content = store.work_dir(request.fingerprint) / "content"
        content.mkdir(exist_ok=True)
        (content / "made_by.json").write_text(json.dumps({"fingerprint": request.fingerprint}))
        if isinstance(request, PrepareDataRequest):
            rows = "".join(json.dumps(record) + "\n" for record in self.records(request.split))
            (content / "records.jsonl").write_text(rows)
        if isinstance(request, EvaluateRequest):
            self._write_samples(content / "records.parquet")
        artifact = self._artifact(
            request,
            uri=store.content_uri(request.fingerprint),
            sha256=store.seal(content),
            fingerprint=request.fingerprint,
            parents=parents(request),
            mlflow_run_id=request.runtime.mlflow_run_id,
            created_by=created_by(),
        )
        store.publish(request.fingerprint, artifact)
        return artifact

    def records(self, split: str) -> list[dict[str, Any]]:
        """Four records, which no two splits share."""
        return [
            {
                "id": f"r{n}",
                "prompt": f"{split} {n}",
                "answer": "1",
                "completion": "1",
                **self.extra,
            }
            for n in range(4)
        ]

    def _write_samples(self, path: Path) -> None:
        """One sample a record; the candidate's are right, and nobody else's."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        rows = [
            {
                "model": model,
                "record": record["id"],
                "correct": model == "candidate",
                "reward": float(model == "candidate"),
            }
            for model in ("candidate", "baseline", "incumbent")
            for record in self.records("evaluation")
        ]
        pq.write_table(pa.Table.from_pylist(rows), path)

    def _artifact(self, request: StageRequest, **base: Any) -> Artifact:
        match request:
            case PrepareDataRequest():
                return DatasetArtifact(
                    split=request.split,
                    layout=request.layout,
                    num_records=4,
                    num_prompts=4,
                    metrics={"num_records": 4.0},
                    **base,
                )
            case TrainRewardModelRequest():
                return RewardModelCheckpoint(
                    kind="outcome",
                    contract=CONTRACT,
                    pooling="last_token",
                    num_parameters=1,
                    num_steps=1,
                    metrics={"accuracy": 0.9},
                    **base,
                )
            case TrainProcessRewardModelRequest():
                return RewardModelCheckpoint(
                    kind="process",
                    contract=CONTRACT,
                    pooling="step_end",
                    step_separator="\n",
                    num_parameters=1,
                    num_steps=1,
                    metrics={"step_accuracy": 0.95, "first_error_f1": 0.8},
                    **base,
                )
            case CreditRequest():
                return CreditReport(num_rollouts=8, steps=(1,), estimators=("gae",), **base)
            case EvaluateRequest():
                incumbent = request.incumbent or request.baseline
                return EvaluationReport(
                    candidate=self._scores(request.candidate, self.pass_at_1["candidate"]),
                    baseline=self._scores(request.baseline, self.pass_at_1["baseline"]),
                    incumbent=self._scores(incumbent, self.pass_at_1["baseline"]),
                    incumbent_is_baseline=request.incumbent is None,
                    **base,
                )
            case _:
                stage = getattr(request, "stage", "")
                if stage in ("sample_preferences", "label_steps"):
                    return DatasetArtifact(
                        split="preferences" if stage == "sample_preferences" else "step_labels",
                        layout="preference" if stage == "sample_preferences" else "steps",
                        num_records=4,
                        num_prompts=4,
                        **base,
                    )
                algorithm = "sft" if stage == "train_sft" else request.config.algorithm  # type: ignore[attr-defined]
                return PolicyCheckpoint(
                    algorithm=algorithm,
                    contract=CONTRACT,
                    num_parameters=1,
                    num_steps=1,
                    metrics={"loss": 0.1},
                    **base,
                )

    def _scores(self, policy: PolicyCheckpoint, value: float) -> ModelScores:
        return ModelScores(
            sha256=policy.sha256,
            num_records=4,
            num_samples=1,
            pass_at={"pass@1": value},
            reward=value,
            kl=0.1,
            length=10.0,
            truncated_fraction=0.0,
        )


def _name(request: StageRequest) -> str:
    stage = str(getattr(request, "stage", ""))
    return f"{stage}:{request.split}" if isinstance(request, PrepareDataRequest) else stage


def _decide(request: PromoteRequest, store: Store) -> tuple[GateCheck, ...]:
    report, gate = request.report, request.gate
    gain = report.candidate.pass_at["pass@1"] - report.incumbent.pass_at["pass@1"]
    return (
        GateCheck(
            rule="min_improvement",
            passed=gain >= gate.min_improvement,
            observed=gain,
            required=gate.min_improvement,
            reason=f"pass@1 moved by {gain:+.2f}, {gate.min_improvement:.2f} is required",
        ),
    )


@pytest.fixture(autouse=True)
def _environment() -> Iterator[None]:
    """The command line sets variables for the libraries: put the old ones back."""
    before = dict(os.environ)
    os.environ.pop("MLFLOW_TRACKING_URI", None)
    os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def prefect_server(
    tmp_path_factory: pytest.TempPathFactory, real_prefect: PrefectServer
) -> Iterator[None]:
    """Flows that tests call themselves use the real server of all tests."""
    folder = tmp_path_factory.mktemp("prefect")
    os.environ["DO_NOT_TRACK"] = "1"
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    os.environ["PREFECT_HOME"] = str(folder)
    os.environ["PREFECT_RESULTS_LOCAL_STORAGE_PATH"] = str(folder / "results")
    from prefect.settings import (
        PREFECT_API_URL,
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
        temporary_settings,
    )

    settings = {PREFECT_API_URL: real_prefect.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
    with temporary_settings(settings):
        yield
        drain()


def drain() -> None:
    """Let Prefect's threads send what they hold: without a server they would try for minutes."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    with contextlib.suppress(RuntimeError):  # it has never been started
        APILogWorker.instance().drain()
    EventsWorker.drain_all()


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without a run: making the tables takes seconds, copying them none."""
    from infra.mlflow_tracking import Tracking

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    Tracking(f"sqlite:///{path}").client.search_experiments()
    return path


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return Home.resolve(str(tmp_path / "home"))


@pytest.fixture
def tracked_home(home: Home, empty_database: Path) -> Home:
    """A home whose tracking database is there already."""
    shutil.copy(empty_database, home.mlflow_folder / "mlflow.db")
    return home


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> FakeStages:
    fake = FakeStages()
    monkeypatch.setattr("flows.session.run_stage", fake)
    monkeypatch.setitem(sys.modules, "stages.promote", SimpleNamespace(decide=_decide))
    return fake


@pytest.fixture
def walk(home: Home, stages: FakeStages) -> Callable[[Any], list[StageRequest]]:
    """Builds every request of a configuration in order, as if each stage had run."""
    from flows.graph import build_graph

    def requests(config: Any) -> list[StageRequest]:
        made: dict[str, Artifact] = {}
        found: list[StageRequest] = []
        for node in build_graph(config, store=home.store.root, find_incumbent=lambda _: None):
            request = node.build(made)
            found.append(request)
            if node.stage != "promote":
                done = home.store.find(request.fingerprint)
                made[node.name] = done or stages.publish(request, home.store)
        return found

    return requests


@pytest.fixture
def files_recipe(tmp_path: Path) -> Path:
    """A recipe over JSONL files beside it."""
    data = tmp_path / "data"
    data.mkdir()
    problem = {"prompt": "1+1=", "answer": "2"}
    (data / "evaluation.jsonl").write_text(json.dumps(problem) + "\n")
    demonstration = {"prompt": "1+2=", "completion": "3"}
    (data / "demonstrations.jsonl").write_text(json.dumps(demonstration) + "\n")
    (data / "prompts.jsonl").write_text(json.dumps({"prompt": "2+2=", "answer": "4"}) + "\n")
    sampling = {"max_completion_tokens": 8}
    content = {
        "name": "files",
        "model": {"built": {"alphabet": "0123456789+=#\n"}},
        "data": {
            "root": str(data),
            "evaluation": {"path": "evaluation.jsonl"},
            "demonstrations": {"path": "demonstrations.jsonl"},
            "prompts": {"path": "prompts.jsonl"},
        },
        "sft": {"optimizer": {"learning_rate": 0.001}, "max_length": 32},
        "reward": {"verifier": {"function": "math_verify"}},
        "rl": {
            "algorithm": "grpo",
            "online": {"sampling": sampling},
            "grpo": {"optimizer": {"learning_rate": 0.001}},
            "rloo": {"optimizer": {"learning_rate": 0.001}},
        },
        "evaluation": {"sampling": sampling, "num_samples": 1},
        "registry": {"name": "files"},
    }
    path = tmp_path / "files.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
