"""BIG-Bench Mistake (Tyen et al. 2023): reasoning traces with the place of their first mistake."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

INSTRUCTION = "Think step by step, one step a line. End with: So the answer is ..."
"""Stands below every input."""


def to_steps(record: dict[str, Any], *, instruction: str = INSTRUCTION) -> Iterator[dict[str, Any]]:
    """Yield the trace with a label for each step: right before the first mistake, wrong from it on.

    A trace whose `mistake_index` is null is right throughout (the convention of ProcessBench).
    """
    steps = [" ".join(step.split("\n")) for step in record["steps"]]
    mistake = record["mistake_index"]
    if mistake is not None and not 0 <= mistake < len(steps):
        raise ValueError(f"mistake_index is {mistake}, but there are {len(steps)} steps")
    yield {
        "prompt": [{"role": "user", "content": f"{record['input'].strip()}\n\n{instruction}"}],
        "completions": steps,
        "labels": [mistake is None or index < mistake for index in range(len(steps))],
    }
