"""The ratios of the comparison, on numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest

from tests.benchmarks.versus_trl import ratios


def line(who: str, round_: int, tokens: float, memory: int) -> dict[str, Any]:
    return {
        "who": who,
        "algorithm": "sft",
        "round": round_,
        "tokens_a_cpu_second": tokens,
        "peak_memory_bytes": memory,
        "num_parameters": 10,
    }


def test_each_round_is_compared_with_itself_and_the_median_is_taken() -> None:
    # A slow second round for both does not count twice: 3, 2 and 2.5 times as fast.
    found = [
        *(line("posttrain", 0, 300.0, 360), line("TRL defaults", 0, 100.0, 560)),
        *(line("posttrain", 1, 100.0, 260), line("TRL defaults", 1, 50.0, 560)),
        *(line("posttrain", 2, 250.0, 360), line("TRL defaults", 2, 100.0, 660)),
    ]
    # Above 16 bytes for each of 10 parameters: 200/400, 100/400 and 200/500.
    assert ratios(found) == {
        "sft": {
            "TRL defaults": {
                "tokens_a_cpu_second": pytest.approx(2.5),
                "memory_above_state": pytest.approx(0.4),
            }
        }
    }
