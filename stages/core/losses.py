"""Losses, a value per token or per sequence: `aggregation` sums them over a global denominator.

Shapes: `_B` sequences, `_T` completion tokens, `_N` steps. A loss is minimised. Clip masks are
True where the clip decided the value and so took the gradient away; count them over valid tokens.
"""

from typing import Literal, assert_never

import torch
from torch import Tensor
from torch.nn import functional

from stages.core.kl import kl_k3
from stages.core.masks import masked_mean, masked_sum, upcast

RatioLevel = Literal["token", "sequence", "sequence_mean"]
DPOKind = Literal["sigmoid", "ipo", "hinge"]

# exp overflows float32 at 88, which the sum over a long sequence reaches, and a clipped infinity
# still has a NaN gradient. verl bounds the log-ratio at the same place.
MAX_LOG_RATIO = 20.0


def policy_ratio(logprobs: Tensor, old_logprobs: Tensor, mask: Tensor, level: RatioLevel) -> Tensor:
    """Ratio pi / pi_old, for each token or broadcast over its sequence; 1 where masked.

    "token": exp(logprobs - old_logprobs) (PPO, Schulman et al. 2017, section 3). "sequence": exp
    of the sum over the sequence (RLOO, Ahmadian et al. 2024). "sequence_mean": exp of the mean
    over the sequence (GSPO, Zheng et al. 2025, eq. 7); aggregated by `sequence_mean`, the last
    two give each sequence its ratio once. The log-ratio is bounded at +-MAX_LOG_RATIO.

    logprobs, old_logprobs, mask [_B, _T]. Returns [_B, _T].
    """
    valid = mask.bool()
    log_ratio = torch.where(valid, upcast(logprobs - old_logprobs), 0.0)
    match level:
        case "token":
            pass
        case "sequence":
            log_ratio = masked_sum(log_ratio, mask, dim=1)[:, None].expand_as(log_ratio)
        case "sequence_mean":
            log_ratio = masked_mean(log_ratio, mask, dim=1)[:, None].expand_as(log_ratio)
        case _:
            assert_never(level)
    bounded = log_ratio.clamp(min=-MAX_LOG_RATIO, max=MAX_LOG_RATIO)
    return torch.where(valid, bounded.exp(), 1.0)


def clipped_policy_loss(
    ratio: Tensor,
    advantages: Tensor,
    clip_low: float,
    clip_high: float,
    dual_clip: float | None,
) -> tuple[Tensor, Tensor]:
    """-min(ratio * A, clip(ratio, 1 - clip_low, 1 + clip_high) * A) for each token.

    (PPO, Schulman et al. 2017, eq. 7; two bounds: DAPO, Yu et al. 2025, eq. 8.) dual_clip bounds
    the loss of a negative advantage at -dual_clip * A (dual-clip PPO, Ye et al. 2020).

    ratio, advantages [_B, _T]. Returns (loss, clipped bool), [_B, _T] each. Raises ValueError
    for a negative clip, or a dual_clip that is not above 1.
    """
    assert ratio.shape == advantages.shape, (ratio.shape, advantages.shape)
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"clip_low and clip_high must not be negative: {clip_low}, {clip_high}")
    unclipped = -advantages * ratio
    bounded = -advantages * ratio.clamp(min=1 - clip_low, max=1 + clip_high)
    loss = torch.maximum(unclipped, bounded)
    clipped = bounded > unclipped
    if dual_clip is not None:
        if not dual_clip > 1:
            raise ValueError(f"dual_clip must be above 1, got {dual_clip}")
        ceiling = -advantages * dual_clip
        too_high = (advantages < 0) & (loss > ceiling)
        loss = torch.where(too_high, ceiling, loss)
        clipped = clipped | too_high
    return loss, clipped


def cispo_loss(
    ratio: Tensor, logprobs: Tensor, advantages: Tensor, clip_high: float
) -> tuple[Tensor, Tensor]:
    """-stop_gradient(min(ratio, 1 + clip_high)) * A * logprobs (CISPO, MiniMax-M1 2025, eq. 4-5).

    The weight is clipped, not the update: every token keeps its gradient. As in the paper's runs
    there is no lower bound. TRL's `epsilon_high` is the bound itself, 1 + clip_high.

    ratio, logprobs, advantages [_B, _T]. Returns (loss, clipped bool), [_B, _T] each; clipped
    marks the tokens whose weight was cut. Raises ValueError for a negative clip_high.
    """
    assert ratio.shape == logprobs.shape == advantages.shape, (ratio.shape, advantages.shape)
    if clip_high < 0:
        raise ValueError(f"clip_high must not be negative: {clip_high}")
    weight = ratio.detach()
    return -weight.clamp(max=1 + clip_high) * advantages * logprobs, weight > 1 + clip_high


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None
) -> tuple[Tensor, Tensor]:
    """Half the squared error of the critic, for each token.

    With a clip, the larger of the errors of `values` and of `values` held within +-clip of
    `old_values` (OpenAI baselines ppo2; TRL).

    values, old_values, returns [_B, _T]. Returns (loss, clipped bool), [_B, _T] each.
    """
    assert values.shape == old_values.shape == returns.shape, (values.shape, returns.shape)
    loss = (values - returns).square() / 2
    if clip is None:
        return loss, torch.zeros_like(loss, dtype=torch.bool)
    held = old_values + (values - old_values).clamp(min=-clip, max=clip)
    held_loss = (held - returns).square() / 2
    return torch.maximum(loss, held_loss), held_loss > loss


def mismatch_weights(
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    cap: float,
    level: Literal["token", "sequence"],
) -> Tensor:
    """Truncated importance weights min(exp(old - rollout), cap), from engine to trainer.

    (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training".)
    "sequence": the weight of the whole sequence, for each of its tokens.

    old_logprobs, rollout_logprobs, mask [_B, _T]. Returns [_B, _T], detached, 1 where masked.
    Raises ValueError unless cap > 0.
    """
    if not cap > 0:
        raise ValueError(f"cap must be above 0, got {cap}")
    ratio = policy_ratio(old_logprobs.detach(), rollout_logprobs.detach(), mask, level)
    return torch.where(mask.bool(), ratio.clamp(max=cap), 1.0)


def mismatch_kl(old_logprobs: Tensor, rollout_logprobs: Tensor, mask: Tensor) -> float:
    """KL(engine || trainer) in nats per token, by k3 on the engine's samples; never negative.

    old_logprobs, rollout_logprobs, mask [_B, _T]. 0 without valid tokens.
    """
    return float(masked_mean(kl_k3(rollout_logprobs, old_logprobs), mask))


def dpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor,
    ref_rejected_logps: Tensor,
    beta: float,
    kind: DPOKind,
    label_smoothing: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Preference losses on h = (chosen - ref_chosen) - (rejected - ref_rejected).

    "sigmoid": -log sigmoid(beta h) (Rafailov et al. 2023, eq. 7); with label_smoothing e,
    -(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h) (cDPO, Mitchell 2023).
    "ipo": (h - 1 / (2 beta))^2 (Azar et al. 2023, eq. 17). "hinge": max(0, 1 - beta h) (SLiC,
    Zhao et al. 2023).
    Each log-probability is the sum over the completion's tokens; for the length-normalised form
    (and IPO as TRL has it) pass the means over the tokens instead.

    All [_B]. Returns (losses, chosen_rewards, rejected_rewards), [_B] each; the implicit rewards
    beta * (logps - ref_logps) are detached. Raises ValueError unless beta > 0, and label_smoothing
    is in [0, 0.5) and, but for "sigmoid", 0.
    """
    if not beta > 0:
        raise ValueError(f"beta must be above 0, got {beta}")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing}")
    if label_smoothing and kind != "sigmoid":
        raise ValueError(f"label_smoothing is defined for kind 'sigmoid' only, not for '{kind}'")
    chosen_log_ratio = chosen_logps - ref_chosen_logps
    rejected_log_ratio = rejected_logps - ref_rejected_logps
    h = chosen_log_ratio - rejected_log_ratio
    match kind:
        case "sigmoid":
            losses = -(1 - label_smoothing) * functional.logsigmoid(beta * h)
            losses = losses - label_smoothing * functional.logsigmoid(-beta * h)
        case "ipo":
            losses = (h - 1 / (2 * beta)).square()
        case "hinge":
            losses = (1 - beta * h).relu()
        case _:
            assert_never(kind)
    return losses, beta * chosen_log_ratio.detach(), beta * rejected_log_ratio.detach()


def bradley_terry_loss(
    chosen: Tensor, rejected: Tensor, margin: Tensor | None = None, centering: float = 0.0
) -> Tensor:
    """-log sigmoid(chosen - rejected - margin) + centering * (chosen + rejected)^2 for each pair.

    (Bradley-Terry as in Ouyang et al. 2022, eq. 1; margin: Llama 2, Touvron et al. 2023, eq. 2;
    centering: Eisenstein et al. 2023, "Helping or herding?".) All [_B]. Returns [_B].
    """
    difference = chosen - rejected if margin is None else chosen - rejected - margin
    return -functional.logsigmoid(difference) + centering * (chosen + rejected).square()


def step_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross entropy of a process reward model at each step's last token; class 1 is "right".

    (Lightman et al. 2023, appendix F, without the neutral class.) logits [_N, 2], labels long [_N]
    of 0 and 1. Returns [_N], in float32 or float64. Raises ValueError for another label.
    """
    if ((labels != 0) & (labels != 1)).any():
        raise ValueError(f"step labels must be 0 or 1, got {sorted(set(labels.tolist()))}")
    return functional.cross_entropy(upcast(logits), labels, reduction="none")
