"""RLOO: REINFORCE with the mean of the other responses as the baseline.

Ahmadian et al. 2024 (Back to Basics), section 3. The whole response is one action: its reward
holds the KL to the SFT policy, and its ratio is that of the sequence. Step rewards count through
their aggregate.
"""

from __future__ import annotations

from torch import Tensor

from schemas.rl import RLOOConfig
from stages.core.advantages import leave_one_out
from stages.core.losses import clipped_policy_loss, policy_ratio
from stages.rl.experience import Credit, Experience, TokenLoss, TrainBatch


def credit(experience: Experience, config: RLOOConfig) -> Credit:
    """Reward less the leave-one-out mean, the same for every token (eq. 8)."""
    rewards = experience.rewards.total.to(experience.group_ids.device)
    if config.kl_coef:
        rewards = rewards - config.kl_coef * experience.sequence_kl()
    advantages = experience.per_token(leave_one_out(rewards, experience.group_ids))
    return Credit(advantages, kl_coef=config.kl_coef)


def loss(logprobs: Tensor, batch: TrainBatch, config: RLOOConfig) -> TokenLoss:
    """Clipped surrogate; at ratio 1 its gradient is REINFORCE's."""
    ratio = policy_ratio(logprobs, batch.old_logprobs, batch.completion_mask, config.ratio)
    found = clipped_policy_loss(ratio, batch.advantages, config.clip_low, config.clip_high, None)
    return TokenLoss(*found, ratio)
