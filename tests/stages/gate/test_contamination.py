"""Evaluation prompts among the training data."""

from __future__ import annotations

from typing import Any

import pytest

from stages.gate.contamination import find_overlap
from stages.promote import decide

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


def words(start: int, count: int) -> str:
    """Words that no other question has: `a0 b1 c2 ...`."""
    return " ".join(f"{ALPHABET[i % 26]}{i}" for i in range(start, start + count))


def questions(*prompts: Any) -> list[dict[str, Any]]:
    return [{"id": str(index), "prompt": prompt} for index, prompt in enumerate(prompts)]


def test_exact_prompts_are_found_whatever_they_are_wrapped_in() -> None:
    evaluation = questions("What is 1+1?", "What is 2+2?", "What is 3+3?")
    wrapped = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": " What is 1+1?\n"},
    ]
    training = [
        ("demonstrations", [{"messages": [*wrapped, {"role": "assistant", "content": "2"}]}]),
        ("prompts", questions("What is 1+1?", "What is 2+2?", "What is 4+4?", "What is 2+2?")),
        ("preferences", questions("What is 5+5?")),
    ]
    found = find_overlap(evaluation, training, None)
    assert found.num_prompts == 3
    counts = {split: len(own) for split, own in found.shared.items()}
    assert counts == {"demonstrations": 1, "prompts": 2, "preferences": 0}
    assert found.near == {"demonstrations": set(), "prompts": set(), "preferences": set()}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (words(0, 13), 1),
        (words(7, 13), 1),  # the last thirteen of twenty
        (words(8, 13), 0),  # only twelve of them
        (words(0, 12), 0),
        (f"Before, {words(3, 13).upper().replace(' ', ', ')}! After.", 1),
        (f"{words(0, 6)} x {words(6, 7)}", 0),
    ],
)
def test_thirteen_words_in_a_row(text: str, found: int) -> None:
    evaluation = questions(words(0, 20), words(100, 20))
    training = [("demonstrations", [{"prompt": "other", "completion": text}])]
    overlap = find_overlap(evaluation, training, 13)
    assert len(overlap.near["demonstrations"]) == found
    assert overlap.num_short == 0


def test_every_text_of_a_record_is_looked_at_and_none_runs_into_the_next() -> None:
    evaluation = questions(words(0, 20))
    halves = {"prompt": words(0, 10), "completion": words(10, 10)}
    assert find_overlap(evaluation, [("d", [halves])], 13).near == {"d": set()}
    message = [{"role": "user", "content": "x"}, {"role": "assistant", "content": words(0, 20)}]
    for record in (
        {"prompt": "x", "chosen": "y", "rejected": words(0, 20)},
        {"prompt": "x", "completions": ["y", words(0, 20)]},
        {"messages": message},
    ):
        assert len(find_overlap(evaluation, [("d", [record])], 13).near["d"]) == 1


def test_template_text_does_not_count_and_short_prompts_are_counted() -> None:
    template = words(500, 15)
    evaluation = questions(*(f"{template} {words(30 * i, 15)}" for i in range(6)), "too short")
    overlap = find_overlap(evaluation, [("d", questions(f"{template} something else"))], 13)
    assert overlap.near == {"d": set()}
    assert overlap.num_short == 1
    hit = find_overlap(evaluation, [("d", questions(words(30, 15)))], 13)
    assert len(hit.near["d"]) == 1


@pytest.mark.parametrize(
    ("config", "failed"),
    [
        ({}, ["contamination.max_shared_prompts"]),
        ({"max_shared_prompts": 1}, []),
        ({"max_shared_prompts": 1, "max_near_duplicates": 1}, []),
        (
            {"max_shared_prompts": 1, "max_near_duplicates": 0},
            ["contamination.max_near_duplicates"],
        ),
    ],
)
def test_the_gate_states_what_it_found(
    evaluation: Any, config: dict[str, int], failed: list[str]
) -> None:
    prompts = [words(0, 20), words(100, 20), words(200, 20), "short"]
    exact = evaluation.dataset("prompts", questions(prompts[0]))
    pair = {"id": "0", "prompt": words(0, 20), "completion": f"It was {words(103, 14)}."}
    near = evaluation.dataset("demonstrations", [pair])
    report = evaluation.report([[1, 1]] * 4, [[0, 0]] * 4)
    request = evaluation.request(
        report, {"contamination": config}, training=[exact, near], prompts=prompts
    )
    checks = {check.rule: check for check in decide(request, evaluation.store)}
    assert [rule for rule, check in checks.items() if not check.passed] == failed
    shared = checks["contamination.max_shared_prompts"]
    assert shared.observed == 1.0  # one prompt, though two splits have it
    assert shared.numbers == {"num_prompts": 4, "num_in.demonstrations": 1, "num_in.prompts": 1}
    assert shared.reason.startswith("1 of 4 evaluation prompts are training prompts, ")
    if "max_near_duplicates" in config:
        duplicates = checks["contamination.max_near_duplicates"]
        assert duplicates.observed == 1.0  # the exact one is not counted again
        assert duplicates.numbers == {
            "num_prompts": 4,
            "num_in.demonstrations": 1,
            "num_in.prompts": 0,
            "num_short": 1,
            "ngram": 13,
        }


def test_prompts_that_are_all_too_short_are_not_called_clean(evaluation: Any) -> None:
    report = evaluation.report([[1, 1]] * 4, [[0, 0]] * 4)
    request = evaluation.request(report, {"contamination": {"max_near_duplicates": 0}})
    check = decide(request, evaluation.store)[-1]
    assert (check.rule, check.observed) == ("contamination.max_near_duplicates", None)
    assert check.reason == "no evaluation prompt has 13 words: there is nothing to look for"
    assert check.numbers["num_short"] == 4
