"""A small evaluation in a store, made by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from infra.store import Store
from schemas.artifacts import (
    DatasetArtifact,
    EvaluationReport,
    ModelScores,
    PolicyCheckpoint,
)
from schemas.evaluation import GateConfig, RegistryConfig
from schemas.requests import PromoteRequest, Runtime
from tests.artifacts import CONTRACT, NOBODY

Table = Sequence[Sequence[int]]
"""Right (1) or wrong (0) of every sample of every record."""


class Evaluation:
    """Publishes data sets and an evaluation, and asks the gate about them."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._numbers = iter(range(1000))

    def dataset(self, split: Any, records: Sequence[Mapping[str, Any]]) -> DatasetArtifact:
        lines = "".join(json.dumps(dict(record)) + "\n" for record in records)
        layout = {"demonstrations": "prompt_completion", "preferences": "preference"}
        return self._publish(
            DatasetArtifact,
            "records.jsonl",
            lines.encode(),
            split=split,
            layout=layout.get(split, "verifiable"),
            num_records=len(records),
            num_prompts=len(records),
        )

    def report(
        self,
        candidate: Table,
        incumbent: Table,
        baseline: Table | None = None,
        columns: Mapping[str, Mapping[str, Table | Sequence[Sequence[float]]]] | None = None,
        first: bool = False,
        **changes: float,
    ) -> EvaluationReport:
        """columns: more numbers of each sample, by model and name; changes: candidate's means."""
        tables = {
            "candidate": candidate,
            "baseline": baseline if baseline is not None else incumbent,
            "incumbent": incumbent,
        }
        rows = [
            {
                "model": model,
                "record": f"r{index}",
                "correct": bool(right),
                "reward": float(right),
                **{
                    name: float(values[index][sample])
                    for name, values in (columns or {}).get(model, {}).items()
                },
            }
            for model, table in tables.items()
            for index, samples in enumerate(table)
            for sample, right in enumerate(samples)
        ]
        path = self.store.root / "rows.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path)
        return self._publish(
            EvaluationReport,
            "records.parquet",
            path.read_bytes(),
            candidate=_scores(candidate, **changes),
            baseline=_scores(tables["baseline"]),
            incumbent=_scores(incumbent),
            incumbent_is_baseline=first,
        )

    def request(
        self,
        report: EvaluationReport,
        gate: GateConfig | Mapping[str, Any] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        training: Sequence[DatasetArtifact] = (),
        prompts: Sequence[Any] | None = None,
    ) -> PromoteRequest:
        if not isinstance(gate, GateConfig):
            gate = GateConfig.model_validate(gate or {})
        records = [
            {
                "id": f"r{index}",
                "prompt": prompts[index] if prompts else f"question {index}",
                "answer": "1",
                **({"metadata": dict(metadata[index])} if metadata else {}),
            }
            for index in range(report.candidate.num_records)
        ]
        policy = PolicyCheckpoint(
            uri="",
            sha256="c",
            fingerprint="c",
            created_by=NOBODY,
            algorithm="grpo",
            contract=CONTRACT,
            num_parameters=1,
            num_steps=1,
        )
        return PromoteRequest(
            runtime=Runtime(store=str(self.store.root)),
            gate=gate,
            registry=RegistryConfig(name="m"),
            candidate=policy,
            report=report,
            evaluation=self.dataset("evaluation", records),
            training=tuple(training),
        )

    def _publish(self, kind: Any, name: str, content: bytes, **fields: Any) -> Any:
        fingerprint = f"f{next(self._numbers)}"
        folder = self.store.work_dir(fingerprint) / "content"
        folder.mkdir()
        (folder / name).write_bytes(content)
        artifact = kind(
            uri=self.store.content_uri(fingerprint),
            sha256=self.store.seal(folder),
            fingerprint=fingerprint,
            created_by=NOBODY,
            **fields,
        )
        self.store.publish(fingerprint, artifact)
        return artifact


def _scores(table: Table, **changes: float) -> ModelScores:
    passed = sum(sum(samples) / len(samples) for samples in table) / len(table)
    values: dict[str, Any] = {
        "reward": passed,
        "kl": 1.0,
        "length": 10.0,
        "truncated_fraction": 0.0,
        "components": {"verifier": passed},
        **changes,
    }
    return ModelScores(
        sha256="0",
        num_records=len(table),
        num_samples=len(table[0]),
        pass_at={"pass@1": passed},
        **values,
    )


@pytest.fixture
def evaluation(tmp_path: Path) -> Evaluation:
    return Evaluation(Store(tmp_path / "store"))
