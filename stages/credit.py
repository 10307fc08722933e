"""The same rollouts under every estimator: how each would have credited their tokens.

Reads the traces of an online policy and no model: what the estimators need is in them. What a run
cannot tell stays null and is not made up: GAE without a critic, a comparison within groups of one,
step-level credit without steps.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from infra.store import Store
from infra.tracking import Tracker
from schemas.artifacts import (
    CREDIT_PREFIX,
    CREDIT_SUMMARY_FILE,
    CREDIT_TABLE_FILE,
    TRACE_METRICS_KEY,
    TRACES_FILE,
    CreditReport,
)
from schemas.base import UserError
from schemas.requests import CreditRequest
from schemas.rl import RLConfig
from stages.core.advantages import (
    gae,
    group_normalized,
    leave_one_out,
    process_supervised,
    response_level,
)
from stages.core.masks import masked_sum
from stages.provenance import provenance

logger = logging.getLogger(__name__)

ESTIMATORS = ("gae", "response_level", "group_z_score", "leave_one_out", "process_supervised")
"""In the table each is a column with the prefix `credit/`."""


@dataclass(frozen=True)
class EstimatorSettings:
    """The run's own where its algorithm has them, the defaults of the papers elsewhere."""

    gamma: float = 1.0
    gae_lambda: float = 0.95
    bootstrap_truncated: bool = False
    scale: Literal["group", "none"] = "group"
    """Of the z-score. The deviation of a whole batch cannot be had from a handful of rollouts:
    a run with `scale: batch` is re-scored by group."""
    eps: float = 1e-4

    @classmethod
    def of(cls, config: RLConfig) -> EstimatorSettings:
        """Settings of a run."""
        if config.algorithm == "ppo" and config.ppo is not None:
            ppo = config.ppo
            return cls(ppo.gamma, ppo.gae_lambda, ppo.bootstrap_truncated)
        if config.algorithm == "grpo" and config.grpo is not None:
            scale: Literal["group", "none"] = "none" if config.grpo.scale == "none" else "group"
            return cls(scale=scale, eps=config.grpo.eps)
        return cls()


def run(request: CreditRequest, *, run_dir: Path, tracker: Tracker) -> CreditReport:
    """Re-score the traced rollouts of a policy."""
    path = Store(request.runtime.store).path(request.policy) / TRACES_FILE
    if not path.is_file():
        raise UserError(
            "the policy holds no traced rollouts: set rl.online.trace.num_groups above 0"
        )
    settings = EstimatorSettings.of(request.config)
    table = rescore(pq.read_table(path), settings)
    summary = summarize(table) | {"settings": asdict(settings)}
    content = run_dir / "content"
    content.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, content / CREDIT_TABLE_FILE)
    (content / CREDIT_SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n")
    metrics = _metrics(summary)
    tracker.log_metrics(metrics, 0)
    logger.info("re-scored %d rollouts", summary["num_rollouts"])
    return CreditReport(
        **provenance(request, content),
        num_rollouts=summary["num_rollouts"],
        steps=tuple(own["step"] for own in summary["steps"]),
        estimators=tuple(name for name in ESTIMATORS if name in summary["estimators"]),
        metrics=metrics,
    )


def rescore(traces: pa.Table, settings: EstimatorSettings) -> pa.Table:
    """The traces, with a column `credit/NAME` for each estimator; null where it says nothing."""
    parts = []
    steps = traces["step"].to_numpy()
    for step in dict.fromkeys(steps.tolist()):
        part = traces.filter(pa.array(steps == step))
        traced = _Traced(part)
        for name, advantages in estimate(traced, settings).items():
            column = pa.nulls(len(part), pa.float32())
            if advantages is not None:
                column = pa.array(traced.flatten(advantages), pa.float32())
            part = part.append_column(f"{CREDIT_PREFIX}{name}", column)
        parts.append(part)
    return pa.concat_tables(parts).replace_schema_metadata(traces.schema.metadata)


def estimate(traced: _Traced, settings: EstimatorSettings) -> dict[str, Tensor | None]:
    """Advantages [_N, _T] of one step's rollouts under each estimator, before any whitening."""
    mask, groups = traced.padded("trained") > 0, traced.group_ids
    rewards = traced.padded("token_reward")
    penalty = float(traced.table["kl_coef"][0].as_py()) * masked_sum(
        traced.padded("kl"), mask, dim=1
    )
    found: dict[str, Tensor | None] = dict.fromkeys(ESTIMATORS)
    if traced.has("value"):
        cut = traced.first("truncated") > 0
        bootstrap = torch.where(cut & settings.bootstrap_truncated, traced.first("value_after"), 0)
        found["gae"], _ = gae(
            rewards,
            traced.padded("value"),
            mask,
            settings.gamma,
            settings.gae_lambda,
            bootstrap,
        )
    _, counts = torch.unique(groups, return_counts=True)
    if int(counts.min()) == 1:
        return found
    scores = traced.first("score") - penalty
    z_scores, _ = group_normalized(scores, groups, settings.scale, settings.eps)
    by_response = {
        "response_level": response_level(rewards.sum(1), groups),
        "group_z_score": z_scores,
        "leave_one_out": leave_one_out(traced.first("total") - penalty, groups),
    }
    found |= {name: own[:, None] * mask for name, own in by_response.items()}
    steps = traced.steps()
    if steps is not None:
        found["process_supervised"] = mask * process_supervised(
            *steps, groups, mask.shape[1], settings.eps
        )
    return found


def summarize(table: pa.Table) -> dict[str, Any]:
    """Numbers of the estimators over all trained tokens, and how steps were counted over time.

    For each estimator, and for `training` (the advantages that were used): the mean of |A|, and
    the share of its variance that lies within responses: 0 where every token of a response is
    credited alike. An estimator that says nothing anywhere is left out.
    """
    kept = table.filter(table["trained"])
    response = _responses(kept)
    columns = {"training": "advantage"} | {name: f"{CREDIT_PREFIX}{name}" for name in ESTIMATORS}
    values = {
        name: torch.tensor(kept[column].to_numpy(), dtype=torch.float64)
        for name, column in columns.items()
        if kept[column].null_count < len(kept)
    }
    steps = _step_counts(table)
    counted = [own["num_steps"] for own in steps if own["num_steps"] is not None]
    return {
        "num_rollouts": int(_responses(table).max()) + 1,
        "num_tokens": len(kept),
        "estimators": {
            name: {
                "mean_abs": own[~own.isnan()].abs().mean().item(),
                "within_response_share": _within_share(own, response),
            }
            for name, own in values.items()
        },
        "correlation": {
            name: {other: _correlation(own, values[other]) for other in values}
            for name, own in values.items()
        },
        "steps": steps,
        "step_count_drift": counted[-1] - counted[0] if counted else None,
    }


class _Traced:
    """The rollouts of one step as tensors: _N rollouts, _T tokens."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        self.rollout = _responses(table)
        # An empty completion is one row without a position; its slot is never trained on.
        self.position = torch.tensor(table["position"].fill_null(0).to_numpy()).long()
        is_first = torch.ones(len(table), dtype=torch.bool)
        is_first[1:] = self.rollout[1:] != self.rollout[:-1]
        self._first_rows = is_first.nonzero()[:, 0]
        self._shape = (len(self._first_rows), int(self.position.max()) + 1)

    @property
    def group_ids(self) -> Tensor:
        """long [_N]."""
        return torch.tensor(self.table["group"].to_numpy()).long()[self._first_rows]

    def has(self, name: str) -> bool:
        """Whether the run had such a column."""
        return bool(self.table[name].null_count < len(self.table))

    def padded(self, name: str) -> Tensor:
        """A column by token [_N, _T], 0 as filling and where it is null."""
        return torch.zeros(self._shape).index_put((self.rollout, self.position), self._column(name))

    def first(self, name: str) -> Tensor:
        """A column by response [_N]."""
        return self._column(name)[self._first_rows]

    def flatten(self, values: Tensor) -> Any:
        """One value for each row of the table, from [_N, _T]."""
        return values[self.rollout, self.position].numpy()

    def steps(self) -> tuple[list[Tensor], list[Tensor]] | None:
        """Rewards of the steps, or their scores where steps are not rewarded; and their ends."""
        name = next((n for n in ("step_reward", "step_score") if self.has(n)), None)
        if name is None:
            return None
        ends = torch.tensor(self.table["is_step_end"].to_numpy())
        column = self._column(name)
        chosen = [(self.rollout == n) & ends for n in range(self._shape[0])]
        return [column[own] for own in chosen], [self.position[own] for own in chosen]

    def _column(self, name: str) -> Tensor:
        column = self.table[name].cast(pa.float32()).fill_null(0.0)
        return torch.tensor(column.to_numpy())


def _responses(table: pa.Table) -> Tensor:
    """Number of the response that each row belongs to, long, in order of appearance."""
    keys = torch.stack([torch.tensor(table[n].to_numpy()) for n in ("step", "group", "sample")], 1)
    changes = torch.zeros(len(table), dtype=torch.long)
    changes[1:] = (keys[1:] != keys[:-1]).any(1).long()
    return changes.cumsum(0)


def _within_share(values: Tensor, response: Tensor) -> float | None:
    known = ~values.isnan()
    values, response = values[known], response[known]
    total = (values - values.mean()).square().sum()
    if total == 0:
        return None
    size = int(response.max()) + 1
    sums = values.new_zeros(size).index_add_(0, response, values)
    counts = values.new_zeros(size).index_add_(0, response, torch.ones_like(values))
    within = (values - (sums / counts.clamp(min=1))[response]).square().sum()
    return float(within / total)


def _correlation(left: Tensor, right: Tensor) -> float | None:
    """Pearson's, over tokens that both credit; None where one of them does not vary."""
    known = ~(left.isnan() | right.isnan())
    left, right = left[known], right[known]
    if left.numel() < 2 or bool((left == left[0]).all()) or bool((right == right[0]).all()):
        return None
    return float(torch.corrcoef(torch.stack([left, right]))[0, 1])


def _step_counts(table: pa.Table) -> list[dict[str, Any]]:
    """For each traced step: steps a response, over the whole batch and over the traced rollouts.

    A reward that pays for steps may be earned by taking more of them.
    """
    logged = json.loads((table.schema.metadata or {}).get(TRACE_METRICS_KEY.encode(), b"{}"))
    steps = table["step"].to_numpy()
    found = []
    for step in dict.fromkeys(steps.tolist()):
        part = table.filter(pa.array(steps == step))
        metrics = logged.get(str(step), {})
        ends = torch.tensor(part["is_step_end"].to_numpy()).sum().item()
        has_steps = part["step_index"].null_count < len(part)
        found.append(
            {
                "step": step,
                "num_steps": metrics.get("completions/num_steps"),
                "num_steps_traced": ends / (int(_responses(part).max()) + 1) if has_steps else None,
                "reward": metrics.get("reward/mean"),
                "length": metrics.get("completions/length"),
            }
        )
    return found


def _metrics(summary: dict[str, Any]) -> dict[str, float]:
    found = {
        f"{name}/{key}": value
        for name, own in summary["estimators"].items()
        for key, value in own.items()
    }
    found["num_rollouts"] = float(summary["num_rollouts"])
    found["step_count_drift"] = summary["step_count_drift"]
    return {name: value for name, value in found.items() if value is not None}
