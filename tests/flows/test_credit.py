"""Where `posttrain credit` finds its table; the text itself is tested beside the stage."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from flows.credit import load, newest, responses
from flows.runs import RunRecord, StageRow
from schemas.artifacts import CREDIT_TABLE_FILE
from schemas.base import UserError

TABLE = pa.table(
    {
        "step": [1, 1, 1, 4, 4, 4],
        "group": [0, 0, 0, 0, 0, 1],
        "sample": [0, 0, 1, 0, 0, 0],
    }
)


def record(store: Path, *rows: StageRow) -> RunRecord:
    return RunRecord(
        run="r",
        recipe="q",
        seed=0,
        store=str(store),
        config_digest="c",
        started=datetime.now(UTC),
        stages=rows,
    )


def test_the_table_of_a_run(tmp_path: Path) -> None:
    row = StageRow(
        name="credit",
        status="reused",
        seconds=0.0,
        peak_memory_bytes=None,
        fingerprint="f",
        artifact="artifacts/f/content",
    )
    folder = tmp_path / row.artifact
    folder.mkdir(parents=True)
    pq.write_table(TABLE, folder / CREDIT_TABLE_FILE)
    assert load(record(tmp_path, row), tmp_path).equals(TABLE)


def test_a_run_without_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"run r has no credit table: .*num_groups is above 0"):
        load(record(tmp_path), tmp_path)


def test_rollouts_are_counted_in_the_order_of_the_file() -> None:
    assert responses(TABLE) == [(0, 2), (2, 1), (3, 2), (5, 1)]
    assert newest(TABLE) == 2
