"""The arithmetic task: its generators, its verifier and its step checker."""

import hashlib
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from stages.tasks import arithmetic
from stages.tasks.arithmetic import (
    ALPHABET,
    STEP_SEPARATOR,
    check_steps,
    demonstrations,
    digest_fraction,
    preferences,
    problems,
    step_labels,
    verify,
)

GENERATORS: list[Callable[..., Iterator[Any]]] = [
    demonstrations,
    preferences,
    step_labels,
    problems,
]


def true_answer(prompt: str) -> str:
    """Let Python itself work out a prompt."""
    return str(eval(prompt.removesuffix("="), {"__builtins__": {}}))


@pytest.mark.parametrize(
    ("completion", "answer", "score"),
    [
        ("4-1=3\n3+7=10\n#10", "10", 1.0),
        ("#10", "10", 1.0),
        ("4-1=3\n#-3", "-3", 1.0),
        ("4-1=3\n3+7=11\n#11", "10", 0.0),
        ("4-1=3\n3+7=10\n#010", "10", 0.0),
        ("4-1=3\n3+7=10\n#10\n", "10", 0.0),
        ("4-1=3\n3+7=10\n#10 ", "10", 0.0),
        ("4-1=3\n3+7=10\n#1", "10", 0.0),
        ("4-1=3\n3+7=10\n10", "10", 0.0),
        ("4-1=3#10", "10", 0.0),
        ("#9\n#10", "10", 0.0),
        ("##10", "10", 0.0),
        ("#-0", "0", 0.0),
        ("#", "", 0.0),
        ("", "10", 0.0),
        ("#\u0661\u0660", "10", 0.0),
        ("#10\x00", "10", 0.0),
    ],
)
def test_verify_accepts_the_exact_answer_line_only(
    completion: str, answer: str, score: float
) -> None:
    assert verify(completion, answer) == score


def test_verify_and_check_steps_never_raise_on_a_completion() -> None:
    rng = random.Random(5)
    for _ in range(2000):
        text = "".join(rng.choices(ALPHABET + " x\r\u2028\ud800", k=rng.randint(0, 25)))
        assert verify(text, "10") in (0.0, 1.0)
        assert len(check_steps("4-1+7=", text)) == text.count("\n") + 1


@pytest.mark.parametrize(
    ("completion", "labels"),
    [
        ("4-1=3\n3+7=10\n#10", [True, True, True]),
        # A wrong result: all that follows counts as wrong, though computed faithfully.
        ("4-1=2\n2+7=9\n#9", [False, False, False]),
        ("4-1=3\n3+7=0\n#0", [True, False, False]),
        # Two slips that cancel: the answer is right, the steps are not.
        ("4-1=5\n5+7=10\n#10", [False, False, False]),
        # The left operand does not take up the line before; wrong operation; wrong operand.
        ("4-1=3\n4+7=11\n#11", [True, False, False]),
        ("4-1=3\n3-7=-4\n#-4", [True, False, False]),
        ("4-1=3\n3+8=11\n#11", [True, False, False]),
        # A correct equation that leads elsewhere, a missing step, an answer miscopied.
        ("3+1=4\n4+7=11\n#11", [False, False, False]),
        ("4-1=3\n#3", [True, False]),
        ("4-1=3\n3+7=10\n#11", [True, True, False]),
        # Cut off, overlong, malformed.
        ("4-1=3\n3+7=1", [True, False]),
        ("4-1=3\n3+7=10\n10+1=11\n#11", [True, True, False, False]),
        ("4-1=3\n3+7=10\n#10\n#10", [True, True, True, False]),
        ("4-1=3\n3+7=10\n#10\n", [True, True, True, False]),
        ("4-1=03\n3+7=10\n#10", [False, False, False]),
        ("", [False]),
    ],
)
def test_check_steps_by_hand(completion: str, labels: list[bool]) -> None:
    assert check_steps("4-1+7=", completion) == labels


@pytest.mark.parametrize("prompt", ["", "4=", "4-1", "4-1==", "4*1=", "4--1=", "-4+1=", "4-1=\n"])
def test_check_steps_refuses_what_is_no_problem(prompt: str) -> None:
    with pytest.raises(ValueError, match="is not a problem"):
        check_steps(prompt, "#3")


@pytest.mark.parametrize("generator", GENERATORS)
def test_generators_are_deterministic_in_their_arguments(
    generator: Callable[..., Iterator[Any]],
) -> None:
    first = list(generator(count=40, seed=7))
    assert first == list(generator(count=40, seed=7))
    assert len(first) == 40
    assert first != list(generator(count=40, seed=8))
    # Asking for more does not change what came before.
    assert first == list(generator(count=60, seed=7))[:40]


@pytest.mark.parametrize("generator", GENERATORS)
def test_generators_keep_to_the_asked_sizes_and_the_alphabet(
    generator: Callable[..., Iterator[Any]],
) -> None:
    lengths = set()
    for record in generator(count=150, seed=1, min_terms=4, max_terms=6, max_operand=12):
        prompt = record["prompt"]
        operands = prompt.removesuffix("=").replace("-", "+").split("+")
        lengths.add(len(operands))
        assert all(1 <= int(operand) <= 12 for operand in operands)
        if "num_terms" in record:
            assert record.pop("num_terms") == len(operands)
        texts = [prompt, *record["completions"]] if "completions" in record else record.values()
        assert set("".join(texts)) <= set(ALPHABET)
    assert lengths == {4, 5, 6}


def test_without_slips_every_demonstration_is_right() -> None:
    for record in demonstrations(count=200, seed=3, slip_probability=0.0):
        assert verify(record["completion"], true_answer(record["prompt"])) == 1.0
        assert all(check_steps(record["prompt"], record["completion"]))
        # True values never fall below 0, so no minus sign ever leads a number.
        assert "=-" not in record["completion"] and "#-" not in record["completion"]


def test_every_step_slips_with_the_asked_probability() -> None:
    first_steps = [
        check_steps(record["prompt"], record["completion"])[0]
        for record in demonstrations(count=4000, seed=11, min_terms=4, slip_probability=0.25)
    ]
    # A standard deviation is 0.007.
    assert first_steps.count(False) / 4000 == pytest.approx(0.25, abs=0.03)
    always = demonstrations(count=100, seed=11, slip_probability=1.0)
    assert not any(check_steps(r["prompt"], r["completion"])[0] for r in always)


@pytest.mark.parametrize(
    ("value", "operator", "operand", "wrong"),
    [
        (3, "+", 4, {1}),  # subtracts, the smaller from the larger: 4-3
        (8, "+", 4, {4, 2}),  # subtracts; forgets the carry
        (8, "-", 3, {11}),  # adds
        (12, "-", 5, {17}),  # adds; forgets the borrow, which comes to the same
        (13, "-", 5, {18}),  # both come to 18
        (21, "-", 3, {24, 28}),  # adds; forgets the borrow
        (0, "+", 5, {6}),  # nothing else goes wrong here
        (-2, "+", 5, {7}),  # after a slip values may be negative
    ],
)
def test_slips_by_hand(value: int, operator: str, operand: int, wrong: set[int]) -> None:
    seen = {arithmetic._slip(random.Random(seed), value, operator, operand) for seed in range(60)}
    assert seen == wrong


def test_a_slip_is_never_right() -> None:
    rng = random.Random(0)
    for value in range(-30, 60):
        for operand in range(1, 25):
            assert arithmetic._slip(rng, value, "+", operand) != value + operand
            assert arithmetic._slip(rng, value, "-", operand) != value - operand


def test_preferences_pair_a_right_and_a_wrong_solution() -> None:
    for record in preferences(count=200, seed=2, slip_probability=0.1):
        answer = true_answer(record["prompt"])
        assert verify(record["chosen"], answer) == 1.0
        assert verify(record["rejected"], answer) == 0.0
        assert all(check_steps(record["prompt"], record["chosen"]))


def test_preferences_without_slips_name_the_remedy() -> None:
    with pytest.raises(ValueError, match="slip_probability above 0"):
        list(preferences(count=1, seed=0, slip_probability=0.0))


def test_step_labels_join_to_the_completion_and_agree_with_the_checker() -> None:
    some_false = False
    for record in step_labels(count=200, seed=4):
        completion = STEP_SEPARATOR.join(record["completions"])
        assert record["labels"] == check_steps(record["prompt"], completion)
        assert not any(STEP_SEPARATOR in step for step in record["completions"])
        assert record["completions"][-1].startswith("#")
        # Once wrong, wrong to the end.
        assert record["labels"] == sorted(record["labels"], reverse=True)
        some_false = some_false or False in record["labels"]
    assert some_false


def test_problems_are_distinct_and_truly_answered() -> None:
    records = list(problems(count=500, seed=6, min_terms=4))
    assert len({record["prompt"] for record in records}) == 500
    for record in records:
        assert record["answer"] == true_answer(record["prompt"])


def test_digest_fraction_is_the_head_of_the_sha256_digest() -> None:
    digest = hashlib.sha256(b"4-1+7=").hexdigest()
    assert digest_fraction("4-1+7=") == pytest.approx(int(digest[:12], 16) / 16**12, abs=1e-12)
    fractions = [digest_fraction(str(number)) for number in range(4000)]
    assert min(fractions) >= 0.0 and max(fractions) < 1.0
    assert sum(fraction < 0.8 for fraction in fractions) / 4000 == pytest.approx(0.8, abs=0.03)


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize("seed", [0, 1])
def test_disjoint_digest_ranges_share_no_problem(
    generator: Callable[..., Iterator[Any]], seed: int
) -> None:
    # The space of 3-term problems up to 9 is small enough to be nearly used up here.
    size = {"min_terms": 3, "max_terms": 3, "max_operand": 9}
    count = 1000 if generator is problems else 3000
    training = {
        record["prompt"]
        for record in generator(count=count, seed=seed, digest_range=(0.0, 0.8), **size)
    }
    held_out = {
        r["prompt"] for r in problems(count=200, seed=seed, digest_range=(0.8, 1.0), **size)
    }
    assert len(training) >= 1000 and len(held_out) == 200
    assert not training & held_out
    assert all(digest_fraction(prompt) < 0.8 for prompt in training)
    assert all(digest_fraction(prompt) >= 0.8 for prompt in held_out)


def test_training_repeats_a_problem_only_when_all_are_used() -> None:
    # Two terms up to 2 make seven problems: 1+1 1+2 2+1 2+2 1-1 2-1 2-2.
    prompts = [
        record["prompt"]
        for record in demonstrations(
            count=21, seed=0, min_terms=2, max_terms=2, max_operand=2, digest_range=(0.0, 1.0)
        )
    ]
    for start in (0, 7, 14):
        assert len(set(prompts[start : start + 7])) == 7


def test_too_few_problems_name_the_remedy() -> None:
    size = {"min_terms": 2, "max_terms": 2, "max_operand": 2}
    assert len(list(problems(count=7, seed=0, digest_range=(0.0, 1.0), **size))) == 7
    with pytest.raises(ValueError, match="raise min_terms or max_operand"):
        list(problems(count=8, seed=0, digest_range=(0.0, 1.0), **size))
    # A range without any problem, for a training generator too.
    with pytest.raises(ValueError, match="widen the range"):
        list(demonstrations(count=1, seed=0, digest_range=(0.0, 1e-9), **size))


@pytest.mark.parametrize("generator", GENERATORS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"digest_range": (0.8, 0.8)},
        {"digest_range": (-0.1, 0.5)},
        {"digest_range": (0.5, 1.5)},
        {"min_terms": 1},
        {"min_terms": 5, "max_terms": 4},
        {"max_operand": 0},
        {"count": -1},
    ],
)
def test_impossible_arguments_are_refused(
    generator: Callable[..., Iterator[Any]], arguments: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match=next(iter(arguments))):
        list(generator(**{"count": 1, "seed": 0, **arguments}))


@pytest.mark.parametrize("probability", [-0.1, 1.1])
@pytest.mark.parametrize("generator", [demonstrations, preferences, step_labels])
def test_impossible_slip_probabilities_are_refused(
    generator: Callable[..., Iterator[Any]], probability: float
) -> None:
    with pytest.raises(ValueError, match="slip_probability"):
        list(generator(count=1, seed=0, slip_probability=probability))
