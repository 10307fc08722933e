"""One rollout, token by token, under every estimator: `posttrain credit`."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from flows.runs import RunRecord
from schemas.artifacts import CREDIT_PREFIX, CREDIT_TABLE_FILE
from schemas.base import UserError

_WIDTH = 200
_COLUMNS = {
    "step_score": "step score",
    "step_reward": "step reward",
    "kl": "kl",
    "token_reward": "reward",
    "value": "value",
    "td_error": "td error",
    "ratio": "ratio",
    "advantage": "used",
}
"""Numbers of the trace and their headings; a star at the ratio says that it was clipped."""


def load(record: RunRecord, store: Path) -> pa.Table:
    """The credit table of a run. Raises `UserError` where it has none."""
    for row in record.stages:
        if row.name == "credit":
            folder = (store / row.artifact).resolve()
            if store.resolve() not in folder.parents:
                raise UserError(f"run {record.run}: {row.artifact} is not in the store {store}")
            return pq.read_table(folder / CREDIT_TABLE_FILE)
    raise UserError(
        f"run {record.run} has no credit table: it is made after PPO, GRPO and RLOO, "
        "while rl.online.trace.num_groups is above 0"
    )


def responses(frame: pa.Table) -> list[tuple[int, int]]:
    """First row and number of rows of every rollout, in the order of the file."""
    keys = list(
        zip(*(frame[name].to_pylist() for name in ("step", "group", "sample")), strict=True)
    )
    starts = [n for n, key in enumerate(keys) if n == 0 or key != keys[n - 1]]
    return [
        (start, end - start) for start, end in zip(starts, [*starts[1:], len(keys)], strict=True)
    ]


def newest(frame: pa.Table) -> int:
    """Number of the first rollout of the last traced step."""
    steps = frame["step"].to_pylist()
    return next(n for n, (start, _) in enumerate(responses(frame)) if steps[start] == steps[-1])


def render(frame: pa.Table, rollout: int) -> str:
    """A rollout as text: what credit saw of each token, what was used, and each estimator's say.

    Raises `UserError` where there is no such rollout.
    """
    found = responses(frame)
    if not 0 <= rollout < len(found):
        raise UserError(
            f"there is no rollout {rollout}: the run kept {len(found)}, from 0 to {len(found) - 1}"
        )
    rows: list[dict[str, Any]] = frame.slice(*found[rollout]).to_pylist()
    named = {name: name.removeprefix(CREDIT_PREFIX).replace("_", " ") for name in rows[0]}
    estimators = {name: named[name] for name in named if name.startswith(CREDIT_PREFIX)}
    shown = {
        name: heading
        for name, heading in (_COLUMNS | estimators).items()
        if any(row[name] is not None for row in rows)
    }
    table = Table(box=None, pad_edge=False)
    for heading in ("#", "token", "step", *shown.values()):
        table.add_column(heading, justify="left" if heading == "token" else "right", no_wrap=True)
    for row in rows:
        numbers = (_number(row, name) for name in shown)
        table.add_row(_text(row["position"]), repr(row["token"])[1:-1], _step(row), *numbers)
    console = Console(file=io.StringIO(), width=_WIDTH, highlight=False, markup=False)
    console.print(_heading(rows[0], rollout, len(found)))
    console.print(table)
    output = console.file
    assert isinstance(output, io.StringIO)
    return "\n".join(line.rstrip() for line in output.getvalue().splitlines()) + "\n"


def _heading(row: dict[str, Any], rollout: int, count: int) -> str:
    parts = [
        f"{name} {value:.3f}"
        for name, value in row.items()
        if value is not None and (name.startswith("reward/") or name in ("score", "total"))
    ]
    cut = ", truncated" if row["truncated"] else ""
    return (
        f"rollout {rollout} of {count}: step {row['step']}, group {row['group']}, "
        f"sample {row['sample']}, credit by {row['credit_mode']}{cut}\n"
        f"{', '.join(parts)}\n"
        f"prompt {row['prompt']!r}\n"
    )


def _step(row: dict[str, Any]) -> str:
    return f"{_text(row['step_index'])}{' end' if row['is_step_end'] else '    '}"


def _number(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if value is None:
        return ""
    return f"{value:.3f}{'*' if name == 'ratio' and row['clipped'] else ''}"


def _text(value: Any) -> str:
    return "" if value is None else str(value)
