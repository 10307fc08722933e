"""Metrics of each evaluation record, as the gate compares them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from schemas.artifacts import EVALUATION_RECORDS_FILE
from stages.core.metrics import pass_at_k

ModelName = Literal["candidate", "baseline", "incumbent"]

_COLUMNS = {"truncated_fraction": "truncated"}
"""Column of a metric, where it has another name."""


class RecordMetrics:
    """The samples of candidate, baseline and incumbent on the same records."""

    def __init__(self, folder: Path) -> None:
        """folder: the content of the evaluation's artifact."""
        import pyarrow.parquet as pq

        table = pq.read_table(folder / EVALUATION_RECORDS_FILE)
        self._columns = {name for name in table.column_names if name not in ("model", "record")}
        names = ["model", "record", *sorted(self._columns - {"completion"})]
        self._samples: dict[str, dict[str, list[dict[str, float]]]] = defaultdict(
            lambda: defaultdict(list)
        )
        for row in table.select(names).to_pylist():
            self._samples[row.pop("model")][row.pop("record")].append(row)

    def means(self, model: ModelName, metric: str) -> dict[str, float]:
        """A metric of each record by the record's id; the mean over samples, or pass@k."""
        if metric.startswith("pass@"):
            k = int(metric.removeprefix("pass@"))
            return {
                record: pass_at_k(len(own), sum(bool(one["correct"]) for one in own), k)
                for record, own in self._samples[model].items()
            }
        column = _COLUMNS.get(metric, metric)
        return {
            record: sum(float(one[column]) for one in own) / len(own)
            for record, own in self._samples[model].items()
        }

    def differences(
        self, metric: str, against: ModelName, records: Collection[str] | None = None
    ) -> Tensor:
        """Candidate less another model for each record, [_N] by record id.

        records: ids of those that count; all by default.
        """
        candidate, other = self.means("candidate", metric), self.means(against, metric)
        assert candidate.keys() == other.keys()
        chosen = candidate.keys() if records is None else set(records)
        return torch.tensor(
            [candidate[record] - other[record] for record in sorted(chosen)], dtype=torch.float64
        )

    def samples(self, model: ModelName, metric: str) -> Tensor:
        """A column of every sample, [_N], in the same order for every column."""
        column = "correct" if metric == "pass@1" else _COLUMNS.get(metric, metric)
        rows = self._samples[model]
        return torch.tensor(
            [float(one[column]) for record in sorted(rows) for one in rows[record]],
            dtype=torch.float64,
        )
