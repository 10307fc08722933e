"""How many examples, and the table of what came of them.

`make test` draws a few, the same ones every time; `make fuzz` draws many, others every time.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from schemas.base import UserError

EXAMPLES = int(os.environ.get("POSTTRAIN_FUZZ_EXAMPLES", "0"))
"""Of each target; 0 for the few of `make test`."""

settings.register_profile(
    "fuzz",
    max_examples=EXAMPLES or 40,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

_counts: Counter[tuple[str, str]] = Counter()

Judge = Callable[..., Any]


@pytest.fixture(scope="session")
def judge() -> Judge:
    """Calls a function on fuzzed input: a result, or one clear error, is all that may come of it.

    `judge(target, function, *arguments)` gives the result, or None after a `UserError`.
    """

    def call(target: str, function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            result = function(*arguments)
        except UserError as error:
            check_message(str(error))
            _counts[target, "user errors"] += 1
            return None
        _counts[target, "results"] += 1
        return result

    return call


def check_message(message: str) -> None:
    assert message.strip(), "an empty message"
    assert "Traceback" not in message
    assert len(message) < 20_000, "a message that nobody can read"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    targets = sorted({target for target, _ in _counts})
    if not targets:
        return
    terminalreporter.section("fuzzing")
    lines = [("target", "examples", "results", "user errors")]
    total = [0, 0]
    for target in targets:
        numbers = [_counts[target, outcome] for outcome in ("results", "user errors")]
        total = [a + b for a, b in zip(total, numbers, strict=True)]
        lines.append((target, str(sum(numbers)), *map(str, numbers)))
    lines.append(("total", str(sum(total)), *map(str, total)))
    for target, *numbers in lines:
        terminalreporter.write_line(
            f"{target:<34}" + "".join(f"{number:>13}" for number in numbers)
        )
