"""The gate: whether a candidate may become the champion, and on which numbers."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from schemas.artifacts import EVALUATION_RECORDS_FILE, EvaluationReport, GateCheck
from schemas.evaluation import GateConfig
from stages.core.metrics import paired_bootstrap

_BOOTSTRAP_SEED = 0


def decide(
    report: EvaluationReport, gate: GateConfig, records_folder: Path
) -> tuple[GateCheck, ...]:
    """Every rule of the gate, judged on the report and on its records.

    records_folder: the content of the report's artifact. The candidate passes if all checks do.
    """
    checks = [_improvement(report, gate, records_folder)]
    candidate, incumbent = report.candidate, report.incumbent
    if gate.min_primary is not None:
        primary = (
            candidate.pass_at["pass@1"] if gate.primary_metric == "pass@1" else candidate.reward
        )
        checks.append(_floor(f"min_{gate.primary_metric}", primary, gate.min_primary))
    if gate.max_kl is not None:
        checks.append(_ceiling("max_kl", candidate.kl, gate.max_kl, "nats of KL to the SFT policy"))
    if gate.max_length_ratio is not None:
        ratio = candidate.length / max(incumbent.length, 1e-9)
        checks.append(
            _ceiling("max_length_ratio", ratio, gate.max_length_ratio, "times the length")
        )
    if gate.max_truncated_fraction is not None:
        checks.append(
            _ceiling(
                "max_truncated_fraction",
                candidate.truncated_fraction,
                gate.max_truncated_fraction,
                "of the completions cut",
            )
        )
    return tuple(checks)


def differences(records_folder: Path, metric: str) -> Tensor:
    """Candidate less incumbent for each record, means over samples, [_N] by record id."""
    import pyarrow.parquet as pq

    column = "correct" if metric == "pass@1" else "reward"
    table = pq.read_table(
        records_folder / EVALUATION_RECORDS_FILE, columns=["model", "record", column]
    )
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in table.to_pylist():
        values[row["model"]][row["record"]].append(float(row[column]))
    candidate, incumbent = values["candidate"], values["incumbent"]
    assert candidate.keys() == incumbent.keys()
    return torch.tensor(
        [
            sum(candidate[record]) / len(candidate[record])
            - sum(incumbent[record]) / len(incumbent[record])
            for record in sorted(candidate)
        ],
        dtype=torch.float64,
    )


def _improvement(report: EvaluationReport, gate: GateConfig, folder: Path) -> GateCheck:
    mean, lower = paired_bootstrap(
        differences(folder, gate.primary_metric),
        gate.confidence,
        gate.num_resamples,
        _BOOTSTRAP_SEED,
    )
    passed = lower >= gate.min_improvement and lower > 0
    against = "the SFT baseline" if report.incumbent_is_baseline else "the champion"
    verb = "improves" if passed else "does not improve"
    return GateCheck(
        rule="min_improvement",
        passed=passed,
        observed=lower,
        required=gate.min_improvement,
        reason=(
            f"{gate.primary_metric} {verb} on {against} by {gate.min_improvement:.3f}: "
            f"mean difference {mean:+.3f}, {gate.confidence:.0%} lower bound {lower:+.3f} "
            f"over {report.candidate.num_records} records"
        ),
    )


def _ceiling(rule: str, observed: float, limit: float, what: str) -> GateCheck:
    passed = observed <= limit
    relation = "within" if passed else "above"
    return GateCheck(
        rule=rule,
        passed=passed,
        observed=observed,
        required=limit,
        reason=f"{observed:.3f} {what}, {relation} the limit of {limit:.3f}",
    )


def _floor(rule: str, observed: float, limit: float) -> GateCheck:
    passed = observed >= limit
    relation = "at or above" if passed else "below"
    return GateCheck(
        rule=rule,
        passed=passed,
        observed=observed,
        required=limit,
        reason=f"{observed:.3f}, {relation} the floor of {limit:.3f}",
    )
