"""From experience and credit to optimizer steps, in micro-batches with global denominators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.base import UserError
from schemas.rl import OnlineConfig
from stages import heartbeat
from stages.core.aggregation import aggregate, denominator
from stages.core.losses import mismatch_kl, mismatch_weights
from stages.core.masks import masked_sum
from stages.forward import completion_outputs, completion_values
from stages.memory import TokenBudget
from stages.optimization import Optimizer
from stages.precision import weights_held
from stages.rl.algorithms import OnlineAlgorithm
from stages.rl.experience import Credit, Experience, TrainBatch
from stages.rl.rollouts import first_pass_on_policy
from stages.rollout.types import Rollout
from stages.shared_critic import Critic, SharedCritic
from stages.stability import Stability, Unstable

_NO_CRITIC_LOSS = {"critic/loss": 0.0, "critic/clip_fraction": 0.0}


@dataclass(frozen=True)
class Learner:
    """A policy, perhaps a critic, and their optimizers.

    Each parameter belongs to one optimizer. A shared critic owns its head only, and the gradient
    of its loss reaches the policy's backbone, which the policy's optimizer moves.
    """

    policy: PreTrainedModel
    policy_optimizer: Optimizer
    critic: Critic | None = None
    critic_optimizer: Optimizer | None = None

    @property
    def shared_critic(self) -> SharedCritic | None:
        """The critic if its backbone is the policy's."""
        return self.critic if isinstance(self.critic, SharedCritic) else None

    def clear(self) -> None:
        """Drop every gradient."""
        self.policy_optimizer.clear()
        if self.critic_optimizer is not None:
            self.critic_optimizer.clear()

    def skip(self, train_policy: bool) -> None:
        """Leave out an optimizer step; the schedules move on."""
        if train_policy:
            self.policy_optimizer.skip()
        if self.critic_optimizer is not None:
            self.critic_optimizer.skip()


def update(
    learner: Learner,
    experience: Experience,
    credit: Credit,
    algorithm: OnlineAlgorithm,
    config: OnlineConfig,
    *,
    seed: int,
    train_policy: bool,
    engine_is_exact: bool,
    stability: Stability,
    budget: TokenBudget,
    step: int,
    record_ids: Callable[[Sequence[Rollout]], list[str]],
) -> dict[str, float]:
    """Passes over a rollout batch; returns the metrics of the update, means over its steps.

    step: number of the rollout batch, from 1; record_ids: ids of the records that rollouts answer;
    both for messages. Where `stability` leaves out every optimizer step, there are no metrics.
    Raises Unstable where the whole rollout batch must not stand.
    """
    batch = train_batch(experience, credit)
    fills_in = not engine_is_exact and first_pass_on_policy(config)
    if fills_in:
        batch = replace(batch, old_logprobs=batch.old_logprobs.clone())
    found: list[dict[str, float]] = []
    for rows in _mini_batches(experience, config, seed):
        _refuse_untrainable(batch.completion_mask[rows])
        metrics: dict[str, float] = {}
        try:
            if train_policy:
                with weights_held(learner.policy):
                    metrics |= budget.run(
                        lambda max_tokens, rows=rows: _policy_gradient(  # type: ignore[misc]
                            learner,
                            experience,
                            batch,
                            rows,
                            algorithm,
                            config,
                            engine_is_exact,
                            fills_in and not found,
                            stability,
                            max_tokens,
                        ),
                        learner.policy_optimizer.clear,
                    )
                if not found:
                    # Before the first update of the batch, policy and engine must be the same.
                    _check_mismatch(metrics["mismatch_kl"], config)
            if learner.critic is not None and not (train_policy and learner.shared_critic):
                assert learner.critic_optimizer is not None
                with weights_held(learner.critic):
                    metrics |= budget.run(
                        lambda max_tokens, rows=rows: _critic_gradient(  # type: ignore[misc]
                            learner, experience, batch, rows, algorithm, stability, max_tokens
                        ),
                        learner.critic_optimizer.clear,
                    )
            found.append(metrics | _step(learner, train_policy, stability))
        except Unstable as problem:
            learner.clear()
            problem.records = record_ids([experience.rollouts[row] for row in rows])
            if stability.action(problem) != "skip":
                raise
            stability.intervene(problem, step=step, records=problem.records)
            learner.skip(train_policy)
    if not found:
        return {}
    names = found[0].keys()
    means = {name: sum(metrics[name] for metrics in found) / len(found) for name in names}
    if train_policy:
        means["mismatch_kl"] = found[0]["mismatch_kl"]
    return means


def train_batch(experience: Experience, credit: Credit) -> TrainBatch:
    """All rows of a rollout batch as the losses see them."""
    return TrainBatch(
        advantages=credit.advantages,
        completion_mask=experience.completion_mask,
        old_logprobs=experience.old_logprobs,
        rollout_logprobs=experience.rollout_logprobs,
        ref_logprobs=experience.ref_logprobs,
        returns=credit.returns,
        old_values=experience.values,
    )


def _policy_gradient(
    learner: Learner,
    experience: Experience,
    batch: TrainBatch,
    rows: list[int],
    algorithm: OnlineAlgorithm,
    config: OnlineConfig,
    engine_is_exact: bool,
    fill_in: bool,
    stability: Stability,
    max_tokens: int,
) -> dict[str, float]:
    """Gradient of the policy's loss; with a shared critic, of the value loss too, in one pass.

    fill_in: no update has been made, so this pass says what `batch.old_logprobs` are.
    """
    critic = learner.shared_critic
    mask = batch.completion_mask[rows]
    total = denominator(
        mask, algorithm.aggregation, constant_length=config.sampling.max_completion_tokens
    )
    num_tokens = max(float(mask.sum()), 1.0)
    sums = dict.fromkeys(("policy/loss", "ratio/clip_fraction", "entropy", "mismatch_kl"), 0.0)
    if critic is not None:
        sums |= _NO_CRITIC_LOSS
    learner.policy.train()
    for chosen in _micro(experience, rows, max_tokens):
        logprobs, entropy, values = completion_outputs(
            learner.policy,
            critic,
            experience.sequences.select(chosen),
            experience.width,
            config.sampling.temperature,
        )
        if fill_in:
            batch.old_logprobs[chosen] = logprobs.detach()
        micro = batch.select(chosen)
        token_loss = algorithm.loss(logprobs, micro)
        per_token = token_loss.per_token
        if not engine_is_exact:
            per_token = per_token * mismatch_weights(
                micro.old_logprobs,
                micro.rollout_logprobs,
                micro.completion_mask,
                config.mismatch_cap,
                config.mismatch_level,
            )
        loss = aggregate(per_token, micro.completion_mask, algorithm.aggregation, total)
        sums["policy/loss"] += loss.item()
        if values is not None:
            loss = loss + _critic_loss(values, micro, algorithm, mask, sums)
        stability.check_loss(loss.item())
        loss.backward()
        heartbeat.beat("training the policy on rollouts")
        share = float(micro.completion_mask.sum()) / num_tokens
        sums["mismatch_kl"] += share * mismatch_kl(
            logprobs.detach(), micro.rollout_logprobs, micro.completion_mask
        )
        for name, value in (("ratio/clip_fraction", token_loss.clipped), ("entropy", entropy)):
            sums[name] += masked_sum(value.float(), micro.completion_mask).item() / num_tokens
    return sums


def _critic_gradient(
    learner: Learner,
    experience: Experience,
    batch: TrainBatch,
    rows: list[int],
    algorithm: OnlineAlgorithm,
    stability: Stability,
    max_tokens: int,
) -> dict[str, float]:
    """Gradient of the value loss alone; a shared critic warms up here, and only its head."""
    assert learner.critic is not None
    mask = batch.completion_mask[rows]
    sums = dict(_NO_CRITIC_LOSS)
    learner.critic.train()
    for chosen in _micro(experience, rows, max_tokens):
        values = completion_values(
            learner.critic,
            experience.sequences.select(chosen),
            experience.width,
            head_only=learner.shared_critic is not None,
        )
        loss = _critic_loss(values, batch.select(chosen), algorithm, mask, sums)
        stability.check_loss(loss.item())
        loss.backward()
        heartbeat.beat("training the critic on rollouts")
    return sums


def _critic_loss(
    values: Tensor,
    micro: TrainBatch,
    algorithm: OnlineAlgorithm,
    mask: Tensor,
    sums: dict[str, float],
) -> Tensor:
    """A micro-batch's share of the weighted value loss, counted in `sums` without its weight."""
    assert algorithm.critic is not None
    total = denominator(mask, "token_mean")
    token_loss = algorithm.critic.loss(values, micro)
    loss = aggregate(token_loss.per_token, micro.completion_mask, "token_mean", total)
    sums["critic/loss"] += loss.item()
    clipped = masked_sum(token_loss.clipped.float(), micro.completion_mask).item()
    sums["critic/clip_fraction"] += clipped / total
    weight = algorithm.critic.shared_weight
    return loss if weight is None else weight * loss


def _step(learner: Learner, train_policy: bool, stability: Stability) -> dict[str, float]:
    """Both optimizers step, or neither: every norm is judged before."""
    metrics: dict[str, float] = {}
    critic_optimizer = learner.critic_optimizer
    if critic_optimizer is not None:
        metrics["critic/grad_norm"] = critic_optimizer.clip()
        stability.check_grad_norm(metrics["critic/grad_norm"], "critic's")
    if train_policy:
        metrics["grad_norm"] = learner.policy_optimizer.clip()
        stability.check_grad_norm(metrics["grad_norm"])
        metrics["learning_rate"] = learner.policy_optimizer.step(stability.learning_rate_scale)
    if critic_optimizer is not None:
        critic_optimizer.step(stability.learning_rate_scale)
    return metrics


def _refuse_untrainable(mask: Tensor) -> None:
    if not mask.any():
        raise UserError(
            "every completion of an optimizer step was left out of the loss (all were truncated): "
            "raise rl.online.sampling.max_completion_tokens, or set mask_truncated to false"
        )


def _mini_batches(experience: Experience, config: OnlineConfig, seed: int) -> list[list[int]]:
    """Rows of each optimizer step: a new shuffle for each pass."""
    num_rows = len(experience.rollouts)
    size = num_rows // config.num_mini_batches
    batches: list[list[int]] = []
    for epoch in range(config.num_epochs):
        generator = torch.Generator().manual_seed(seed + epoch)
        order = torch.randperm(num_rows, generator=generator).tolist()
        batches += [
            order[start : start + size] for start in range(0, size * config.num_mini_batches, size)
        ]
    return batches


def _micro(experience: Experience, rows: Sequence[int], max_tokens: int) -> list[list[int]]:
    batches = experience.sequences.select(rows).micro_batches(max_tokens)
    return [[rows[i] for i in indices] for indices in batches]


def _check_mismatch(observed: float, config: OnlineConfig) -> None:
    if observed > config.max_mismatch_kl:
        raise UserError(
            f"the engine's distribution is {observed:.3f} nats a token away from the trainer's, "
            f"above rl.online.max_mismatch_kl {config.max_mismatch_kl}: "
            "check that both use the same weights, temperature and number format"
        )
