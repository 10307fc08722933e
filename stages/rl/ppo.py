"""PPO: a critic says, token by token, what was to be expected; credit is the surprise.

Schulman et al. 2017 (PPO) and 2016 (GAE), with the KL to the SFT policy in the token rewards
(Ziegler et al. 2019). A poor critic makes token-level credit noise: `credit: auto` measures it by
its explained variance and falls back to response-level credit while it is poor.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from schemas.rl import PPOConfig
from stages.core.advantages import explained_variance, gae, response_level
from stages.core.kl import AdaptiveKLController, FixedKLController
from stages.core.losses import clipped_policy_loss, policy_ratio, value_loss
from stages.core.masks import masked_whiten
from stages.rl.experience import Credit, CreditMode, Experience, TokenLoss, TrainBatch


@dataclass
class PPOState:
    """What lives on from one rollout batch to the next."""

    kl_controller: FixedKLController | AdaptiveKLController
    mode: str = ""
    switches: list[dict[str, Any]] = field(default_factory=list)
    """Audit trail of the credit mode: step, explained variance, mode, why."""

    @classmethod
    def create(cls, config: PPOConfig) -> PPOState:
        """Fixed coefficient, or adaptive where a target is set."""
        if config.kl_target is None:
            return cls(FixedKLController(config.kl_coef))
        return cls(AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon))

    def state_dict(self) -> dict[str, Any]:
        """JSON state for a checkpoint."""
        return {
            "kl_controller": self.kl_controller.state_dict(),
            "mode": self.mode,
            "switches": self.switches,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.mode = state["mode"]
        self.switches = list(state["switches"])


def credit(experience: Experience, config: PPOConfig, state: PPOState, step: int) -> Credit:
    """GAE on token rewards, or the score less a baseline, by `config.credit`.

    The critic learns the GAE returns in either mode, so that it can win back its say.
    """
    mask, values = experience.completion_mask, experience.values
    assert values is not None
    kl_coef = state.kl_controller.value
    rewards = experience.token_rewards(kl_coef)
    bootstrap = _bootstrap(experience, config)
    advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda, bootstrap)
    # Against what was really earned (lambda 1), not against targets that contain the values.
    _, earned = gae(rewards, values, mask, config.gamma, 1.0, bootstrap)
    td_errors, _ = gae(rewards, values, mask, config.gamma, 0.0, bootstrap)
    explained = explained_variance(values, earned, mask)
    mode = _mode(config, explained, state, step)
    if mode == "response":
        advantages = experience.per_token(response_level(rewards.sum(1), experience.group_ids))
    unwhitened = advantages
    if config.whiten_advantages:
        advantages = masked_whiten(advantages, mask)
    state.kl_controller.update(experience.sequence_kl().mean().item(), len(experience.rollouts))
    return Credit(
        advantages,
        returns,
        {"critic/explained_variance": explained, "kl/coef": state.kl_controller.value},
        mode=mode,
        kl_coef=kl_coef,
        td_errors=td_errors,
        unwhitened=unwhitened,
    )


def loss(logprobs: Tensor, batch: TrainBatch, config: PPOConfig) -> TokenLoss:
    """Clipped surrogate (PPO, eq. 7), optionally dual-clipped."""
    ratio = policy_ratio(logprobs, batch.old_logprobs, batch.completion_mask, "token")
    found = clipped_policy_loss(
        ratio, batch.advantages, config.clip_low, config.clip_high, config.dual_clip
    )
    return TokenLoss(*found, ratio)


def critic_loss(values: Tensor, batch: TrainBatch, config: PPOConfig) -> TokenLoss:
    """Half squared error to the returns, clipped around the old values."""
    assert batch.old_values is not None and batch.returns is not None
    return TokenLoss(*value_loss(values, batch.old_values, batch.returns, config.value_clip))


def _bootstrap(experience: Experience, config: PPOConfig) -> Tensor | None:
    if not config.bootstrap_truncated:
        return None
    assert experience.values_after is not None
    return torch.where(experience.truncated, experience.values_after, 0.0)


def _mode(config: PPOConfig, explained: float, state: PPOState, step: int) -> CreditMode:
    """Token-level or response-level credit for this batch; a change is written down."""
    mode: CreditMode
    if config.credit != "auto":
        mode, why = config.credit, f"credit is set to {config.credit}"
    else:
        threshold = config.critic_min_explained_variance
        mode = "token" if explained > threshold else "response"
        relation = "above" if mode == "token" else "not above"
        why = f"explained variance {explained:.3f} is {relation} {threshold}"
    if mode != state.mode:
        state.mode = mode
        state.switches.append(
            {"step": step, "explained_variance": explained, "mode": mode, "why": why}
        )
    return mode
