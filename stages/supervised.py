"""The loop of every stage that learns from fixed records: SFT, reward models, DPO."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from infra.tracking import Tracker
from schemas.base import UserError
from schemas.training import SupervisedConfig
from stages import heartbeat, termination
from stages.checkpoint import Checkpoint, Checkpoints
from stages.measured_memory import fitted_budget
from stages.memory import TokenBudget
from stages.optimization import Optimizer
from stages.ordering import records_at
from stages.precision import weights_held
from stages.resumption import data_cursor, go_back, refuse_ruined, regular_step, say_resumed
from stages.stability import Stability, Unstable

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
    """Metrics of the last step that was taken, and the counts of those that were not."""
    interventions: list[dict[str, Any]]
    """Steps that were left out or taken back, and why."""

    @property
    def counts(self) -> dict[str, float]:
        """How many steps were left out or taken back, for the artifact's metrics."""
        return {k: v for k, v in self.metrics.items() if k.startswith("stability/")}


def num_optimizer_steps(num_records: int, settings: SupervisedConfig) -> int:
    """Optimizer steps in num_epochs passes over the records, at most max_steps."""
    steps = max(math.ceil(num_records * settings.num_epochs / settings.batch_size), 1)
    return min(steps, settings.max_steps or steps)


@dataclass
class _Progress:
    """What a checkpoint keeps beside weights, moments and random numbers."""

    stability: Stability
    budget: TokenBudget
    step: int = 0
    """Steps that are done."""
    position: int = 0
    """Data cursor: records that were used or left out, counted over epochs."""
    metrics: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """JSON state."""
        return {
            "position": self.position,
            "metrics": self.metrics,
            "stability": self.stability.state_dict(),
            "micro_batch_tokens": self.budget.tokens,
        }

    def resume(self, checkpoint: Checkpoint) -> None:
        """Stand where an earlier attempt stood."""
        self.step = checkpoint.step
        self.position = checkpoint.extra["position"]
        self.metrics = dict(checkpoint.extra["metrics"])
        self.stability.load_state_dict(checkpoint.extra["stability"])
        self.budget.tokens = checkpoint.extra["micro_batch_tokens"]

    def go_back(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint stands; the data cursor and the decisions stay."""
        self.step = checkpoint.step
        self.metrics = dict(checkpoint.extra["metrics"])
        self.stability.go_back(checkpoint.extra["stability"])


def train(
    model: PreTrainedModel,
    *,
    section: str,
    record_ids: Sequence[str],
    micro_losses: Callable[[list[int], int], Iterable[MicroLoss]],
    settings: SupervisedConfig,
    seed: int,
    run_dir: Path,
    tracker: Tracker,
) -> TrainingResult:
    """Optimise the model on records, with checkpoints, resuming where an earlier attempt stopped.

    section: place of the settings in the recipe, for messages. micro_losses takes the indices of
    one optimizer step, and how many tokens may go through at once, and yields its micro-batches.
    Raises UserError where there is no record, and where `settings.stability` says so.
    """
    num_records = len(record_ids)
    if num_records == 0:
        raise UserError(f"{section} has no record to learn from and would run zero steps: add data")
    num_steps = num_optimizer_steps(num_records, settings)
    optimizer = Optimizer.create(model, settings.optimizer, num_steps)
    checkpoints = Checkpoints(run_dir / "checkpoints", {"model": model}, {"model": optimizer})
    stability = Stability(settings.stability, f"{section}.stability")
    budget = fitted_budget(settings.micro_batch_tokens, section, [model], run_dir)
    progress = _Progress(stability, budget)
    torch.manual_seed(seed)
    checkpoint = checkpoints.resume()
    if checkpoint is not None:
        progress.resume(checkpoint)
        tracker.resume(progress.step)
        say_resumed(checkpoint, num_steps, data_cursor(progress.position, num_records))
    else:
        tracker.rewind(0)
        if settings.stability.rewinds:
            checkpoints.save(0, progress.state_dict())
    model.train()
    while progress.step < num_steps:
        indices = records_at(progress.position, settings.batch_size, num_records, seed)
        done = progress.step + 1
        regular = done == num_steps or done == regular_step(done, settings.checkpoint_every)
        try:
            doing = f"training on step {done} of {num_steps} of {section}"
            batch = partial(micro_losses, indices)
            metrics = _step(model, optimizer, batch, budget, stability, doing)
            if regular:
                refuse_ruined(checkpoints)
            metrics |= stability.metrics()
            progress.metrics = metrics
        except Unstable as problem:
            optimizer.clear()
            records = [record_ids[index] for index in indices]
            if stability.intervene(problem, step=done, records=records) == "rewind":
                progress.position += settings.batch_size
                target = regular_step(progress.step, settings.checkpoint_every)
                progress.go_back(go_back(checkpoints, target))
                stability.rewound(done, progress.step, problem, records)
                tracker.rewind(progress.step)
                checkpoints.save(progress.step, progress.state_dict())
                continue
            optimizer.skip()
            metrics = stability.metrics()
            progress.metrics |= metrics
        progress.step = done
        progress.position += settings.batch_size
        if done % settings.log_every == 0 or done == num_steps:
            tracker.log_metrics(metrics, done)
            if "loss" in metrics:
                logger.info("step %d/%d  loss %.4f", done, num_steps, metrics["loss"])
        stopping = termination.requested()
        if regular or (stopping and checkpoints.ruined() is None):
            keep = regular_step(done, settings.checkpoint_every)
            checkpoints.save(done, progress.state_dict(), [keep])
        if stopping and done < num_steps:
            raise termination.Terminated(f"stopped after step {done} of {num_steps}")
    if "loss" not in progress.metrics:
        raise UserError(
            f"each of the {num_steps} steps of {section} was left out, so nothing was learned: "
            "look at the records, or lower the learning rate"
        )
    model.eval()
    return TrainingResult(
        num_steps,
        checkpoint.step if checkpoint else None,
        progress.metrics,
        stability.interventions,
    )


def _step(
    model: PreTrainedModel,
    optimizer: Optimizer,
    micro_losses: Callable[[int], Iterable[MicroLoss]],
    budget: TokenBudget,
    stability: Stability,
    doing: str,
) -> dict[str, float]:
    """One optimizer step. Raises Unstable, with the weights untouched."""

    def accumulate(max_tokens: int) -> dict[str, float]:
        heartbeat.beat(doing)
        sums: dict[str, float] = {"loss": 0.0}
        for micro in micro_losses(max_tokens):
            loss = micro.loss.item()
            stability.check_loss(loss)
            micro.loss.backward()
            heartbeat.beat(doing)
            sums["loss"] += loss
            for name, value in micro.metrics.items():
                sums[name] = sums.get(name, 0.0) + value
        return sums

    with weights_held(model):
        totals = budget.run(accumulate, optimizer.clear)
    grad_norm = optimizer.clip()
    stability.check_grad_norm(grad_norm)
    return totals | {
        "grad_norm": grad_norm,
        "learning_rate": optimizer.step(stability.learning_rate_scale),
    }


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
