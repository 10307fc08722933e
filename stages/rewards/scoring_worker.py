"""The child process in which the built-in verifiers run: one JSON line in, one JSON line out.

They take any text a model may write apart with parsers and computer algebra, which can run for
ever, eat all the memory or crash. Here that costs one child and one score of 0. The kernel holds
the limits, so that a child ends even if its parent has gone.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import json
import logging
import math
import os
import resource
import signal
import sys
import warnings
from collections.abc import Callable
from typing import Any

from schemas.base import UserError
from stages.rewards import safe_evaluation

Scorer = Callable[[str, str], float]

_MEMORY_BYTES = 4 * 2**30


def make_scorer(name: str, arguments: dict[str, Any], seconds: float) -> Scorer:
    """The scorer `math_verify` or `reasoning_gym:DATASET`. Raises UserError where it cannot be."""
    if name == "math_verify":
        return _math_verify(seconds, **arguments)
    return _reasoning_gym(name.removeprefix("reasoning_gym:"), arguments)


def _math_verify(seconds: float, max_characters: int) -> Scorer:
    from math_verify import parse, verify

    safe_evaluation.restrict()
    # Its own limits leave time for a second comparison when one takes too long; they cannot stop
    # arithmetic on huge integers, which the limit of the process does.
    limit = max(1, math.floor(seconds / 2))

    @functools.lru_cache(maxsize=1024)
    def gold(answer: str) -> list[Any]:
        # LaTeX is only looked for between delimiters, and an answer column seldom has them.
        found: list[Any] = parse(answer, parsing_timeout=limit)
        found = found or parse(f"${answer}$", parsing_timeout=limit)
        if all(isinstance(one, str) for one in found):
            raise UserError(
                f"math_verify finds no mathematics in the answer {answer!r}: mend the record"
            )
        return found

    def score(completion: str, answer: str) -> float:
        expected = gold(answer)
        # A solution ends with its answer, so of a text that is too long the end is kept.
        found = parse(completion[-max_characters:], parsing_timeout=limit)
        return float(bool(verify(expected, found, timeout_seconds=limit)))

    return score


def _reasoning_gym(name: str, arguments: dict[str, Any]) -> Scorer:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS
    from reasoning_gym.utils import extract_answer

    safe_evaluation.restrict()
    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"reasoning_gym has no data set {name!r}{hint}")
    try:
        dataset = reasoning_gym.create_dataset(name, **arguments)
    except (AssertionError, TypeError, ValueError) as error:
        raise UserError(
            f"reasoning_gym:{name} does not take the arguments {arguments}: {error}"
        ) from error

    @functools.lru_cache(maxsize=1024)
    def entry(answer: str) -> dict[str, Any]:
        with contextlib.suppress(ValueError):
            item = json.loads(answer)
            if isinstance(item, dict) and {"answer", "metadata"} <= item.keys():
                return item
        item = {"answer": answer}
        try:
            enough = dataset.score_answer(answer, item) == 1.0
        except Exception:
            enough = False
        if not enough:
            raise UserError(
                f"reasoning_gym:{name} cannot score from the answer alone ({answer!r}): let the "
                "record's answer be the JSON text of the whole item, with answer and metadata"
            )
        return item

    def score(completion: str, answer: str) -> float:
        given = extract_answer(completion)
        # Its scorers give partial credit, and some give it for nearly anything: only 1.0 counts.
        item = entry(answer)
        return float(dataset.score_answer(given or completion.strip(), item) == 1.0)

    return score


def main() -> None:
    """Answer requests until standard input ends; the arguments are name, arguments, seconds."""
    # A signal to the whole group is for the parent to act on; a half-scored batch would not be.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    # Whatever a library prints must not be read as a reply.
    os.dup2(2, 1)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    name, arguments, seconds = sys.argv[1], json.loads(sys.argv[2]), float(sys.argv[3])

    def reply(**message: object) -> None:
        replies.write(json.dumps(message) + "\n")
        replies.flush()

    try:
        score = make_scorer(name, arguments, seconds)
    except UserError as error:
        return reply(error=str(error))
    except ImportError as error:
        return reply(error=f"verifier {name} needs a package that is not installed: {error}")
    # Not every system lets the address space be limited.
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, resource.RLIM_INFINITY))
    reply(ready=True)
    for line in sys.stdin:
        _limit_time(seconds)
        completion, answer = json.loads(line)
        try:
            reply(score=score(completion, answer))
        except UserError as error:
            reply(error=str(error))
        except Exception:
            # The libraries raise on some of the texts that a model may write: those are wrong.
            reply(score=0.0)


def _limit_time(seconds: float) -> None:
    """Let the kernel end this process if the next item takes more processor time."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    limit = math.ceil(usage.ru_utime + usage.ru_stime + seconds)
    _, hard = resource.getrlimit(resource.RLIMIT_CPU)
    resource.setrlimit(resource.RLIMIT_CPU, (limit, hard))


if __name__ == "__main__":
    main()
