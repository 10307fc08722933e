"""Proxy against gold, on numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from schemas.artifacts import GateCheck
from stages.gate.checks import correlation
from stages.promote import decide

Rows = list[list[float]]


def judge(
    evaluation: Any,
    gold: tuple[list[list[int]], list[list[int]]],
    proxy: tuple[Rows, Rows],
    **hacking: float,
) -> dict[str, GateCheck]:
    """The checks of a candidate and a baseline."""
    columns = {"candidate": {"proxy": proxy[0]}, "baseline": {"proxy": proxy[1]}}
    columns["incumbent"] = columns["baseline"]
    report = evaluation.report(gold[0], gold[1], columns=columns)
    request = evaluation.request(report, {"reward_hacking": hacking})
    return {
        check.rule.removeprefix("reward_hacking."): check
        for check in decide(request, evaluation.store)
        if check.rule.startswith("reward_hacking")
    }


RIGHT, HALF = [[1, 1]] * 4, [[1, 0]] * 4
LOW, HIGH = [[0.2, 0.2]] * 4, [[0.8, 0.8]] * 4


@pytest.mark.parametrize(
    ("gold", "proxy", "allowed", "passed", "word"),
    [
        (
            (HALF, RIGHT),
            (HIGH, LOW),
            0.0,
            False,
            "the proxy rose while pass@1 may have lost more than",
        ),
        (
            (HALF, RIGHT),
            (HIGH, LOW),
            0.49,
            False,
            "the proxy rose while pass@1 may have lost more than",
        ),
        ((HALF, RIGHT), (HIGH, LOW), 0.5, True, "pass@1 lost no more than"),
        ((RIGHT, HALF), (HIGH, LOW), 0.0, True, "pass@1 lost no more than"),
        ((HALF, HALF), (HIGH, LOW), 0.0, True, "pass@1 lost no more than"),
        # Gold fell, and the proxy with it: a bad policy, but not a hacked reward model.
        ((HALF, RIGHT), (LOW, HIGH), 0.0, True, "the proxy did not rise"),
    ],
)
def test_the_proxy_rises_while_gold_falls(
    evaluation: Any, gold: Any, proxy: Any, allowed: float, passed: bool, word: str
) -> None:
    check = judge(evaluation, gold, proxy, max_gold_loss=allowed)["max_gold_loss"]
    assert check.passed is passed
    assert word in check.reason
    gain = 0.6 if proxy[0] is HIGH else -0.6
    assert check.numbers["proxy_gain"] == pytest.approx(gain)
    # Every record moves alike, so the bound is the mean.
    assert check.observed == float(gold[0] is RIGHT) / 2 - float(gold[1] is RIGHT) / 2


def test_a_loss_that_may_be_noise_is_not_shown_to_be_none(evaluation: Any) -> None:
    # Gains 1, 0, 0, -1: mean 0, 5% bound -.5 (worked out in test_promote.py).
    gold = ([[1, 1], [1, 0], [0, 0], [0, 0]], [[0, 0], [1, 0], [0, 0], [1, 1]])
    check = judge(evaluation, gold, (HIGH, LOW), max_gold_loss=0.1)["max_gold_loss"]
    assert (check.passed, check.observed) == (False, -0.5)


def test_correlation_by_hand() -> None:
    # x - mean = -1.5, -.5, .5, 1.5; y - mean = -.5, .5, -.5, .5: 1 / sqrt(5 * 1).
    found = correlation(torch.tensor([1.0, 2, 3, 4]), torch.tensor([0.0, 1, 0, 1]))
    assert found == pytest.approx(1 / 5**0.5)
    assert correlation(torch.tensor([1.0, 1.0]), torch.tensor([0.0, 1.0])) == 0.0


@pytest.mark.parametrize(("floor", "passed"), [(0.9, True), (-0.9, True), (1.0, True)])
def test_a_proxy_that_agrees(evaluation: Any, floor: float, passed: bool) -> None:
    proxy: Rows = [[0.9, 0.1]] * 4
    check = judge(evaluation, (HALF, HALF), (proxy, LOW), min_correlation=floor)["min_correlation"]
    assert (check.passed, check.observed) == (passed, pytest.approx(1.0))


@pytest.mark.parametrize(("proxy", "observed"), [([[0.1, 0.9]] * 4, -1.0), ([[0.5, 0.5]] * 4, 0.0)])
def test_a_proxy_that_has_come_apart(evaluation: Any, proxy: Rows, observed: float) -> None:
    checks = judge(evaluation, (HALF, HALF), (proxy, LOW), min_correlation=0.2)
    check = checks["min_correlation"]
    assert (check.passed, check.observed) == (False, pytest.approx(observed))
    assert "over 8 completions, below the floor of +0.200" in check.reason


@pytest.mark.parametrize(("gold", "word"), [(RIGHT, "right"), ([[0, 0]] * 4, "wrong")])
def test_nothing_to_correlate(evaluation: Any, gold: list[list[int]], word: str) -> None:
    checks = judge(evaluation, (gold, HALF), (HIGH, LOW), min_correlation=0.2)
    check = checks["min_correlation"]
    assert (check.passed, check.observed) == (True, None)
    assert f"every completion is {word}" in check.reason
