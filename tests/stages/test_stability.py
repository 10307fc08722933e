"""The policies of unstable training: what is judged, decided, counted and said."""

from __future__ import annotations

import json
import logging
import math
from typing import Any

import pytest
from pydantic import ValidationError

from schemas.base import UserError
from schemas.rl import OnlineConfig, OnlineStabilityConfig
from schemas.training import StabilityConfig
from stages.stability import Stability, Unstable


def stability(**settings: Any) -> Stability:
    return Stability(StabilityConfig.model_validate(settings), "sft.stability")


def problem(found: Stability, loss: float = math.nan) -> Unstable:
    with pytest.raises(Unstable) as caught:
        found.check_loss(loss)
    return caught.value


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_found(value: float) -> None:
    found = stability()
    with pytest.raises(Unstable, match=f"the loss is {value}"):
        found.check_loss(value)
    with pytest.raises(Unstable, match=f"the gradient norm is {value}"):
        found.check_grad_norm(value)
    with pytest.raises(Unstable, match=f"the critic's gradient norm is {value}"):
        found.check_grad_norm(value, "critic's")
    found.check_loss(1e30)
    found.check_grad_norm(1e30)


def test_a_norm_above_the_absolute_limit_is_found() -> None:
    found = stability(grad_norm={"max": 5.0})
    found.check_grad_norm(5.0)
    with pytest.raises(Unstable, match=r"norm is 5.01, above 5 \(sft.stability.grad_norm.max\)"):
        found.check_grad_norm(5.01)
    assert found.grad_norms == [5.0]
    found.check_grad_norm(50.0, "critic's")  # another model's norm need only be finite


def test_a_norm_far_above_the_running_median_is_found() -> None:
    found = stability(grad_norm={"max_ratio": 3.0, "window": 4})
    found.check_grad_norm(100.0)  # not yet: there is no window of norms
    for norm in (1.0, 2.0, 4.0):
        found.check_grad_norm(norm)
    # Median of 100, 1, 2, 4 is 3: the limit is 9.
    with pytest.raises(Unstable, match=r"above 9 .*max_ratio 3 times the median 3\)") as caught:
        found.check_grad_norm(9.5)
    assert (caught.value.value, caught.value.limit) == (9.5, 9.0)
    found.check_grad_norm(8.0)
    assert found.grad_norms == [1.0, 2.0, 4.0, 8.0]  # the refused one is not among them
    # Median 3 again.
    with pytest.raises(Unstable, match="above 9 "):
        found.check_grad_norm(9.5)


def test_stop_names_step_records_and_remedy() -> None:
    found = stability()
    with pytest.raises(
        UserError,
        match=r"^step 7: the loss is nan \(records a, b\): look at the records, lower the learning "
        r"rate, or set sft.stability.non_finite to skip or rewind$",
    ):
        found.intervene(problem(found), step=7, records=["a", "b"])
    assert found.interventions == []
    assert found.metrics() == {}  # nothing could ever be counted


def test_interventions_are_counted_and_bounded(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    found = stability(non_finite="skip", max_interventions=2)
    assert found.metrics() == {"stability/num_skipped": 0.0, "stability/num_rewinds": 0.0}
    records = [f"r{number}" for number in range(10)]
    for step in (3, 5):
        assert found.intervene(problem(found), step=step, records=records) == "skip"
    assert found.metrics() == {"stability/num_skipped": 2.0, "stability/num_rewinds": 0.0}
    assert caplog.messages[-1] == (
        "step 5: the loss is nan (records r0, r1, r2, r3, r4, r5, r6, r7 and 2 more): left out "
        "(intervention 2 of at most 2)"
    )
    with pytest.raises(
        UserError,
        match=r"step 6: the loss is inf \(records a\); 2 times before, .*"
        "sft.stability.max_interventions allows no more: look at the records",
    ):
        found.intervene(problem(found, math.inf), step=6, records=["a"])
    first = found.interventions[0]
    assert first == {
        "step": 3,
        "case": "non_finite",
        "action": "skip",
        "value": "nan",
        "limit": None,
        "records": records,
        "learning_rate_scale": 1.0,
    }


def test_each_rewind_cuts_the_learning_rate() -> None:
    found = stability(non_finite="rewind", rewind_learning_rate_factor=0.25)
    for expected in (0.25, 0.0625):
        assert found.intervene(problem(found), step=1, records=[]) == "rewind"
        assert found.learning_rate_scale == expected
    assert found.metrics()["stability/num_rewinds"] == 2.0


def test_ruined_weights_are_not_skipped() -> None:
    found = stability(non_finite="skip")
    ruined = Unstable("non_finite", "a weight", value=1, limit=None, remedy="", skippable=False)
    with pytest.raises(UserError, match="is skip, but weights that are ruined cannot be skipped"):
        found.intervene(ruined, step=1, records=[])


def test_the_state_goes_through_json() -> None:
    found = stability(non_finite="rewind", grad_norm={"max": 9.0})
    found.check_grad_norm(1.5)
    found.intervene(problem(found, -math.inf), step=2, records=["a"])
    again = stability(non_finite="rewind", grad_norm={"max": 9.0})
    again.load_state_dict(json.loads(json.dumps(found.state_dict(), allow_nan=False)))
    assert again == found
    # Going back takes the norms only: what was decided stays.
    again.go_back({"grad_norms": [], "interventions": [], "learning_rate_scale": 1.0})
    assert (again.grad_norms, again.learning_rate_scale) == ([], 0.5)
    assert again.interventions == found.interventions


def test_a_limit_for_the_norm_is_needed() -> None:
    with pytest.raises(ValidationError, match="set max or max_ratio"):
        StabilityConfig.model_validate({"grad_norm": {}})


@pytest.mark.parametrize(("case", "limit"), [("kl", "max_kl"), ("entropy", "min_entropy")])
def test_rewinding_at_a_limit_needs_the_limit(case: str, limit: str) -> None:
    settings = {"sampling": {"max_completion_tokens": 1}, "stability": {case: "rewind"}}
    with pytest.raises(ValidationError, match=f"stability.{case} is rewind, .*: add {limit}"):
        OnlineConfig.model_validate(settings)
    OnlineConfig.model_validate({**settings, limit: 1.0})


@pytest.mark.parametrize(
    ("settings", "rewinds", "may_intervene"),
    [
        ({}, False, False),
        ({"non_finite": "skip"}, False, True),
        ({"non_finite": "rewind"}, True, True),
        ({"grad_norm": {"max": 1.0}}, False, True),
        ({"grad_norm": {"max": 1.0, "action": "stop"}}, False, False),
        ({"grad_norm": {"max": 1.0, "action": "rewind"}}, True, True),
        ({"kl": "rewind"}, True, True),
        ({"entropy": "rewind"}, True, True),
        ({"held_out": {}}, False, False),
        ({"held_out": {"action": "rewind"}}, True, True),
    ],
)
def test_what_may_happen_follows_from_the_policies(
    settings: dict[str, Any], rewinds: bool, may_intervene: bool
) -> None:
    found = Stability(OnlineStabilityConfig.model_validate(settings), "rl.online.stability")
    assert (found.config.rewinds, found.may_intervene) == (rewinds, may_intervene)
