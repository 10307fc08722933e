"""The gate on records made by hand."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from schemas.artifacts import CreatedBy, EvaluationReport, ModelScores
from schemas.evaluation import GateConfig
from stages.promote import decide, differences


def scores(passed: float, **changes: float) -> ModelScores:
    values = {"reward": passed, "kl": 1.0, "length": 10.0, "truncated_fraction": 0.0, **changes}
    return ModelScores(
        sha256="0", num_records=4, num_samples=2, pass_at={"pass@1": passed}, **values
    )


def report(candidate: ModelScores, incumbent: ModelScores, first: bool = False) -> EvaluationReport:
    return EvaluationReport(
        uri="",
        sha256="",
        fingerprint="",
        created_by=CreatedBy(posttrain="0", python="3", packages={}, code={}),
        candidate=candidate,
        baseline=incumbent,
        incumbent=incumbent,
        incumbent_is_baseline=first,
    )


def write(folder: Path, candidate: list[list[int]], incumbent: list[list[int]]) -> Path:
    rows = [
        {"model": name, "record": f"r{index}", "correct": bool(right), "reward": float(right)}
        for name, table in (("candidate", candidate), ("incumbent", incumbent))
        for index, samples in enumerate(table)
        for right in samples
    ]
    pq.write_table(pa.Table.from_pylist(rows), folder / "records.parquet")
    return folder


def test_differences_are_paired_by_record(tmp_path: Path) -> None:
    write(tmp_path, [[1, 1], [1, 0], [0, 0]], [[0, 0], [1, 0], [1, 0]])
    assert differences(tmp_path, "pass@1").tolist() == [1.0, 0.0, -0.5]


def test_a_clear_improvement_passes(tmp_path: Path) -> None:
    write(tmp_path, [[1, 1]] * 4, [[0, 0]] * 4)
    (check,) = decide(report(scores(1.0), scores(0.0)), GateConfig(), tmp_path)
    # Every record differs by 1, so every resample does.
    assert check.passed
    assert check.observed == 1.0
    assert "improves on the champion" in check.reason


def test_noise_does_not_pass(tmp_path: Path) -> None:
    write(tmp_path, [[1, 1], [0, 0], [1, 0], [0, 1]], [[0, 0], [1, 1], [0, 0], [0, 0]])
    (check,) = decide(report(scores(0.5), scores(0.25)), GateConfig(), tmp_path)
    # Differences 1, -1, .5, .5: mean .25, but a resample of -1 alone is possible.
    assert not check.passed
    assert check.observed < 0
    assert "mean difference +0.250" in check.reason


def test_no_difference_is_no_improvement(tmp_path: Path) -> None:
    write(tmp_path, [[1, 0]] * 4, [[1, 0]] * 4)
    (check,) = decide(
        report(scores(0.5), scores(0.5), first=True), GateConfig(min_improvement=0.0), tmp_path
    )
    assert not check.passed
    assert "does not improve on the SFT baseline" in check.reason


@pytest.mark.parametrize(
    ("gate", "candidate", "rule"),
    [
        ({"max_kl": 0.5}, {"kl": 0.6}, "max_kl"),
        ({"max_length_ratio": 1.2}, {"length": 12.1}, "max_length_ratio"),
        ({"max_truncated_fraction": 0.1}, {"truncated_fraction": 0.2}, "max_truncated_fraction"),
        ({"min_primary": 1.5}, {}, "min_pass@1"),
    ],
)
def test_each_regression_alone_refuses(
    tmp_path: Path, gate: dict[str, float], candidate: dict[str, float], rule: str
) -> None:
    write(tmp_path, [[1, 1]] * 4, [[0, 0]] * 4)
    checks = decide(
        report(scores(1.0, **candidate), scores(0.0)), GateConfig.model_validate(gate), tmp_path
    )
    assert [(check.rule, check.passed) for check in checks] == [
        ("min_improvement", True),
        (rule, False),
    ]
    assert checks[1].observed != checks[1].required


def test_limits_that_are_kept_pass(tmp_path: Path) -> None:
    write(tmp_path, [[1, 1]] * 4, [[0, 0]] * 4)
    gate = GateConfig(max_kl=1.0, max_length_ratio=1.0, max_truncated_fraction=0.0, min_primary=1.0)
    assert all(c.passed for c in decide(report(scores(1.0), scores(0.0)), gate, tmp_path))
