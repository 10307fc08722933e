"""Verifiers: functions that check a completion against the known answer."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from schemas.base import UserError
from schemas.rewards import VerifierConfig
from stages import heartbeat
from stages.rewards.scorer_pool import ScorerPool

_SECONDS = 4.0
_MAX_CHARACTERS = 8000
# Scoring is quick beside sampling, and the processes wait while the model trains.
_MAX_WORKERS = 4


class Verifier(Protocol):
    """Scores completions; most verifiers say 1.0 (right) or 0.0."""

    def score(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The score of each completion against its answer."""
        ...

    def close(self) -> None:
        """End what the verifier runs."""
        ...


def build_verifier(config: VerifierConfig) -> Verifier:
    """The verifier that a recipe names.

    `math_verify`: 1.0 if math-verify finds the answer in the completion. `reasoning_gym:DATASET`:
    1.0 if the data set's scorer gives the text of the last `<answer>` tag (without one, the whole
    completion) exactly 1.0; `arguments` are those of the data set, and `answer` is the answer, or,
    for scorers that need more, the JSON text of the whole item. Anything else is a function
    `module:function`, called as `function(completion, answer, **arguments)` in this process.
    """
    name = config.function
    if name == "math_verify":
        return PooledVerifier(name, _math_verify_arguments(config.arguments))
    if name.startswith("reasoning_gym:"):
        return PooledVerifier(name, config.arguments)
    # Looked up only here: a built-in verifier needs nothing of the user's code.
    from infra.code import load_function

    return FunctionVerifier(name, load_function(name), config.arguments)


class PooledVerifier:
    """A built-in verifier, in child processes."""

    def __init__(self, name: str, arguments: dict[str, Any]) -> None:
        num_workers = min(_MAX_WORKERS, os.cpu_count() or 1)
        self._pool = ScorerPool(name, arguments, seconds=_SECONDS, num_workers=num_workers)

    def score(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The score of each completion against its answer."""
        return self._pool.score(list(zip(completions, answers, strict=True)))

    def close(self) -> None:
        """End the processes."""
        self._pool.close()


class FunctionVerifier:
    """The user's own function."""

    def __init__(self, name: str, function: Callable[..., Any], arguments: dict[str, Any]) -> None:
        self._name = name
        self._function = function
        self._arguments = arguments

    def score(self, completions: Sequence[str], answers: Sequence[str]) -> list[float]:
        """The score of each completion against its answer."""
        pairs = zip(completions, answers, strict=True)
        return [self._one(completion, answer) for completion, answer in pairs]

    def close(self) -> None:
        """Nothing to end."""

    def _one(self, completion: str, answer: str) -> float:
        heartbeat.beat(f"verifying completions with {self._name}")
        where = f"verifier {self._name} on completion {completion!r} and answer {answer!r}"
        try:
            result = self._function(completion, answer, **self._arguments)
        except Exception as error:
            raise UserError(f"{where} raised {type(error).__name__}: {error}") from error
        try:
            score = float(result)
        except (TypeError, ValueError):
            score = math.nan
        if isinstance(result, str) or not math.isfinite(score):
            raise UserError(f"{where} gave {result!r}; it must give a finite number")
        return score


def _math_verify_arguments(given: dict[str, Any]) -> dict[str, Any]:
    arguments = {"max_characters": _MAX_CHARACTERS} | given
    limit = arguments["max_characters"]
    if len(arguments) > 1 or not isinstance(limit, int) or limit < 1:
        raise UserError(
            "math_verify takes one argument, max_characters (how much of a completion's end is "
            f"read, at least 1); it was given {given}"
        )
    return arguments
