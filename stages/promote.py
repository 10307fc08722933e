"""The gate: whether a candidate may become the champion, and on which numbers."""

from __future__ import annotations

from collections.abc import Iterator

from infra.store import Store
from schemas.artifacts import EvaluationReport, GateCheck
from schemas.evaluation import LOWER_IS_BETTER, GateConfig, MetricLimit, SliceConfig
from schemas.requests import PromoteRequest
from stages.data.records import iter_records
from stages.gate.checks import bootstrap, bounded_loss, ceiling, floor
from stages.gate.contamination import contamination_checks, find_overlap
from stages.gate.records import RecordMetrics
from stages.gate.reward_hacking import reward_hacking_checks
from stages.gate.slices import Members, find_slices


def decide(request: PromoteRequest, store: Store) -> tuple[GateCheck, ...]:
    """Every rule of the gate, judged on the report, its records and the training data.

    The candidate passes if all checks do.
    """
    gate, report = request.gate, request.report
    metrics = RecordMetrics(store.path(report))
    checks = [_improvement(report, gate, metrics), *_named_limits(report, gate)]
    for limit in gate.limits:
        checks.extend(_limit_checks(report, gate, limit, metrics))
    if gate.slices:
        records = iter_records(store.path(request.evaluation))
        for config, members in zip(gate.slices, find_slices(records, gate.slices), strict=True):
            checks.extend(_slice_checks(gate, config, members, metrics))
    if gate.reward_hacking is not None:
        checks.extend(reward_hacking_checks(metrics, gate, gate.reward_hacking))
    checks.extend(_contamination(request, store))
    return tuple(checks)


def _improvement(report: EvaluationReport, gate: GateConfig, metrics: RecordMetrics) -> GateCheck:
    lower, used = bootstrap(metrics.differences(gate.primary_metric, "incumbent"), gate)
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
            f"mean difference {used['mean']:+.3f}, {gate.confidence:.0%} lower bound {lower:+.3f} "
            f"over {report.candidate.num_records} records"
        ),
        numbers={**_both(report, gate.primary_metric), **used},
    )


def _named_limits(report: EvaluationReport, gate: GateConfig) -> Iterator[GateCheck]:
    """The limits that have a field of their own."""
    candidate, incumbent = report.candidate, report.incumbent
    if gate.min_primary is not None:
        primary = candidate.metrics()[gate.primary_metric]
        yield floor(f"min_{gate.primary_metric}", primary, gate.min_primary, f"{primary:.3f}")
    if gate.max_kl is not None:
        head = f"{candidate.kl:.3f} nats of KL to the SFT policy"
        yield ceiling("max_kl", candidate.kl, gate.max_kl, head)
    if gate.max_length_ratio is not None:
        ratio = candidate.length / max(incumbent.length, 1e-9)
        head, numbers = f"{ratio:.3f} times the length", _both(report, "length")
        yield ceiling("max_length_ratio", ratio, gate.max_length_ratio, head, numbers)
    if gate.max_truncated_fraction is not None:
        cut, limit = candidate.truncated_fraction, gate.max_truncated_fraction
        yield ceiling("max_truncated_fraction", cut, limit, f"{cut:.3f} of the completions cut")


def _limit_checks(
    report: EvaluationReport, gate: GateConfig, limit: MetricLimit, metrics: RecordMetrics
) -> Iterator[GateCheck]:
    """Floor, ceiling and largest regression of one metric."""
    name, numbers = limit.metric, _both(report, limit.metric)
    observed = report.candidate.metrics()[name]
    head = f"{name} {observed:.3f}"
    if limit.min is not None:
        yield floor(f"limits[{name}].min", observed, limit.min, head, numbers)
    if limit.max is not None:
        yield ceiling(f"limits[{name}].max", observed, limit.max, head, numbers)
    if limit.max_regression is not None:
        differences = metrics.differences(name, "incumbent")
        gains = -differences if name in LOWER_IS_BETTER else differences
        rule = f"limits[{name}].max_regression"
        yield bounded_loss(rule, gains, limit.max_regression, gate, name, numbers)


def _slice_checks(
    gate: GateConfig, config: SliceConfig, members: Members, metrics: RecordMetrics
) -> Iterator[GateCheck]:
    """Every slice of one field; one that is too small is named, and not judged."""
    candidate = metrics.means("candidate", gate.primary_metric)
    incumbent = metrics.means("incumbent", gate.primary_metric)
    for label, ids in members.items():
        rule, what = f"slices[{config.field}={label}]", f"{config.field} {label}:"
        numbers = {"num_records": float(len(ids))}
        if len(ids) < config.min_records:
            yield GateCheck(
                rule=rule,
                passed=True,
                observed=None,
                required=float(config.min_records),
                reason=f"{what} not judged, {len(ids)} records are fewer than min_records",
                numbers=numbers,
            )
            continue
        numbers["candidate"] = sum(candidate[one] for one in ids) / len(ids)
        numbers["incumbent"] = sum(incumbent[one] for one in ids) / len(ids)
        if config.min_primary is not None:
            yield floor(
                f"{rule}.min_primary",
                numbers["candidate"],
                config.min_primary,
                f"{what} {gate.primary_metric} {numbers['candidate']:.3f}",
                numbers,
            )
        if config.max_regression is not None:
            gains = metrics.differences(gate.primary_metric, "incumbent", ids)
            yield bounded_loss(
                f"{rule}.max_regression",
                gains,
                config.max_regression,
                gate,
                f"{what} {gate.primary_metric}",
                numbers,
            )


def _contamination(request: PromoteRequest, store: Store) -> Iterator[GateCheck]:
    config = request.gate.contamination
    found = find_overlap(
        iter_records(store.path(request.evaluation)),
        ((one.split, iter_records(store.path(one))) for one in request.training),
        config.ngram if config.max_near_duplicates is not None else None,
    )
    return contamination_checks(found, config)


def _both(report: EvaluationReport, metric: str) -> dict[str, float]:
    return {
        "candidate": report.candidate.metrics()[metric],
        "incumbent": report.incumbent.metrics()[metric],
    }
