"""GSM8K (Cobbe et al. 2021): each function turns one raw record into records of a layout.

The files are `train.jsonl` and `test.jsonl` (question, worked answer) and
`example_model_solutions.jsonl` (question, four models' solutions with right or wrong).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

INSTRUCTION = (
    "Work it out step by step, one step a line. "
    "End with a line that holds #### and the answer, a number without a unit."
)
"""Stands below every question, so that a question is the same prompt in every split."""

# A calculator mark, or one that was cut at the end of a solution.
_MARK = re.compile(r"<<[^>]*(?:>>|>?$)")


def to_demonstration(
    record: dict[str, Any], *, instruction: str = INSTRUCTION
) -> Iterator[dict[str, Any]]:
    """Yield the question and its worked answer without calculator marks."""
    steps, answer = _split(record)
    yield {
        "prompt": _prompt(record, instruction),
        "completion": _said(f"{_without_marks(steps)}\n#### {answer}"),
    }


def to_verifiable(
    record: dict[str, Any], *, instruction: str = INSTRUCTION
) -> Iterator[dict[str, Any]]:
    """Yield the question and the number that answers it."""
    yield {"prompt": _prompt(record, instruction), "answer": _split(record)[1]}


def to_preferences(
    record: dict[str, Any], *, instruction: str = INSTRUCTION
) -> Iterator[dict[str, Any]]:
    """Yield every pair of a right and a wrong solution that models gave to the question."""
    right: list[str] = []
    wrong: list[str] = []
    for value in record.values():
        if isinstance(value, dict):
            (right if value["is_correct"] else wrong).append(_solution(value["solution"]))
    for chosen in right:
        for rejected in wrong:
            if chosen != rejected:
                yield {
                    "prompt": _prompt(record, instruction),
                    "chosen": _said(chosen),
                    "rejected": _said(rejected),
                }


def _prompt(record: dict[str, Any], instruction: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"{record['question'].strip()}\n\n{instruction}"}]


def _said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def _split(record: dict[str, Any]) -> tuple[str, str]:
    """The worked steps, and the number after the hashes without thousands separators."""
    steps, hashes, answer = record["answer"].rpartition("####")
    if not hashes:
        raise ValueError("answer has no line #### N")
    return steps, answer.strip().replace(",", "")


def _solution(text: str) -> str:
    """A model's solution in the form of the worked answers: `A: N` becomes `#### N`."""
    steps, mark, answer = text.rpartition("\nA: ")
    if not mark:  # It was cut before its answer.
        return _without_marks(text)
    return f"{_without_marks(steps)}\n#### {answer.strip().replace(',', '')}"


def _without_marks(steps: str) -> str:
    lines = (_MARK.sub("", line).strip() for line in steps.split("\n"))
    return "\n".join(line for line in lines if line)
