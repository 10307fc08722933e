"""Rollout batches for the loop: each by the newest weights, or one step ahead of the training."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.rl import OnlineConfig
from stages.rewards.composition import RewardBreakdown
from stages.rl.rollouts import PromptStream, Sampler, ScoredRollouts
from stages.rollout.types import Rollout, RolloutEngine


class Batches:
    """The rollout batch of each step; a context manager that ends its thread.

    With `max_policy_lag` 1, a thread draws and scores the batch of step s + 1 while step s trains,
    by the weights that step s began with. Nothing depends on how fast either is: weights change
    hands only while nothing is drawn, and the batch that is ready is part of a checkpoint.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        sampler: Sampler,
        stream: PromptStream,
        policy: PreTrainedModel,
        config: OnlineConfig,
        seed_of: Callable[[int], int],
    ) -> None:
        self._engine = engine
        self._sampler = sampler
        self._stream = stream
        self._policy = policy
        self._config = config
        self._seed_of = seed_of
        self._ahead: Future[ScoredRollouts] | None = None
        # One thread for all batches: a process that it starts may end with it.
        self._thread = ThreadPoolExecutor(1, "rollouts")

    def take(self, step: int) -> ScoredRollouts:
        """The batch of a step, which is about to train. Steps come in order."""
        ahead, self._ahead = self._ahead, None
        found = None if ahead is None else ahead.result()
        self._engine.update_weights(self._policy, step)
        if found is None:
            found = self._sampler.sample(self._seed_of(step))
        _check_versions(found, step, self._config.max_policy_lag)
        if self._config.max_policy_lag and step + 1 < self._config.num_steps:
            self._ahead = self._thread.submit(self._sampler.sample, self._seed_of(step + 1))
        return found

    def state_dict(self) -> dict[str, Any]:
        """The data cursor, and the batch that is being drawn once it is there; JSON."""
        ahead = None if self._ahead is None else _encode(self._ahead.result())
        return {"position": self._stream.position, "ahead": ahead}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self._stream.position = state["position"]
        if state["ahead"] is not None:
            self._ahead = Future()
            self._ahead.set_result(_decode(state["ahead"]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._thread.shutdown(cancel_futures=True)


def policy_lag(found: ScoredRollouts, step: int) -> float:
    """Mean number of updates between the weights that drew a rollout and those it trains."""
    return sum(step - rollout.policy_version for rollout in found.rollouts) / len(found.rollouts)


def _check_versions(found: ScoredRollouts, step: int, max_lag: int) -> None:
    versions = {rollout.policy_version for rollout in found.rollouts}
    assert all(step - max_lag <= version <= step for version in versions), (
        f"step {step} was given rollouts of the policy versions {sorted(versions)}"
    )


def _encode(found: ScoredRollouts) -> dict[str, Any]:
    rewards = found.rewards
    lists = {
        name: None if rows is None else [_numbers(row) for row in rows]
        for name, rows in _step_lists(rewards).items()
    }
    return {
        "rollouts": [asdict(rollout) for rollout in found.rollouts],
        "scores": _numbers(rewards.scores),
        "total": _numbers(rewards.total),
        "components": {name: _numbers(row) for name, row in rewards.components.items()},
        "lists": lists,
        "num_replaced_groups": found.num_replaced_groups,
        "num_zero_variance_groups": found.num_zero_variance_groups,
    }


def _decode(state: dict[str, Any]) -> ScoredRollouts:
    lists = {
        name: None if rows is None else [_tensor(row) for row in rows]
        for name, rows in state["lists"].items()
    }
    return ScoredRollouts(
        rollouts=[Rollout(**rollout) for rollout in state["rollouts"]],
        rewards=RewardBreakdown(
            scores=_tensor(state["scores"]),
            total=_tensor(state["total"]),
            components={name: _tensor(row) for name, row in state["components"].items()},
            **lists,
        ),
        num_replaced_groups=state["num_replaced_groups"],
        num_zero_variance_groups=state["num_zero_variance_groups"],
    )


def _step_lists(rewards: RewardBreakdown) -> dict[str, list[Tensor] | None]:
    return {
        "step_ends": rewards.step_ends,
        "step_scores": rewards.step_scores,
        "step_rewards": rewards.step_rewards,
    }


def _numbers(values: Tensor) -> dict[str, Any]:
    """A tensor in one dimension as JSON; Python's floats hold float32 and float64 exactly."""
    return {"dtype": str(values.dtype).removeprefix("torch."), "values": values.tolist()}


def _tensor(numbers: dict[str, Any]) -> Tensor:
    return torch.tensor(numbers["values"], dtype=getattr(torch, numbers["dtype"]))
