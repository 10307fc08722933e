"""Chains of integer arithmetic, worked out one step a line: a task a tiny model learns in a minute.

A problem is ``4-1+7=`` and a solution works from left to right, one operation a line, and ends with
the answer behind a hash::

    4-1=3
    3+7=10
    #10

Solutions come from a *sloppy* demonstrator: in each step, with probability ``slip_probability``,
it gets the result wrong (adds where it should subtract or the other way round, or forgets a carry
or a borrow) and then works on faithfully from the wrong result. A policy that imitates it perfectly
is therefore right little more than ``(1 - slip_probability) ** operations`` of the time, and
reinforcement learning has something to gain.

The steps of a solution are its lines, the answer line included. Joined by `STEP_SEPARATOR` they are
the completion, with no separator at the end.

Training and held-out problems are kept apart by the digest of the problem's text
(`digest_fraction`), never by the seed: two seeds may draw the same problem, two disjoint digest
ranges cannot.

Every generator is deterministic in its arguments and needs the standard library only.
"""

import hashlib
import random
import re
from collections.abc import Iterator
from typing import Final, TypedDict

ALPHABET: Final = "0123456789+-=#\n"
"""Every character of a prompt or a completion: the vocabulary of a character tokenizer."""

STEP_SEPARATOR: Final = "\n"
"""What stands between two steps of a completion."""

_PROMPT: Final = re.compile(r"(\d+)((?:[+-]\d+)+)=", re.ASCII)
_OPERATION: Final = re.compile(r"([+-])(\d+)", re.ASCII)
_ANSWER: Final = re.compile(r"#(0|-?[1-9]\d*)", re.ASCII)
_VAIN_DRAWS: Final = 2_000
"""Draws without a new problem after which the problems of that length count as used up."""
_VAIN_SOLUTIONS: Final = 10_000
"""Solutions without the wanted outcome after which the slip probability is at fault."""


class Demonstration(TypedDict):
    """A prompt and one solution of the sloppy demonstrator, which may be wrong."""

    prompt: str
    completion: str


class Preference(TypedDict):
    """A prompt with a right solution (chosen) and one with a wrong answer (rejected)."""

    prompt: str
    chosen: str
    rejected: str


class StepLabels(TypedDict):
    """A prompt, the steps of one solution, and for each step whether all is right up to it."""

    prompt: str
    completions: list[str]
    labels: list[bool]


class Problem(TypedDict):
    """A prompt, its true answer, and how many terms it has."""

    prompt: str
    answer: str
    num_terms: int


def demonstrations(
    *,
    count: int,
    seed: int,
    min_terms: int = 4,
    max_terms: int = 5,
    max_operand: int = 9,
    slip_probability: float = 0.17,
    digest_range: tuple[float, float] = (0.0, 0.8),
) -> Iterator[Demonstration]:
    """Yield ``count`` solutions by the sloppy demonstrator, right or wrong as they fall.

    A problem comes a second time only when all of its length have been used.
    """
    _check_slip_probability(slip_probability)
    rng = random.Random(seed)
    for prompt in _prompts(
        rng, count, min_terms, max_terms, max_operand, digest_range, repeat=True
    ):
        steps = _solve(prompt, rng, slip_probability)
        yield {"prompt": prompt, "completion": STEP_SEPARATOR.join(steps)}


def preferences(
    *,
    count: int,
    seed: int,
    min_terms: int = 4,
    max_terms: int = 5,
    max_operand: int = 9,
    slip_probability: float = 0.17,
    digest_range: tuple[float, float] = (0.0, 0.8),
) -> Iterator[Preference]:
    """Yield ``count`` pairs: a right solution, and a sloppy one whose answer is wrong.

    The rejected solution is drawn until its answer is wrong, so ``slip_probability`` must not be 0;
    the larger it is, the more slips a rejected solution holds.
    """
    _check_slip_probability(slip_probability)
    if slip_probability == 0.0:
        raise ValueError("preferences need wrong solutions: set slip_probability above 0")
    rng = random.Random(seed)
    for prompt in _prompts(
        rng, count, min_terms, max_terms, max_operand, digest_range, repeat=True
    ):
        right = _solve(prompt, rng, 0.0)
        for _ in range(_VAIN_SOLUTIONS):
            wrong = _solve(prompt, rng, slip_probability)
            if wrong[-1] != right[-1]:
                break
        else:
            raise ValueError(
                f"slip_probability={slip_probability} gave no wrong solution of {prompt!r} in "
                f"{_VAIN_SOLUTIONS} tries: raise it"
            )
        yield {
            "prompt": prompt,
            "chosen": STEP_SEPARATOR.join(right),
            "rejected": STEP_SEPARATOR.join(wrong),
        }


def step_labels(
    *,
    count: int,
    seed: int,
    min_terms: int = 4,
    max_terms: int = 5,
    max_operand: int = 9,
    slip_probability: float = 0.17,
    digest_range: tuple[float, float] = (0.0, 0.8),
) -> Iterator[StepLabels]:
    """Yield ``count`` sloppy solutions with a label for each step, as `check_steps` gives them."""
    _check_slip_probability(slip_probability)
    rng = random.Random(seed)
    for prompt in _prompts(
        rng, count, min_terms, max_terms, max_operand, digest_range, repeat=True
    ):
        steps = _solve(prompt, rng, slip_probability)
        labels = check_steps(prompt, STEP_SEPARATOR.join(steps))
        yield {"prompt": prompt, "completions": steps, "labels": labels}


def problems(
    *,
    count: int,
    seed: int,
    min_terms: int = 4,
    max_terms: int = 5,
    max_operand: int = 9,
    digest_range: tuple[float, float] = (0.8, 1.0),
) -> Iterator[Problem]:
    """Yield ``count`` distinct problems with their true answers, and how many terms they have.

    Raises `ValueError` where the digest range does not hold that many.
    """
    rng = random.Random(seed)
    for prompt in _prompts(
        rng, count, min_terms, max_terms, max_operand, digest_range, repeat=False
    ):
        num_terms = 1 + sum(prompt.count(sign) for sign in "+-")
        yield {"prompt": prompt, "answer": str(_answer(prompt)), "num_terms": num_terms}


def verify(completion: str, answer: str) -> float:
    """Score a completion 1.0 if its last line is ``#`` and exactly ``answer``, else 0.0.

    The hash may occur once only, and nothing may follow the answer. Never raises.
    """
    match = _ANSWER.fullmatch(completion.rsplit(STEP_SEPARATOR, 1)[-1])
    if match is None or completion.count("#") != 1:
        return 0.0
    return 1.0 if match[1] == answer else 0.0


def check_steps(prompt: str, completion: str) -> list[bool]:
    """Say for each line of a completion whether the solution is right up to and with that line.

    A line is right if it takes up the value of the line before (the first: the first operand of the
    problem), applies the next operation of the problem, and computes it correctly; the answer line,
    if it repeats the last value after all operations. From the first wrong line on every label is
    False, so that the first False is the first error. Raises `ValueError` on a prompt that is not a
    problem of this task, and never on a completion.
    """
    value, operations = _parse(prompt)
    labels: list[bool] = []
    right = True
    for index, line in enumerate(completion.split(STEP_SEPARATOR)):
        if index < len(operations):
            operator, operand = operations[index]
            result = _apply(value, operator, operand)
            right = right and line == _step_line(value, operator, operand, result)
            value = result
        else:
            right = right and index == len(operations) and line == f"#{value}"
        labels.append(right)
    return labels


def digest_fraction(prompt: str) -> float:
    """Map a problem's text to [0, 1) by its SHA-256 digest, evenly and alike on every machine."""
    # 53 bits are what a float holds exactly, so that the fraction stays below 1.
    head = int.from_bytes(hashlib.sha256(prompt.encode()).digest()[:8], "big") >> 11
    return head / 2**53


def _prompts(
    rng: random.Random,
    count: int,
    min_terms: int,
    max_terms: int,
    max_operand: int,
    digest_range: tuple[float, float],
    *,
    repeat: bool,
) -> Iterator[str]:
    """Draw prompts inside a digest range; once a length is used up, begin it anew or raise."""
    low, high = digest_range
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"digest_range={digest_range} must satisfy 0 <= low < high <= 1")
    if not 2 <= min_terms <= max_terms:
        raise ValueError(
            f"min_terms={min_terms} and max_terms={max_terms} must satisfy "
            "2 <= min_terms <= max_terms"
        )
    if max_operand < 1:
        raise ValueError(f"max_operand={max_operand} must be at least 1")
    if count < 0:
        raise ValueError(f"count={count} must not be negative")
    seen: dict[int, set[str]] = {terms: set() for terms in range(min_terms, max_terms + 1)}
    for _ in range(count):
        terms = rng.randint(min_terms, max_terms)
        for attempt in range(2):
            prompt = _new_prompt(rng, terms, max_operand, digest_range, seen[terms])
            if prompt is not None:
                break
            if attempt or not repeat:
                raise ValueError(
                    f"too few problems of {terms} terms up to {max_operand} in "
                    f"digest_range={digest_range} for count={count}: ask for fewer, widen the "
                    "range, or raise min_terms or max_operand"
                )
            seen[terms].clear()
        assert prompt is not None
        seen[terms].add(prompt)
        yield prompt


def _new_prompt(
    rng: random.Random,
    terms: int,
    max_operand: int,
    digest_range: tuple[float, float],
    seen: set[str],
) -> str | None:
    """Draw one unseen prompt inside the digest range, or None after too many draws in vain."""
    low, high = digest_range
    for _ in range(_VAIN_DRAWS):
        prompt = _draw_prompt(rng, terms, max_operand)
        if prompt not in seen and low <= digest_fraction(prompt) < high:
            return prompt
    return None


def _draw_prompt(rng: random.Random, terms: int, max_operand: int) -> str:
    """Draw a problem whose true values never fall below 0."""
    value = rng.randint(1, max_operand)
    text = str(value)
    for _ in range(terms - 1):
        operand = rng.randint(1, max_operand)
        operator = rng.choice("+-") if operand <= value else "+"
        value = _apply(value, operator, operand)
        text += f"{operator}{operand}"
    return f"{text}="


def _solve(prompt: str, rng: random.Random, slip_probability: float) -> list[str]:
    """Work a problem out as the sloppy demonstrator does; the steps, the answer line last."""
    value, operations = _parse(prompt)
    steps: list[str] = []
    for operator, operand in operations:
        result = _apply(value, operator, operand)
        if rng.random() < slip_probability:
            result = _slip(rng, value, operator, operand)
        steps.append(_step_line(value, operator, operand, result))
        value = result
    steps.append(f"#{value}")
    return steps


def _slip(rng: random.Random, value: int, operator: str, operand: int) -> int:
    """Return a wrong result: the other operation's, or, where there was one, a carry forgotten."""
    result = _apply(value, operator, operand)
    # Who adds by mistake adds; who subtracts by mistake takes the smaller from the larger.
    other = value + operand if operator == "-" else abs(value - operand)
    wrong = [other] if other != result else []
    # A carry or borrow happened if the units alone leave the range of a digit. (After a slip the
    # value may be negative, where there is no such notion.)
    if value >= 0 and not 0 <= _apply(value % 10, operator, operand % 10) <= 9:
        wrong.append(result - 10 if operator == "+" else result + 10)
    return rng.choice(wrong) if wrong else result + 1


def _answer(prompt: str) -> int:
    value, operations = _parse(prompt)
    for operator, operand in operations:
        value = _apply(value, operator, operand)
    return value


def _parse(prompt: str) -> tuple[int, list[tuple[str, int]]]:
    """Split a prompt into its first operand and its operations in order."""
    match = _PROMPT.fullmatch(prompt)
    if match is None:
        raise ValueError(f"{prompt!r} is not a problem such as '4-1+7='")
    return int(match[1]), [(operator, int(text)) for operator, text in _OPERATION.findall(match[2])]


def _apply(value: int, operator: str, operand: int) -> int:
    return value + operand if operator == "+" else value - operand


def _step_line(value: int, operator: str, operand: int, result: int) -> str:
    return f"{value}{operator}{operand}={result}"


def _check_slip_probability(slip_probability: float) -> None:
    if not 0.0 <= slip_probability <= 1.0:
        raise ValueError(f"slip_probability={slip_probability} must lie between 0 and 1")
