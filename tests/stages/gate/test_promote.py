"""The gate on records made by hand."""

from __future__ import annotations

from typing import Any

import pytest

from infra.manifest import CorruptArtifact
from infra.store import Store
from schemas.artifacts import GateCheck
from schemas.base import UserError
from schemas.requests import PromoteRequest
from stages.gate.records import RecordMetrics
from stages.promote import decide

BETTER, WORSE = [[1, 1]] * 4, [[0, 0]] * 4


def judged(evaluation: Any, request: PromoteRequest) -> dict[str, GateCheck]:
    checks = decide(request, evaluation.store)
    assert len({check.rule for check in checks}) == len(checks)
    return {check.rule: check for check in checks}


def test_differences_are_paired_by_record(evaluation: Any) -> None:
    report = evaluation.report([[1, 1], [1, 0], [0, 0]], [[0, 0], [1, 0], [1, 0]])
    metrics = RecordMetrics(evaluation.store.path(report))
    assert metrics.differences("pass@1", "incumbent").tolist() == [1.0, 0.0, -0.5]
    assert metrics.differences("pass@1", "incumbent", ["r2", "r0"]).tolist() == [1.0, -0.5]
    # pass@2 of two samples: 1 if any is right.
    assert metrics.differences("pass@2", "incumbent").tolist() == [1.0, 0.0, -1.0]


def test_a_clear_improvement_passes(evaluation: Any) -> None:
    checks = judged(evaluation, evaluation.request(evaluation.report(BETTER, WORSE)))
    # Every record differs by 1, so every resample does.
    check = checks["min_improvement"]
    assert check.passed
    assert check.observed == 1.0
    assert "improves on the champion" in check.reason
    assert check.numbers == {
        "candidate": 1.0,
        "incumbent": 0.0,
        "mean": 1.0,
        "lower_bound": 1.0,
        "confidence": 0.95,
        "num_resamples": 2000.0,
        "seed": 0.0,
        "num_records": 4.0,
    }
    assert checks.keys() == {"min_improvement", "contamination.max_shared_prompts"}


def test_noise_does_not_pass(evaluation: Any) -> None:
    report = evaluation.report([[1, 1], [0, 0], [1, 0], [0, 1]], [[0, 0], [1, 1], [0, 0], [0, 0]])
    check = judged(evaluation, evaluation.request(report))["min_improvement"]
    # Differences 1, -1, .5, .5: mean .25, but a resample of -1 alone is possible.
    assert not check.passed
    assert check.observed is not None and check.observed < 0
    assert "mean difference +0.250" in check.reason
    again = judged(evaluation, evaluation.request(report))["min_improvement"]
    assert again == check


def test_no_difference_is_no_improvement(evaluation: Any) -> None:
    report = evaluation.report([[1, 0]] * 4, [[1, 0]] * 4, first=True)
    request = evaluation.request(report, {"min_improvement": 0.0})
    check = judged(evaluation, request)["min_improvement"]
    assert not check.passed
    assert "does not improve on the SFT baseline" in check.reason


@pytest.mark.parametrize(
    ("gate", "candidate", "rule", "observed"),
    [
        ({"max_kl": 0.5}, {"kl": 0.6}, "max_kl", 0.6),
        ({"max_length_ratio": 1.2}, {"length": 12.1}, "max_length_ratio", 1.21),
        (
            {"max_truncated_fraction": 0.1},
            {"truncated_fraction": 0.2},
            "max_truncated_fraction",
            0.2,
        ),
        ({"min_primary": 1.5}, {}, "min_pass@1", 1.0),
        ({"limits": [{"metric": "kl", "max": 0.5}]}, {"kl": 0.6}, "limits[kl].max", 0.6),
        ({"limits": [{"metric": "length", "min": 8}]}, {"length": 7.0}, "limits[length].min", 7.0),
        ({"limits": [{"metric": "verifier", "min": 1.1}]}, {}, "limits[verifier].min", 1.0),
    ],
)
def test_each_limit_alone_refuses(
    evaluation: Any,
    gate: dict[str, Any],
    candidate: dict[str, float],
    rule: str,
    observed: float,
) -> None:
    report = evaluation.report(BETTER, WORSE, **candidate)
    checks = judged(evaluation, evaluation.request(report, gate))
    assert [name for name, check in checks.items() if not check.passed] == [rule]
    assert checks[rule].observed == pytest.approx(observed)


def test_limits_that_are_met_exactly_pass(evaluation: Any) -> None:
    gate = {
        "max_kl": 1.0,
        "max_length_ratio": 1.0,
        "max_truncated_fraction": 0.0,
        "min_primary": 1.0,
        "limits": [{"metric": "length", "min": 10.0, "max": 10.0}],
    }
    checks = judged(evaluation, evaluation.request(evaluation.report(BETTER, WORSE), gate))
    assert len(checks) == 1 + 4 + 2 + 1
    assert all(check.passed for check in checks.values())


@pytest.mark.parametrize(("allowed", "passed"), [(1.9, False), (2.0, True)])
def test_a_regression_of_a_metric_that_should_be_low(
    evaluation: Any, allowed: float, passed: bool
) -> None:
    # Every record is two tokens longer than the incumbent's: a loss of exactly 2 in any resample.
    columns = {"candidate": {"length": [[12, 12]] * 4}, "incumbent": {"length": [[10, 10]] * 4}}
    columns["baseline"] = columns["incumbent"]
    report = evaluation.report(BETTER, WORSE, columns=columns)
    gate = {"limits": [{"metric": "length", "max_regression": allowed}]}
    check = judged(evaluation, evaluation.request(report, gate))["limits[length].max_regression"]
    assert (check.passed, check.observed, check.required) == (passed, -2.0, -allowed)
    assert check.numbers["mean"] == -2.0


def test_a_regression_is_judged_on_the_bound_and_not_on_the_mean(evaluation: Any) -> None:
    # pass@2 gains 1, 0, 0, -1: the mean is 0, but most of what it may be is below.
    report = evaluation.report([[1, 1], [1, 0], [0, 0], [0, 0]], [[0, 0], [1, 0], [0, 0], [1, 1]])
    gate = {"limits": [{"metric": "pass@1", "max_regression": 0.1}]}
    check = judged(evaluation, evaluation.request(report, gate))["limits[pass@1].max_regression"]
    assert check.numbers["mean"] == 0.0
    # The 5% quantile of means of four draws from 1, 0, 0, -1. P(sum <= -3) = (4 * 2 + 1) / 256 and
    # P(sum <= -2) = (9 + 28) / 256 = .14: the quantile is a sum of -2, a mean of -.5.
    assert check.observed == -0.5
    assert not check.passed


SLICES = [{"num_terms": 4}, {"num_terms": 4}, {"num_terms": 5}, {"num_terms": 5}]


def test_a_slice_that_falls_refuses_a_candidate_that_gains(evaluation: Any) -> None:
    # Four terms: from 0 to 1. Five terms: from 1 to 1/2 on each record. On the whole +.25.
    report = evaluation.report([[1, 1], [1, 1], [1, 0], [0, 1]], [[0, 0], [0, 0], [1, 1], [1, 1]])
    gate = {
        "slices": [
            {"field": "num_terms", "min_records": 2, "min_primary": 0.5, "max_regression": 0.4}
        ]
    }
    checks = judged(evaluation, evaluation.request(report, gate, SLICES))
    own = {rule: check for rule, check in checks.items() if rule.startswith("slices")}
    assert {rule: (check.observed, check.passed) for rule, check in own.items()} == {
        "slices[num_terms=4].min_primary": (1.0, True),
        "slices[num_terms=4].max_regression": (1.0, True),
        "slices[num_terms=5].min_primary": (0.5, True),
        "slices[num_terms=5].max_regression": (-0.5, False),
    }
    numbers = own["slices[num_terms=5].max_regression"].numbers
    assert (numbers["candidate"], numbers["incumbent"], numbers["num_records"]) == (0.5, 1.0, 2)


def test_a_small_slice_is_named_and_not_judged(evaluation: Any) -> None:
    report = evaluation.report([*BETTER, [0, 0]], [*WORSE, [1, 1]])
    gate = {"slices": [{"field": "num_terms", "min_records": 2, "min_primary": 0.5}]}
    metadata = [*SLICES, {"num_terms": 6}]
    checks = judged(evaluation, evaluation.request(report, gate, metadata))
    small = checks["slices[num_terms=6]"]
    assert (small.passed, small.observed, small.required) == (True, None, 2.0)
    assert small.reason == "num_terms 6: not judged, 1 records are fewer than min_records"
    named = {"slices": [{**gate["slices"][0], "values": [6]}]}
    request = evaluation.request(report, named, metadata)
    with pytest.raises(UserError, match="fewer than 2 records"):
        decide(request, evaluation.store)


def test_reward_instead_of_pass_at_1(evaluation: Any) -> None:
    report = evaluation.report(BETTER, WORSE)
    gate = {
        "primary_metric": "reward",
        "min_primary": 0.5,
        "slices": [{"field": "num_terms", "min_records": 2, "min_primary": 0.5}],
    }
    checks = judged(evaluation, evaluation.request(report, gate, SLICES))
    assert checks["min_reward"].observed == 1.0
    assert "reward 1.000" in checks["slices[num_terms=4].min_primary"].reason


@pytest.mark.parametrize("name", ["records.parquet", "records.jsonl"])
def test_numbers_that_were_changed_are_not_judged(evaluation: Any, name: str) -> None:
    gate = {"slices": [{"field": "num_terms", "min_records": 2, "min_primary": 0.5}]}
    request = evaluation.request(evaluation.report(BETTER, WORSE), gate, SLICES)
    chosen = request.report if name.endswith("parquet") else request.evaluation
    path = evaluation.store.root / chosen.uri / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(CorruptArtifact, match="has changed since it was sealed"):
        decide(request, Store(evaluation.store.root))
