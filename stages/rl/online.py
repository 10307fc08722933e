"""The one loop of PPO, GRPO and RLOO: sample, score, credit, update."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from infra.tracking import Tracker
from schemas.base import UserError
from schemas.rl import OnlineConfig
from stages import heartbeat, termination
from stages.adapters import has_adapters
from stages.checkpoint import Checkpoint, Checkpoints
from stages.core.kl import kl_k1
from stages.core.masks import masked_sum
from stages.measured_memory import fitted_budget
from stages.memory import TokenBudget
from stages.optimization import Optimizer
from stages.resumption import data_cursor, go_back, refuse_ruined, regular_step, say_resumed
from stages.rewards.composition import Rewarder
from stages.rl.algorithms import OnlineAlgorithm
from stages.rl.batches import Batches, policy_lag
from stages.rl.experience import CreditMode, Experience
from stages.rl.guards import Guards, refuse_truncation
from stages.rl.held_out import HeldOutProbe
from stages.rl.rollouts import (
    PromptRecord,
    PromptStream,
    Sampler,
    ScoredRollouts,
    make_experience,
    shared_prompt,
)
from stages.rl.traces import Traces, after_update, reference_logprobs
from stages.rl.update import Learner, update
from stages.rollout.types import RolloutEngine
from stages.shared_critic import Critic
from stages.stability import Stability, Unstable

logger = logging.getLogger(__name__)

# Where no loss needs the reference, its KL is still reported, from this many rollouts a step.
_KL_SAMPLE = 32

# A curve is made of numbers.
_MODES: dict[CreditMode, float] = {"response": 0.0, "step": 0.5, "token": 1.0}


@dataclass(frozen=True)
class Models:
    """The models of online RL."""

    policy: PreTrainedModel
    reference: PreTrainedModel
    """Frozen; or the policy itself, which with its adapters disabled is what it was before."""
    critic: Critic | None

    def __post_init__(self) -> None:
        assert self.reference is not self.policy or has_adapters(self.policy), "no reference"


@dataclass(frozen=True)
class OnlineResult:
    """What the loop did."""

    num_steps: int
    resumed_from_step: int | None
    metrics: dict[str, float]
    """Metrics of the last step."""
    interventions: list[dict[str, Any]]
    """Steps that were left out or taken back, and why."""
    checks: list[dict[str, Any]]
    """Held-out accuracy by step, where it was looked at."""


@dataclass
class _Progress:
    """What a checkpoint keeps beside weights, moments and random numbers."""

    algorithm: OnlineAlgorithm
    batches: Batches
    guards: Guards
    stability: Stability
    probe: HeldOutProbe
    budget: TokenBudget
    step: int = 0
    """Steps that are done."""
    metrics: dict[str, float] = field(default_factory=dict)

    def state_dict(self) -> dict[str, Any]:
        """JSON state."""
        return {
            "metrics": self.metrics,
            "algorithm": self.algorithm.state_dict(),
            "flat_fractions": self.guards.flat_fractions,
            "stability": self.stability.state_dict(),
            "checks": self.probe.checks,
            "micro_batch_tokens": self.budget.tokens,
        } | self.batches.state_dict()

    def resume(self, checkpoint: Checkpoint) -> None:
        """Stand where an earlier attempt stood."""
        self.go_back(checkpoint)
        self.batches.load_state_dict(checkpoint.extra)
        self.stability.load_state_dict(checkpoint.extra["stability"])
        self.budget.tokens = checkpoint.extra["micro_batch_tokens"]

    def go_back(self, checkpoint: Checkpoint) -> None:
        """Stand where a checkpoint stands; the data cursor and the decisions stay."""
        self.step = checkpoint.step
        self.metrics = dict(checkpoint.extra["metrics"])
        self.algorithm.load_state_dict(checkpoint.extra["algorithm"])
        self.guards.flat_fractions = list(checkpoint.extra["flat_fractions"])
        self.stability.go_back(checkpoint.extra["stability"])
        self.probe.checks = list(checkpoint.extra["checks"])


@dataclass(frozen=True)
class _Parts:
    """What the steps of the loop work with."""

    models: Models
    algorithm: OnlineAlgorithm
    config: OnlineConfig
    learner: Learner
    engine: RolloutEngine
    stream: PromptStream
    batches: Batches
    probe: HeldOutProbe
    stability: Stability
    budget: TokenBudget
    checkpoints: Checkpoints
    traces: Traces
    engine_is_exact: bool
    seed: int


def train(
    models: Models,
    algorithm: OnlineAlgorithm,
    engine: RolloutEngine,
    rewarder: Rewarder,
    prompts: Sequence[PromptRecord],
    held_out: Sequence[PromptRecord],
    config: OnlineConfig,
    *,
    decode: Callable[[Sequence[int]], str],
    engine_is_exact: bool,
    seed: int,
    run_dir: Path,
    tracker: Tracker,
) -> OnlineResult:
    """Train the policy in place, with checkpoints, resuming where an earlier attempt stopped.

    held_out: prompts of the probe, which are never trained on; see `split_held_out`.
    Raises UserError where there is no prompt, and where a guard or `config.stability` says so.
    """
    if not prompts:
        raise UserError("rl.online has no prompt to sample from and would run zero steps: add data")
    learner = _learner(models, algorithm, config)
    stream = PromptStream(prompts, seed)
    sampler = Sampler(engine, rewarder, stream, config, algorithm.dynamic_sampling_rounds)
    parts = _Parts(
        models=models,
        algorithm=algorithm,
        config=config,
        learner=learner,
        engine=engine,
        stream=stream,
        batches=Batches(engine, sampler, stream, models.policy, config, partial(_seed, seed)),
        probe=HeldOutProbe(engine, rewarder, held_out, config),
        stability=Stability(config.stability, "rl.online.stability"),
        budget=fitted_budget(
            config.micro_batch_tokens,
            "rl.online",
            [models.policy, *([models.critic] if models.critic is not None else [])],
            run_dir,
            shared_prompt(prompts, config),
        ),
        checkpoints=_checkpoints(run_dir, learner),
        traces=Traces(run_dir / "traces", config, decode),
        engine_is_exact=engine_is_exact,
        seed=seed,
    )
    with parts.batches:
        return _run(parts, tracker)


def _run(parts: _Parts, tracker: Tracker) -> OnlineResult:
    models, algorithm, config = parts.models, parts.algorithm, parts.config
    checkpoints, probe = parts.checkpoints, parts.probe
    guards = Guards(config, compares_groups=algorithm.critic is None)
    progress = _Progress(algorithm, parts.batches, guards, parts.stability, probe, parts.budget)
    torch.manual_seed(parts.seed)
    resumed_from = _start(progress, parts, tracker)
    while progress.step < config.num_steps:
        step, done = progress.step, progress.step + 1
        regular = done == config.num_steps or done == regular_step(done, config.checkpoint_every)
        if probe.due(step):
            parts.engine.update_weights(models.policy, step)
            probe.look(step)
            if probe.best_step == step:
                checkpoints.save(step, progress.state_dict(), _keep(step, probe, config))
        heartbeat.beat(f"sampling for step {done} of {config.num_steps}")
        found = parts.batches.take(step)
        refuse_truncation(found, config)
        try:
            metrics = _learn(parts, found, step)
            tracker.log_metrics(metrics, done)
            logger.info("step %d/%d  %s", done, config.num_steps, _summary(metrics))
            guards.check(metrics)
            if regular:
                refuse_ruined(checkpoints)
        except Unstable as problem:
            _take_back(problem, found, progress, parts, tracker)
            continue
        progress.step, progress.metrics = done, metrics
        stopping = termination.requested()
        if regular or (stopping and checkpoints.ruined() is None):
            checkpoints.save(done, progress.state_dict(), _keep(done, probe, config))
        if stopping and done < config.num_steps:
            raise termination.Terminated(f"stopped after step {done} of {config.num_steps}")
    _refuse_nothing_learned(parts.stability, config)
    return OnlineResult(
        config.num_steps,
        resumed_from,
        progress.metrics,
        parts.stability.interventions,
        probe.checks,
    )


def _seed(seed: int, step: int) -> int:
    """Seeds of different steps must not meet, whatever rounds and epochs add to them."""
    return (seed * 1_000_003 + step) * 1_009


def _start(progress: _Progress, parts: _Parts, tracker: Tracker) -> int | None:
    """Begin, or go on from a checkpoint; returns its step, or None."""
    config = parts.config
    checkpoint = parts.checkpoints.resume()
    if checkpoint is None:
        tracker.rewind(0)
        if config.stability.rewinds:
            parts.checkpoints.save(0, progress.state_dict())
    else:
        progress.resume(checkpoint)
        tracker.resume(progress.step)
        cursor = data_cursor(parts.stream.position, len(parts.stream.prompts), "prompt")
        say_resumed(checkpoint, config.num_steps, cursor)
    parts.traces.rewind(progress.step)
    return checkpoint.step if checkpoint is not None else None


def _learn(parts: _Parts, found: ScoredRollouts, step: int) -> dict[str, float]:
    """From scored rollouts to new weights; returns the metrics of the step.

    Raises Unstable where the step must not stand.
    """
    models, algorithm, config = parts.models, parts.algorithm, parts.config
    done = step + 1
    parts.probe.check(step, found.rewards.total.mean().item())
    experience = make_experience(
        found,
        models.policy,
        models.reference if algorithm.needs_reference else None,
        models.critic,
        config=config,
        budget=parts.budget,
        engine_is_exact=parts.engine_is_exact,
    )
    credit = algorithm.credit(experience, step)
    warming_up = algorithm.critic is not None and step < algorithm.critic.warmup_steps
    metrics = (
        _batch_metrics(found, experience, config)
        | {"rollouts/policy_lag": policy_lag(found, step)}
        | parts.engine.report()
        | {"kl/mean": _kl_to_reference(experience, models.reference, config)}
        | parts.probe.metrics(step)
        | credit.metrics
        | {"credit/mode": _MODES[credit.mode]}
        | update(
            parts.learner,
            experience,
            credit,
            algorithm,
            config,
            seed=_seed(parts.seed, step),
            train_policy=not warming_up,
            engine_is_exact=parts.engine_is_exact,
            stability=parts.stability,
            budget=parts.budget,
            step=done,
            record_ids=parts.stream.record_ids,
        )
        | parts.stability.metrics()
    )
    if parts.traces.due(step):
        rows = parts.traces.traced_rows(experience)
        after = after_update(models.policy, experience, credit, algorithm, config, rows)
        ref_logprobs = reference_logprobs(models.reference, experience, config, rows)
        parts.traces.write(done, experience, credit, after, ref_logprobs, metrics)
    return metrics


def _take_back(
    problem: Unstable,
    found: ScoredRollouts,
    progress: _Progress,
    parts: _Parts,
    tracker: Tracker,
) -> None:
    """Go back to a good checkpoint, leaving out the prompts since then.

    Raises UserError where the policy is to stop, or was followed too often.
    """
    config, failed = parts.config, progress.step + 1
    records = problem.records or parts.stream.record_ids(found.rollouts)
    parts.stability.intervene(problem, step=failed, records=records)
    target = _target(problem, progress.step, parts.probe, config)
    progress.go_back(go_back(parts.checkpoints, target))
    parts.stability.rewound(failed, progress.step, problem, records)
    tracker.rewind(progress.step)
    parts.traces.rewind(progress.step)
    parts.checkpoints.save(
        progress.step, progress.state_dict(), _keep(progress.step, parts.probe, config)
    )


def _target(problem: Unstable, step: int, probe: HeldOutProbe, config: OnlineConfig) -> int:
    """Step that training goes back to from a problem that was met after `step` steps."""
    if problem.case == "held_out":
        assert probe.best_step is not None
        return probe.best_step
    if problem.case in ("kl", "entropy"):
        # Measured on the weights that the step began with: their own checkpoint is no good either.
        step = max(step - 1, 0)
    return regular_step(step, config.checkpoint_every)


def _keep(step: int, probe: HeldOutProbe, config: OnlineConfig) -> list[int]:
    """Checkpoints that training may have to go back to from `step` on."""
    kept = [regular_step(one, config.checkpoint_every) for one in (step, max(step - 1, 0))]
    return kept if probe.best_step is None else [*kept, probe.best_step]


def _refuse_nothing_learned(stability: Stability, config: OnlineConfig) -> None:
    total = config.num_steps * config.num_epochs * config.num_mini_batches
    if stability.metrics().get("stability/num_skipped", 0.0) >= total:
        raise UserError(
            f"each of the {total} optimizer steps of rl.online was left out, so nothing was "
            "learned: look at the rewards, or lower the learning rate"
        )


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
