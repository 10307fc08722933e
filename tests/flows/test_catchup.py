from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import permutations
from typing import Any
from uuid import UUID

import pytest

from flows.catchup import Night, verdict

NOW = datetime(2026, 3, 5, 9, 30, tzinfo=UTC)
HOUR = timedelta(hours=1)


def night(day: int) -> Night:
    return Night(UUID(int=day), datetime(2026, 3, day, 2, 0, tzinfo=UTC))


@pytest.mark.parametrize("order", permutations([2, 3, 4]))
@pytest.mark.parametrize("own", [2, 3, 4, 5])
def test_of_the_missed_nights_the_newest_is_run(order: tuple[int, ...], own: int) -> None:
    days = {*order, 5}
    others = [night(day) for day in (*order, 5) if day != own]
    dropped = verdict(night(own), others, "latest", HOUR, NOW)
    assert set(dropped) == {UUID(int=day) for day in days if day != 5}
    assert dropped[UUID(int=3)] == (
        "missed: due at 2026-03-03 02:00 UTC, and the run due at 2026-03-05 02:00 UTC takes the "
        "data of today"
    )


@pytest.mark.parametrize(("late_after", "runs"), [(timedelta(hours=7), 0), (8 * HOUR, 1)])
def test_with_skip_a_night_that_is_late_is_not_run(late_after: timedelta, runs: int) -> None:
    """At 9:30 the run due at 2:00 is seven and a half hours late."""
    dropped = verdict(night(5), [night(4)], "skip", late_after, NOW)
    assert len(dropped) == 2 - runs
    assert (UUID(int=5) in dropped) is (runs == 0)


@pytest.mark.parametrize("policy", ["latest", "skip"])
def test_a_night_in_time_is_run(policy: Any) -> None:
    now = night(5).due + timedelta(minutes=5)
    assert verdict(night(5), [], policy, HOUR, now) == {}
