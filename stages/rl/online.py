"""The one loop of PPO, GRPO and RLOO: sample, score, credit, update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from infra.tracking import Tracker
from schemas.rl import OnlineConfig
from stages import termination
from stages.checkpoint import Checkpoints
from stages.core.kl import kl_k1
from stages.core.masks import masked_sum
from stages.optimization import Optimizer
from stages.rewards.composition import Rewarder
from stages.rl.algorithms import OnlineAlgorithm
from stages.rl.batches import Batches, policy_lag
from stages.rl.experience import CreditMode, Experience
from stages.rl.guards import Guards, refuse_truncation
from stages.rl.rollouts import (
    PromptRecord,
    PromptStream,
    Sampler,
    ScoredRollouts,
    make_experience,
)
from stages.rl.traces import Traces, after_update, reference_logprobs
from stages.rl.update import Learner, update
from stages.rollout.types import RolloutEngine
from stages.shared_critic import Critic

logger = logging.getLogger(__name__)

# Where no loss needs the reference, its KL is still reported, from this many rollouts a step.
_KL_SAMPLE = 32

# A curve is made of numbers.
_MODES: dict[CreditMode, float] = {"response": 0.0, "step": 0.5, "token": 1.0}


@dataclass(frozen=True)
class Models:
    """The models of online RL; the reference is frozen."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    critic: Critic | None


@dataclass(frozen=True)
class OnlineResult:
    """What the loop did."""

    num_steps: int
    resumed_from_step: int | None
    metrics: dict[str, float]
    """Metrics of the last step."""


def train(
    models: Models,
    algorithm: OnlineAlgorithm,
    engine: RolloutEngine,
    rewarder: Rewarder,
    prompts: Sequence[PromptRecord],
    config: OnlineConfig,
    *,
    pad_token_id: int,
    decode: Callable[[Sequence[int]], str],
    engine_is_exact: bool,
    seed: int,
    run_dir: Path,
    tracker: Tracker,
) -> OnlineResult:
    """Train the policy in place, with checkpoints, resuming where an earlier attempt stopped."""
    learner = _learner(models, algorithm, config)
    stream = PromptStream(prompts, seed)
    sampler = Sampler(engine, rewarder, stream, config, algorithm.dynamic_sampling_rounds)
    checkpoints = _checkpoints(run_dir, learner)
    guards = Guards(config, compares_groups=algorithm.critic is None)
    traces = Traces(run_dir / "traces", config, decode)
    torch.manual_seed(seed)

    def seed_of(step: int) -> int:
        # Seeds of different steps must not meet, whatever rounds and epochs add to them.
        return (seed * 1_000_003 + step) * 1_009

    with Batches(engine, sampler, stream, models.policy, config, seed_of) as batches:
        start, metrics = _resume(checkpoints, algorithm, batches, guards, tracker, config)
        traces.rewind(start or 0)
        for step in range(start or 0, config.num_steps):
            found = batches.take(step)
            refuse_truncation(found, config)
            experience = make_experience(
                found,
                models.policy,
                models.reference if algorithm.needs_reference else None,
                models.critic,
                config=config,
                pad_token_id=pad_token_id,
                engine_is_exact=engine_is_exact,
            )
            credit = algorithm.credit(experience, step)
            warming_up = algorithm.critic is not None and step < algorithm.critic.warmup_steps
            metrics = (
                _batch_metrics(found, experience, config)
                | {"rollouts/policy_lag": policy_lag(found, step)}
                | engine.report()
                | {"kl/mean": _kl_to_reference(experience, models.reference, config)}
                | credit.metrics
                | {"credit/mode": _MODES[credit.mode]}
                | update(
                    learner,
                    experience,
                    credit,
                    algorithm,
                    config,
                    seed=seed_of(step),
                    train_policy=not warming_up,
                    engine_is_exact=engine_is_exact,
                )
            )
            done = step + 1
            if traces.due(step):
                rows = traces.traced_rows(experience)
                after = after_update(models.policy, experience, credit, algorithm, config, rows)
                ref_logprobs = reference_logprobs(models.reference, experience, config, rows)
                traces.write(done, experience, credit, after, ref_logprobs, metrics)
            tracker.log_metrics(metrics, done)
            logger.info("step %d/%d  %s", done, config.num_steps, _summary(metrics))
            guards.check(metrics)
            stopping = termination.requested()
            if done % config.checkpoint_every == 0 or done == config.num_steps or stopping:
                checkpoints.save(
                    done,
                    {
                        "metrics": metrics,
                        "algorithm": algorithm.state_dict(),
                        "flat_fractions": guards.flat_fractions,
                    }
                    | batches.state_dict(),
                )
            if stopping and done < config.num_steps:
                raise termination.Terminated(f"stopped after step {done} of {config.num_steps}")
    return OnlineResult(config.num_steps, start, metrics)


def _learner(models: Models, algorithm: OnlineAlgorithm, config: OnlineConfig) -> Learner:
    updates = config.num_epochs * config.num_mini_batches
    critic_optimizer = None
    warmup = 0
    if models.critic is not None:
        assert algorithm.critic is not None
        warmup = algorithm.critic.warmup_steps
        critic_optimizer = Optimizer.create(
            models.critic, algorithm.critic.optimizer, config.num_steps * updates
        )
    return Learner(
        models.policy,
        Optimizer.create(
            models.policy, algorithm.optimizer, max(config.num_steps - warmup, 1) * updates
        ),
        models.critic,
        critic_optimizer,
    )


def _checkpoints(run_dir: Path, learner: Learner) -> Checkpoints:
    models: dict[str, nn.Module] = {"policy": learner.policy}
    optimizers = {"policy": learner.policy_optimizer}
    if learner.critic is not None and learner.critic_optimizer is not None:
        models["critic"] = learner.critic
        optimizers["critic"] = learner.critic_optimizer
    return Checkpoints(run_dir / "checkpoints", models, optimizers)


def _resume(
    checkpoints: Checkpoints,
    algorithm: OnlineAlgorithm,
    batches: Batches,
    guards: Guards,
    tracker: Tracker,
    config: OnlineConfig,
) -> tuple[int | None, dict[str, float]]:
    checkpoint = checkpoints.resume()
    if checkpoint is None:
        return None, {}
    algorithm.load_state_dict(checkpoint.extra["algorithm"])
    batches.load_state_dict(checkpoint.extra)
    guards.flat_fractions = checkpoint.extra["flat_fractions"]
    tracker.rewind(checkpoint.step)
    logger.info(
        "resuming at step %d of %d (prompt %d of the data order)",
        checkpoint.step,
        config.num_steps,
        batches.position,
    )
    return checkpoint.step, checkpoint.extra["metrics"]


def _batch_metrics(
    found: ScoredRollouts, experience: Experience, config: OnlineConfig
) -> dict[str, float]:
    rewards = found.rewards
    lengths = torch.tensor([float(len(rollout.completion_ids)) for rollout in found.rollouts])
    metrics = {
        "reward/mean": rewards.total.mean().item(),
        "reward/std": rewards.total.std().item(),
        "groups/zero_variance_fraction": found.num_zero_variance_groups / config.prompts_per_step,
        "groups/num_replaced": float(found.num_replaced_groups),
        "completions/length": lengths.mean().item(),
        "completions/truncated_fraction": experience.truncated.float().mean().item(),
    }
    for name, values in rewards.components.items():
        metrics[f"reward/{name}"] = values.mean().item()
    if rewards.step_ends is not None:
        counts = torch.tensor([float(ends.numel()) for ends in rewards.step_ends])
        metrics["completions/num_steps"] = counts.mean().item()
    return metrics


def _kl_to_reference(
    experience: Experience, reference: PreTrainedModel, config: OnlineConfig
) -> float:
    """Mean sequence KL to the SFT policy in nats, k1 on the policy's own samples."""
    num_rows = len(experience.rollouts)
    known = experience.ref_logprobs is not None
    # Every k-th rollout, so that as many prompts as possible are in the sample.
    rows = range(0, num_rows, 1 if known else max(num_rows // _KL_SAMPLE, 1))
    ref_logprobs = reference_logprobs(reference, experience, config, rows)
    kl = kl_k1(experience.old_logprobs[list(rows)], ref_logprobs)
    return masked_sum(kl, experience.completion_mask[list(rows)], dim=1).mean().item()


def _summary(metrics: dict[str, Any]) -> str:
    names = ["reward/mean", "reward/verifier", "kl/mean", "completions/length"]
    return "  ".join(f"{name} {metrics[name]:.3f}" for name in names if name in metrics)
