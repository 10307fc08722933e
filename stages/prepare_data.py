"""Read one split, check every record, and keep it apart from the splits it must not touch."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import DatasetArtifact
from schemas.base import UserError
from schemas.fingerprint import canonical_json, digest
from schemas.records import digest_position, dump_record, prompt_digest, record_prompt
from schemas.requests import PrepareDataRequest
from stages import heartbeat
from stages.data.layouts import other_fields, validate_record
from stages.data.raw import RawRecord
from stages.data.readers import read_raw
from stages.data.records import RECORDS_FILE, iter_records
from stages.provenance import provenance

REPORT_FILE = "report.json"

_HELD_OUT = ("evaluation", "preferences_held_out", "step_labels_held_out")


def run(request: PrepareDataRequest, *, run_dir: Path, tracker: Tracker) -> DatasetArtifact:
    """Write the validated records of a split, or raise `UserError`."""
    content = run_dir / "content"
    content.mkdir(parents=True, exist_ok=True)
    forbidden = [_Forbidden(artifact, _prompts(request, artifact)) for artifact in _others(request)]
    counts = _Counts()
    with (content / RECORDS_FILE).open("w", encoding="utf-8", newline="\n") as file:
        for record in _kept(request, counts, forbidden):
            file.write(canonical_json(record) + "\n")
    for other in forbidden:
        other.check(request, num_prompts=len(counts.prompts))
    _check_not_empty(request, counts)
    report = counts.report()
    text = json.dumps(report, indent=2, sort_keys=True)
    (content / REPORT_FILE).write_text(text + "\n", encoding="utf-8")
    metrics = {f"num_{name}": float(report[name]) for name in ("read", "kept", "duplicates")}
    tracker.log_metrics(metrics, step=0)
    return DatasetArtifact(
        **provenance(request, content),
        metrics=metrics,
        split=request.split,
        layout=request.layout,
        num_records=counts.kept,
        num_prompts=len(counts.prompts),
    )


@dataclass
class _Counts:
    """What happened to the records."""

    read: int = 0
    kept: int = 0
    duplicates: int = 0
    outside_digest_range: int = 0
    limit_reached: bool = False
    ignored_fields: set[str] = field(default_factory=set)
    prompts: set[str] = field(default_factory=set)

    def report(self) -> dict[str, Any]:
        """The counts as a JSON object."""
        return {
            "read": self.read,
            "kept": self.kept,
            "duplicates": self.duplicates,
            "outside_digest_range": self.outside_digest_range,
            "limit_reached": self.limit_reached,
            "ignored_fields": sorted(self.ignored_fields),
            "prompts": len(self.prompts),
        }


@dataclass
class _Forbidden:
    """Prompts of another split, and those of them that turned up in this one."""

    artifact: DatasetArtifact
    prompts: frozenset[str]
    found: set[str] = field(default_factory=set)
    example: str = ""

    def meet(self, raw: RawRecord, prompt: Any, prompt_sha256: str) -> None:
        """Note a prompt if it is one of the other split's."""
        if prompt_sha256 not in self.prompts:
            return
        if not self.found:
            self.example = f"{raw.place}: {_shorten(prompt)}"
        self.found.add(prompt_sha256)

    def check(self, request: PrepareDataRequest, num_prompts: int) -> None:
        """Raise `UserError` if any prompt turned up."""
        if not self.found:
            return
        raise UserError(
            f"{len(self.found)} of the {num_prompts} prompts of data.{request.split} are also "
            f"among the {len(self.prompts)} prompts of data.{self.artifact.split}, for example "
            f"{self.example}; a model must not be judged on prompts that it was trained on: give "
            "the two sources disjoint digest_range, such as [0.0, 0.9] and [0.9, 1.0], "
            "or different files"
        )


def _others(request: PrepareDataRequest) -> tuple[DatasetArtifact, ...]:
    return (*([request.evaluation] if request.evaluation else []), *request.training)


def _prompts(request: PrepareDataRequest, artifact: DatasetArtifact) -> frozenset[str]:
    folder = Store(request.runtime.store).path(artifact)
    return frozenset(prompt_digest(record_prompt(record)) for record in iter_records(folder))


def _kept(
    request: PrepareDataRequest, counts: _Counts, forbidden: list[_Forbidden]
) -> Iterator[dict[str, Any]]:
    """Yield the records that belong to the split, each with its id."""
    low, high = request.source.digest_range
    seen: set[str] = set()
    numbers: Counter[str] = Counter()
    for raw in read_raw(request.source, Path(request.runtime.data_root)):
        counts.read += 1
        heartbeat.beat(f"preparing data.{request.split}")
        record = dump_record(validate_record(raw, request.layout, request.split))
        counts.ignored_fields |= other_fields(raw, request.layout)
        prompt = record_prompt(record)
        prompt_sha256 = prompt_digest(prompt)
        if not low <= digest_position(prompt_sha256) < high:
            counts.outside_digest_range += 1
            continue
        identity = digest({name: value for name, value in record.items() if name != "metadata"})
        if identity in seen:
            counts.duplicates += 1
            # Training data keep theirs: how often a record stands there is part of the data. A
            # held-out record must not be counted twice.
            if request.split in _HELD_OUT:
                continue
        seen.add(identity)
        for other in forbidden:
            other.meet(raw, prompt, prompt_sha256)
        counts.prompts.add(prompt_sha256)
        counts.kept += 1
        yield {"id": _id(prompt_sha256, numbers), **record}
        if counts.kept == request.source.limit:
            counts.limit_reached = True
            return


def _id(prompt_sha256: str, numbers: Counter[str]) -> str:
    """The head of the prompt's digest, and a running number from the second record on."""
    head = prompt_sha256[:16]
    numbers[head] += 1
    return head if numbers[head] == 1 else f"{head}-{numbers[head]}"


def _check_not_empty(request: PrepareDataRequest, counts: _Counts) -> None:
    if counts.kept:
        return
    name = f"data.{request.split}"
    if not counts.read:
        raise UserError(
            f"{name}: the source holds no records; check it, and its transform if there is one"
        )
    raise UserError(
        f"{name}: none of the {counts.read} records has a prompt in digest_range "
        f"{list(request.source.digest_range)}; widen it"
    )


def _shorten(prompt: Any, length: int = 80) -> str:
    text = prompt if isinstance(prompt, str) else prompt[-1]["content"]
    return repr(text if len(text) <= length else text[: length - 1] + "…")
