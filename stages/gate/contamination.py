"""Evaluation prompts that turn up in what the model was trained on."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from schemas.artifacts import GateCheck
from schemas.evaluation import ContaminationConfig
from schemas.records import prompt_digest, record_prompt
from stages.gate.checks import ceiling

_TEXT_FIELDS = ("messages", "prompt", "completion", "chosen", "rejected", "completions")
_WORD = re.compile(r"\w+")
_TEMPLATE_PROMPTS = 10
"""Words in a row that more evaluation prompts than this share (or than a tenth of a smaller set,
but two at least) are template text."""

Record = Mapping[str, Any]


@dataclass
class Overlap:
    """What was found, in distinct evaluation prompts."""

    num_prompts: int
    """Distinct evaluation prompts."""
    shared: dict[str, set[str]] = field(default_factory=dict)
    """Digests of the prompts that a training split has too, by split."""
    near: dict[str, set[str]] = field(default_factory=dict)
    """Digests of those that share words in a row with a record of a split, by split."""
    num_short: int = 0
    """Prompts with too few words to be looked for."""


def find_overlap(
    evaluation: Iterable[Record],
    training: Iterable[tuple[str, Iterable[Record]]],
    ngram: int | None,
) -> Overlap:
    """Look for evaluation prompts in training splits.

    training: name of the split, and its records. ngram: words in a row that make a near duplicate;
    None looks for exact prompts only, which prepared data cannot have and sampled data should not.
    """
    prompts = {prompt_digest(prompt): prompt for prompt in map(record_prompt, evaluation)}
    found = Overlap(len(prompts))
    index: dict[str, set[str]] = {}
    if ngram is not None:
        index, found.num_short = _index(prompts, ngram)
    for split, records in training:
        shared = found.shared.setdefault(split, set())
        near = found.near.setdefault(split, set())
        for record in records:
            digest = prompt_digest(record_prompt(record))
            if digest in prompts:
                shared.add(digest)
            if index and ngram is not None:
                for text in _texts(record):
                    for words in _ngrams(text, ngram):
                        near |= index.get(words, set())
    return found


def contamination_checks(found: Overlap, config: ContaminationConfig) -> Iterator[GateCheck]:
    """Hold what was found against its limits."""
    shared = set[str]().union(*found.shared.values())
    yield ceiling(
        "contamination.max_shared_prompts",
        float(len(shared)),
        float(config.max_shared_prompts),
        f"{len(shared)} of {found.num_prompts} evaluation prompts are training prompts",
        _numbers(found, found.shared),
    )
    if config.max_near_duplicates is None:
        return
    near = set[str]().union(*found.near.values()) - shared
    rule, limit = "contamination.max_near_duplicates", float(config.max_near_duplicates)
    numbers = {
        **_numbers(found, {split: own - shared for split, own in found.near.items()}),
        "num_short": float(found.num_short),
        "ngram": float(config.ngram),
    }
    if found.num_short == found.num_prompts:
        reason = f"no evaluation prompt has {config.ngram} words: there is nothing to look for"
        yield GateCheck(
            rule=rule, passed=True, observed=None, required=limit, reason=reason, numbers=numbers
        )
        return
    head = (
        f"{len(near)} of {found.num_prompts} evaluation prompts share {config.ngram} words in a "
        f"row with a training record ({found.num_short} are too short to be looked for)"
    )
    yield ceiling(rule, float(len(near)), limit, head, numbers)


def _numbers(found: Overlap, by_split: Mapping[str, set[str]]) -> dict[str, float]:
    counts = {f"num_in.{split}": float(len(own)) for split, own in sorted(by_split.items())}
    return {"num_prompts": float(found.num_prompts), **counts}


def _index(prompts: Mapping[str, Any], ngram: int) -> tuple[dict[str, set[str]], int]:
    """Which prompts have which words in a row, without template text; and how many are short."""
    index: dict[str, set[str]] = defaultdict(set)
    num_short = 0
    for digest, prompt in prompts.items():
        own = [words for text in _strings(prompt) for words in _ngrams(text, ngram)]
        for words in own:
            index[words].add(digest)
        num_short += not own
    limit = max(2, min(_TEMPLATE_PROMPTS, len(prompts) // 10))
    return {words: own for words, own in index.items() if len(own) <= limit}, num_short


def _texts(record: Record) -> Iterator[str]:
    for name in _TEXT_FIELDS:
        if name in record:
            yield from _strings(record[name])


def _strings(value: Any) -> Iterator[str]:
    """Every text of a prompt or a completion: itself, steps, or the contents of messages."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield str(value["content"])
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


def _ngrams(text: str, ngram: int) -> Iterator[str]:
    """Words in a row, in lower case and without punctuation."""
    words = _WORD.findall(unicodedata.normalize("NFKC", text).lower())
    for start in range(len(words) - ngram + 1):
        yield " ".join(words[start : start + ngram])
