"""GRPO: a response is as good as it is better than the others to the same prompt.

Shao et al. 2024 (DeepSeekMath), section 4. No critic: the group is the baseline. Every token of a
response gets the same advantage, unless a process reward model tells its steps apart; what varies
by token is the ratio.
"""

from __future__ import annotations

from torch import Tensor

from schemas.rl import GRPOConfig
from stages.core.advantages import group_normalized, process_supervised
from stages.core.kl import kl_k3
from stages.core.losses import cispo_loss, clipped_policy_loss, policy_ratio
from stages.rl.experience import Credit, Experience, TokenLoss, TrainBatch


def credit(experience: Experience, config: GRPOConfig) -> Credit:
    """Group z-score of the response, plus step-level credit where steps are rewarded.

    A response-level score gives the same advantage to every token; step rewards give each token
    the normalised rewards of the steps that end at or after it (section 4.1.3).
    """
    rewards, group_ids = experience.rewards, experience.group_ids
    scores = rewards.scores.to(group_ids.device)
    kl_coef = config.kl_coef if config.kl_in == "reward" else 0.0
    if kl_coef:
        scores = scores - kl_coef * experience.sequence_kl()
    advantages, _ = group_normalized(scores, group_ids, config.scale, config.eps)
    per_token = experience.per_token(advantages)
    if rewards.step_rewards is None or rewards.step_ends is None:
        return Credit(per_token, kl_coef=kl_coef)
    steps = process_supervised(
        [own.to(group_ids.device) for own in rewards.step_rewards],
        [own.to(group_ids.device) for own in rewards.step_ends],
        group_ids,
        experience.width,
        config.eps,
    )
    per_token = per_token + experience.completion_mask * steps
    return Credit(per_token, mode="step", kl_coef=kl_coef)


def loss(logprobs: Tensor, batch: TrainBatch, config: GRPOConfig) -> TokenLoss:
    """Clipped surrogate (section 4.1.1) or CISPO, with the KL to the SFT policy as k3."""
    ratio = policy_ratio(logprobs, batch.old_logprobs, batch.completion_mask, config.ratio)
    match config.loss:
        case "clip":
            per_token, clipped = clipped_policy_loss(
                ratio, batch.advantages, config.clip_low, config.clip_high, None
            )
        case "cispo":
            per_token, clipped = cispo_loss(ratio, logprobs, batch.advantages, config.clip_high)
    if config.kl_coef and config.kl_in == "loss":
        assert batch.ref_logprobs is not None
        per_token = per_token + config.kl_coef * kl_k3(logprobs, batch.ref_logprobs)
    return TokenLoss(per_token, clipped, ratio)
