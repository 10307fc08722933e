"""The loop of every stage that learns from fixed records: SFT, reward models, DPO."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infra.tracking import Tracker
from schemas.base import UserError
from schemas.training import SupervisedConfig
from stages import termination
from stages.checkpoint import Checkpoints
from stages.optimization import Optimizer
from stages.ordering import records_at

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class MicroLoss:
    """A micro-batch's share of the step's loss, and of the step's metrics.

    Both are already divided by the denominators of the whole optimizer step, so they add up to the
    same numbers however the step was split.
    """

    loss: Tensor
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class TrainingResult:
    """What the loop did."""

    num_steps: int
    resumed_from_step: int | None
    metrics: dict[str, float]
    """Metrics of the last step."""


def num_optimizer_steps(num_records: int, settings: SupervisedConfig) -> int:
    """Optimizer steps in num_epochs passes over the records, at most max_steps."""
    steps = max(math.ceil(num_records * settings.num_epochs / settings.batch_size), 1)
    return min(steps, settings.max_steps or steps)


def train(
    model: PreTrainedModel,
    *,
    num_records: int,
    micro_losses: Callable[[list[int]], Iterable[MicroLoss]],
    settings: SupervisedConfig,
    seed: int,
    run_dir: Path,
    tracker: Tracker,
) -> TrainingResult:
    """Optimise the model on records, with checkpoints, resuming where an earlier attempt stopped.

    micro_losses takes the indices of one optimizer step and yields its micro-batches.
    """
    num_steps = num_optimizer_steps(num_records, settings)
    optimizer = Optimizer.create(model, settings.optimizer, num_steps)
    checkpoints = Checkpoints(run_dir / "checkpoints", {"model": model}, {"model": optimizer})
    torch.manual_seed(seed)
    checkpoint = checkpoints.resume()
    start = checkpoint.step if checkpoint else 0
    if checkpoint:
        logger.info(
            "resuming at step %d of %d (record %d of the data order)",
            start,
            num_steps,
            start * settings.batch_size,
        )
        tracker.rewind(start)
    metrics: dict[str, float] = dict(checkpoint.extra) if checkpoint else {}
    model.train()
    for step in range(start, num_steps):
        batch = records_at(step * settings.batch_size, settings.batch_size, num_records, seed)
        metrics = _step(model, optimizer, micro_losses, batch)
        done = step + 1
        if done % settings.log_every == 0 or done == num_steps:
            tracker.log_metrics(metrics, done)
            logger.info("step %d/%d  loss %.4f", done, num_steps, metrics["loss"])
        stopping = termination.requested()
        if done % settings.checkpoint_every == 0 or done == num_steps or stopping:
            checkpoints.save(done, metrics)
        if stopping and done < num_steps:
            raise termination.Terminated(f"stopped after step {done} of {num_steps}")
    model.eval()
    return TrainingResult(num_steps, checkpoint.step if checkpoint else None, metrics)


def _step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    micro_losses: Callable[[list[int]], Iterable[MicroLoss]],
    indices: list[int],
) -> dict[str, float]:
    totals: dict[str, float] = {"loss": 0.0}
    for micro in micro_losses(indices):
        micro.loss.backward()
        totals["loss"] += micro.loss.item()
        for name, value in micro.metrics.items():
            totals[name] = totals.get(name, 0.0) + value
    return totals | optimizer.step()


def refuse_truncation(
    what: str, num_truncated: int, num_records: int, limit: float, max_length: int
) -> None:
    """Report cut records, and raise UserError before training if there are too many of them."""
    if num_truncated == 0:
        return
    share = num_truncated / num_records
    message = (
        f"{num_truncated} of {num_records} {what} ({share:.1%}) are longer than "
        f"max_length {max_length} and were cut"
    )
    if share > limit:
        raise UserError(
            f"{message}; max_truncated_fraction allows {limit:.1%}: "
            "raise max_length, raise the limit, or shorten the records"
        )
    logger.warning("%s", message)
