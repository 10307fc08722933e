"""The records of a finished split."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from infra.store import Store
from schemas.artifacts import DatasetArtifact
from stages import heartbeat

RECORDS_FILE = "records.jsonl"


def iter_records(folder: Path) -> Iterator[dict[str, Any]]:
    """The records in the content folder of a `DatasetArtifact`, in order, each with its `id`."""
    with (folder / RECORDS_FILE).open("rb") as lines:
        for line in lines:
            heartbeat.beat("reading records")
            record: dict[str, Any] = json.loads(line)
            yield record


def read_records(folder: Path) -> list[dict[str, Any]]:
    """All the records in the content folder of a `DatasetArtifact`."""
    return list(iter_records(folder))


def read_datasets(store: Store, datasets: Iterable[DatasetArtifact]) -> list[dict[str, Any]]:
    """The records of several data sets, one after the other."""
    return [record for dataset in datasets for record in iter_records(store.path(dataset))]
