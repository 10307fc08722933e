"""A fixed handful of rollouts, kept with everything that credit saw, one row a token.

Every few steps the first groups of the batch are written to a Parquet file of their own; at the
end of the stage the files become one, a row group a step. The same weights, whether traces are
kept or not.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from infra.files import sync
from schemas.artifacts import TRACE_METRICS_KEY
from schemas.rl import OnlineConfig
from stages.adapters import adapters_disabled
from stages.core.kl import kl_k1
from stages.forward import all_completion_logprobs
from stages.rl.algorithms import OnlineAlgorithm
from stages.rl.experience import Credit, Experience, TokenLoss
from stages.rl.update import train_batch

_INT, _FLOAT, _BOOL, _TEXT = pa.int32(), pa.float32(), pa.bool_(), pa.string()


class Traces:
    """Writes the traces of one stage to `step-NNNNNNNN.parquet` in a folder."""

    def __init__(
        self, folder: Path, config: OnlineConfig, decode: Callable[[Sequence[int]], str]
    ) -> None:
        self._folder = folder
        self._config = config
        self._decode = decode

    def due(self, step: int) -> bool:
        """Whether rollout batch `step` (from 0) is kept: each `every`-th one, and the last."""
        trace = self._config.trace
        is_last = step == self._config.num_steps - 1
        return trace.num_groups > 0 and (step % trace.every == 0 or is_last)

    def write(
        self,
        step: int,
        experience: Experience,
        credit: Credit,
        after: TokenLoss,
        ref_logprobs: Tensor,
        metrics: Mapping[str, float],
    ) -> None:
        """Keep the rollouts of `traced_rows`.

        Of them alone: `after`, their loss after the update, and `ref_logprobs` [_R, _T].
        """
        rows = self.traced_rows(experience)
        columns = _columns(step, experience, credit, after, ref_logprobs, rows, self._decode)
        table = pa.table(columns).replace_schema_metadata(
            {TRACE_METRICS_KEY: json.dumps({str(step): dict(metrics)}, sort_keys=True)}
        )
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / f"step-{step:08d}.parquet"
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        pq.write_table(table, temporary)
        sync(temporary)
        temporary.replace(path)
        sync(self._folder)

    def traced_rows(self, experience: Experience) -> list[int]:
        """Rows of the first `num_groups` groups: whole groups, so that they can be re-scored."""
        limit = self._config.trace.num_groups
        return [row for row, r in enumerate(experience.rollouts) if r.prompt_index < limit]

    def rewind(self, step: int) -> None:
        """Forget every step after `step`; called when the stage goes on from a checkpoint."""
        for path in self._folder.glob("step-*.parquet"):
            if int(path.stem.removeprefix("step-")) > step:
                path.unlink()


def join_traces(folder: Path, target: Path) -> bool:
    """One file of all the steps, a row group each; False where nothing was kept."""
    tables = [pq.read_table(path) for path in sorted(folder.glob("step-*.parquet"))]
    if not tables:
        return False
    metrics: dict[str, Any] = {}
    for table in tables:
        metrics |= json.loads(table.schema.metadata[TRACE_METRICS_KEY.encode()])
    schema = tables[0].schema.with_metadata({TRACE_METRICS_KEY: json.dumps(metrics)})
    target.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(target, schema) as writer:
        for table in tables:
            writer.write_table(table.replace_schema_metadata(schema.metadata))
    return True


def after_update(
    policy: PreTrainedModel,
    experience: Experience,
    credit: Credit,
    algorithm: OnlineAlgorithm,
    config: OnlineConfig,
    rows: Sequence[int],
) -> TokenLoss:
    """Loss of some rollouts under the updated policy: their ratio, and what is clipped now."""
    training = policy.training
    policy.eval()
    logprobs = all_completion_logprobs(
        policy,
        experience.sequences.select(rows),
        experience.width,
        config.micro_batch_tokens,
        config.sampling.temperature,
    )
    policy.train(training)
    return algorithm.loss(logprobs, train_batch(experience, credit).select(rows))


def reference_logprobs(
    reference: PreTrainedModel, experience: Experience, config: OnlineConfig, rows: Sequence[int]
) -> Tensor:
    """Of some rollouts [_R, _T]; looked up here where the algorithm has no use for them."""
    if experience.ref_logprobs is not None:
        return experience.ref_logprobs[list(rows)]
    with adapters_disabled(reference):
        return all_completion_logprobs(
            reference,
            experience.sequences.select(rows),
            experience.width,
            config.micro_batch_tokens,
            config.sampling.temperature,
        )


def _columns(
    step: int,
    experience: Experience,
    credit: Credit,
    after: TokenLoss,
    ref_logprobs: Tensor,
    rows: Sequence[int],
    decode: Callable[[Sequence[int]], str],
) -> dict[str, pa.Array]:
    rollouts = [experience.rollouts[row] for row in rows]
    # An empty completion keeps one row, without a position: its group must stay whole.
    counts = [max(len(rollout.completion_ids), 1) for rollout in rollouts]
    slots = torch.arange(experience.width) < torch.tensor(counts)[:, None]
    rewards = experience.rewards

    def token(values: Tensor | None, kind: pa.DataType = _FLOAT) -> pa.Array:
        """One value for each token, from [_N, _T]."""
        if values is None:
            return pa.nulls(sum(counts), kind)
        return pa.array(values[list(rows)].cpu()[slots].tolist(), kind)

    def traced(values: Tensor | None, kind: pa.DataType = _FLOAT) -> pa.Array:
        """The same from the traced rows alone."""
        assert values is not None
        return pa.array(values.cpu()[slots].tolist(), kind)

    def response(values: Sequence[Any], kind: pa.DataType) -> pa.Array:
        """One value for each response, on all of its rows."""
        repeated = [value for value, n in zip(values, counts, strict=True) for _ in range(n)]
        return pa.array(repeated, kind)

    def rewarded(values: Tensor | None) -> pa.Array:
        return response([None if values is None else values[row].item() for row in rows], _FLOAT)

    ids: list[int | None] = []
    positions: list[int | None] = []
    for rollout in rollouts:
        ids += rollout.completion_ids or [None]
        positions += range(len(rollout.completion_ids)) if rollout.completion_ids else [None]
    groups = [rollout.prompt_index for rollout in rollouts]
    steps = [_steps(experience, row, count) for row, count in zip(rows, counts, strict=True)]
    return {
        "step": response([step] * len(rows), _INT),
        "policy_version": response([r.policy_version for r in rollouts], _INT),
        "group": response(groups, _INT),
        "sample": response([groups[:n].count(g) for n, g in enumerate(groups)], _INT),
        "prompt": response([decode(r.prompt_ids) for r in rollouts], _TEXT),
        "truncated": response([r.truncated for r in rollouts], _BOOL),
        "credit_mode": response([credit.mode] * len(rows), _TEXT),
        "position": pa.array(positions, _INT),
        "token_id": pa.array(ids, _INT),
        "token": pa.array([decode([i]) if i is not None else "" for i in ids], _TEXT),
        "trained": token(experience.completion_mask, _BOOL),
        **{f"reward/{name}": rewarded(own) for name, own in rewards.components.items()},
        "score": rewarded(rewards.scores),
        "total": rewarded(rewards.total),
        "step_index": _flat([own[0] for own in steps], _INT),
        "is_step_end": _flat([own[1] for own in steps], _BOOL),
        "step_score": _flat([own[2] for own in steps], _FLOAT),
        "step_reward": _flat([own[3] for own in steps], _FLOAT),
        "rollout_logprob": token(experience.rollout_logprobs),
        "old_logprob": token(experience.old_logprobs),
        "ref_logprob": traced(ref_logprobs),
        "kl": traced(kl_k1(experience.old_logprobs[list(rows)], ref_logprobs)),
        "kl_coef": response([credit.kl_coef] * len(rows), pa.float64()),
        "token_reward": token(experience.token_rewards(credit.kl_coef)),
        "value": token(experience.values),
        "value_after": rewarded(experience.values_after),
        "td_error": token(credit.td_errors),
        "advantage_unwhitened": token(credit.unwhitened),
        "advantage": token(credit.advantages),
        "return": token(credit.returns),
        "ratio": traced(after.ratio),
        "clipped": traced(after.clipped, _BOOL),
    }


def _steps(
    experience: Experience, row: int, count: int
) -> tuple[list[int | None], list[bool], list[float | None], list[float | None]]:
    """Step index, whether a step ends here, its score and its reward, for each row of a rollout."""
    rewards = experience.rewards
    index: list[int | None] = [None] * count
    is_end = [False] * count
    found: tuple[list[float | None], list[float | None]] = ([None] * count, [None] * count)
    if rewards.step_ends is None:
        return index, is_end, *found
    start = 0
    for number, end in enumerate(rewards.step_ends[row].tolist()):
        index[start : end + 1] = [number] * (end + 1 - start)
        start, is_end[end] = end + 1, True
        for column, own in zip(found, (rewards.step_scores, rewards.step_rewards), strict=True):
            if own is not None:
                column[end] = own[row][number].item()
    return index, is_end, *found


def _flat(values: Sequence[Sequence[Any]], kind: pa.DataType) -> pa.Array:
    return pa.array([value for own in values for value in own], kind)
