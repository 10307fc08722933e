"""Which functions make an online algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from schemas.rl import GRPOConfig, LossAggregation, PPOConfig, RLConfig, RLOOConfig
from schemas.training import OptimizerConfig
from stages.rl import grpo, ppo, rloo
from stages.rl.experience import Credit, Experience, TokenLoss, TrainBatch


@dataclass(frozen=True)
class CriticSettings:
    """What the loop needs to train a critic."""

    loss: Callable[[Tensor, TrainBatch], TokenLoss]
    optimizer: OptimizerConfig
    warmup_steps: int
    shared_weight: float | None = None
    """Weight of the value loss on the policy's backbone; None for a critic with its own."""


@dataclass(frozen=True)
class OnlineAlgorithm:
    """Plain functions and settings; the loop knows nothing else of an algorithm."""

    credit: Callable[[Experience, int], Credit]
    loss: Callable[[Tensor, TrainBatch], TokenLoss]
    optimizer: OptimizerConfig
    aggregation: LossAggregation
    needs_reference: bool
    critic: CriticSettings | None = None
    dynamic_sampling_rounds: int = 0
    state: ppo.PPOState | None = None

    def state_dict(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return self.state.state_dict() if self.state is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        if self.state is not None:
            self.state.load_state_dict(state)


def online_algorithm(config: RLConfig) -> OnlineAlgorithm:
    """The functions of the chosen algorithm. DPO is not online."""
    match config.algorithm:
        case "grpo":
            assert config.grpo is not None
            return _grpo(config.grpo)
        case "rloo":
            assert config.rloo is not None
            return _rloo(config.rloo)
        case "ppo":
            assert config.ppo is not None
            return _ppo(config.ppo)
        case "dpo":
            raise AssertionError("DPO learns from fixed pairs; see stages/rl/dpo.py")


def _grpo(config: GRPOConfig) -> OnlineAlgorithm:
    return OnlineAlgorithm(
        credit=lambda experience, _step: grpo.credit(experience, config),
        loss=partial(grpo.loss, config=config),
        optimizer=config.optimizer,
        aggregation=config.aggregation,
        needs_reference=config.kl_coef > 0,
        dynamic_sampling_rounds=config.dynamic_sampling_rounds,
    )


def _rloo(config: RLOOConfig) -> OnlineAlgorithm:
    return OnlineAlgorithm(
        credit=lambda experience, _step: rloo.credit(experience, config),
        loss=partial(rloo.loss, config=config),
        optimizer=config.optimizer,
        aggregation=config.aggregation,
        needs_reference=config.kl_coef > 0,
    )


def _ppo(config: PPOConfig) -> OnlineAlgorithm:
    state = ppo.PPOState.create(config)
    return OnlineAlgorithm(
        credit=lambda experience, step: ppo.credit(experience, config, state, step),
        loss=partial(ppo.loss, config=config),
        optimizer=config.optimizer,
        aggregation=config.aggregation,
        needs_reference=True,
        critic=CriticSettings(
            loss=partial(ppo.critic_loss, config=config),
            optimizer=config.critic_optimizer,
            warmup_steps=config.critic_warmup_steps,
            shared_weight=config.value_coef if config.critic == "shared" else None,
        ),
        state=state,
    )
