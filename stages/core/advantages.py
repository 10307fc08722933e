"""Credit assignment: how a score for a whole response becomes an advantage for each token.

Shapes: `_N` responses (`_B` where tokens are involved), `_T` completion tokens. group_ids [_N]
says which responses answer the same prompt; any ids, in any order. Every function must see whole
groups, and where it says batch, every response of the optimizer step. Results are float32, or
float64 if the rewards are.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

from stages.core.masks import upcast
from stages.core.shaping import place_step_rewards

AdvantageScale = Literal["group", "batch", "none"]


def group_normalized(
    rewards: Tensor, group_ids: Tensor, scale: AdvantageScale = "group", eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """GRPO: (r_i - mean(r)) / (std(r) + eps) within the group (DeepSeekMath, section 4.1.2).

    rewards [_N], group_ids long [_N]. scale: what the deviation from the group's mean is divided
    by, "group" its sample standard deviation, "batch" that of all rewards (REINFORCE++; TRL),
    "none" nothing (Dr. GRPO, Liu et al. 2025, section 3).
    Returns (advantages [_N], zero_variance bool [num_groups], by ascending group id); a group
    without variance gives exactly 0. Raises ValueError for a group of one.
    """
    index, counts = _groups(group_ids)
    _refuse_group_of_one(group_ids, index, counts)
    deviations, zero_variance = _deviations(upcast(rewards), index, counts)
    match scale:
        case "group":
            variance = _group_sum(deviations.square(), index, counts) / (counts - 1)
            return _divided(deviations, variance.sqrt()[index] + eps), zero_variance
        case "batch":
            return _divided(deviations, upcast(rewards).std(correction=1) + eps), zero_variance
        case "none":
            return deviations, zero_variance
        case _:
            assert_never(scale)


def leave_one_out(rewards: Tensor, group_ids: Tensor) -> Tensor:
    """RLOO: r_i - mean of the others of the group (Ahmadian et al. 2024, eq. 8).

    rewards [_N], group_ids long [_N]. Returns [_N]. Raises ValueError for a group of one.
    """
    index, counts = _groups(group_ids)
    _refuse_group_of_one(group_ids, index, counts)
    deviations, _ = _deviations(upcast(rewards), index, counts)
    # r_i - (sum - r_i) / (n - 1) = (r_i - mean) * n / (n - 1), exactly 0 without variance.
    return deviations * counts[index] / (counts[index] - 1)


def response_level(scores: Tensor, group_ids: Tensor | None) -> Tensor:
    """PPO's response-level credit: the score less a baseline, the same for each token.

    The baseline is the mean of the others of the group, or the batch mean where a prompt has one
    response (or group_ids is None). scores [_B], group_ids long [_B]. Returns [_B].
    Raises ValueError for a batch of one response, whose credit would always be 0.
    """
    if scores.numel() == 1:
        raise ValueError("response-level credit needs two responses or more in the batch, got one")
    scores = upcast(scores)
    from_batch_mean = scores - scores.mean()
    if group_ids is None:
        return from_batch_mean
    index, counts = _groups(group_ids)
    deviations, _ = _deviations(scores, index, counts)
    from_others = deviations * counts[index] / (counts[index] - 1).clamp(min=1)
    return torch.where((counts == 1)[index], from_batch_mean, from_others)


def process_supervised(
    step_rewards: Sequence[Tensor],
    step_ends: Sequence[Tensor],
    group_ids: Tensor,
    width: int,
    eps: float = 1e-4,
) -> Tensor:
    """GRPO with a process reward model (DeepSeekMath, section 4.1.3).

    Every step reward is normalised by the mean and the sample standard deviation of all step
    rewards of its group; A_{i,t} is the sum of the normalised rewards of the steps that end at or
    after t. Tokens after the last step get 0. A group without variance, or with a single step,
    gives exactly 0; a response without steps gives 0 and is left out of the statistics.

    step_rewards: _B tensors [_S]; step_ends: _B long tensors [_S], positions in the completion;
    group_ids long [_B]. Returns [_B, _T], _T = width. Raises ValueError for a group of one and
    for step ends that do not fit.
    """
    index, counts = _groups(group_ids)
    _refuse_group_of_one(group_ids, index, counts)
    num_steps = torch.tensor([rewards.numel() for rewards in step_rewards], device=index.device)
    flat = upcast(torch.cat(list(step_rewards)))
    step_index = index.repeat_interleave(num_steps)
    step_counts = counts.new_zeros(counts.shape).index_add_(0, index, num_steps)
    deviations, _ = _deviations(flat, step_index, step_counts)
    variance = _group_sum(deviations.square(), step_index, counts) / (step_counts - 1).clamp(min=1)
    normalized = _divided(deviations, variance.sqrt()[step_index] + eps)
    placed = place_step_rewards(torch.split(normalized, num_steps.tolist()), step_ends, width)
    return _sum_from_here_on(placed)


def token_rewards(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    kl_coef: float,
    step_rewards: Tensor | None = None,
) -> Tensor:
    """PPO's token rewards: -kl_coef * kl on every token, the score on the last valid one.

    (Ziegler et al. 2019, eq. 2, spread over tokens as in Stiennon et al. 2020.) Step rewards are
    added on their positions; one that lies on a masked token (tool output) goes to the last valid
    token before it, the action that led there.

    scores [_B], kl [_B, _T] (k1, nats), mask [_B, _T], step_rewards [_B, _T]. Returns [_B, _T],
    0 where masked; a row without a valid token, an empty completion, is 0 everywhere.
    """
    assert kl.shape == mask.shape, (kl.shape, mask.shape)
    assert scores.shape == mask.shape[:1], (scores.shape, mask.shape)
    valid = mask.bool()
    rewards = torch.where(valid, -kl_coef * upcast(kl), 0.0)
    positions = torch.arange(valid.shape[1], device=valid.device)
    last_so_far = torch.where(valid, positions, -1).cummax(dim=1).values
    is_last = positions == last_so_far[:, -1:]
    rewards = rewards + torch.where(is_last, scores[:, None].to(rewards.dtype), 0.0)
    if step_rewards is not None:
        assert step_rewards.shape == mask.shape, (step_rewards.shape, mask.shape)
        earned = torch.where(last_so_far >= 0, step_rewards.to(rewards.dtype), 0.0)
        rewards = rewards.scatter_add(1, last_so_far.clamp(min=0), earned)
    return rewards


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16), over the valid tokens.

    delta_t = r_t + gamma * V_{t'} - V_t and A_t = delta_t + gamma * lam * A_{t'}, t' being the
    next valid token: masked tokens, inside or at the end, are skipped. After the last valid token
    the value is 0, or bootstrap_values where the completion was cut.

    rewards, values, mask [_B, _T]; bootstrap_values [_B], 0 for rows that ended by themselves.
    Returns (advantages, returns = advantages + values), [_B, _T] each, 0 where masked.
    """
    assert rewards.shape == values.shape == mask.shape, (rewards.shape, values.shape, mask.shape)
    valid = mask.bool()
    rewards, values = upcast(rewards), upcast(values)
    advantages = torch.zeros_like(values)
    next_advantage = values.new_zeros(values.shape[0])
    next_value = next_advantage if bootstrap_values is None else bootstrap_values.to(values.dtype)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_advantage = torch.where(valid[:, t], advantage, next_advantage)
        next_value = torch.where(valid[:, t], values[:, t], next_value)
        advantages[:, t] = torch.where(valid[:, t], advantage, 0.0)
    return advantages, torch.where(valid, advantages + values, 0.0)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over valid tokens: 1 is a perfect critic.

    values, returns, mask [_B, _T]. Returns without variance leave nothing to explain: 0.
    """
    valid = mask.bool()
    kept = upcast(returns)[valid]
    if kept.numel() < 2 or bool((kept == kept[0]).all()):
        return 0.0
    residual = kept - upcast(values)[valid]
    return float(1 - residual.var(correction=0) / kept.var(correction=0))


def _groups(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Index of each response's group, by ascending id, and the size of each group."""
    _, index, counts = torch.unique(group_ids, return_inverse=True, return_counts=True)
    return index, counts


def _refuse_group_of_one(group_ids: Tensor, index: Tensor, counts: Tensor) -> None:
    alone = (counts == 1)[index]
    if alone.any():
        raise ValueError(
            f"group {int(group_ids[alone][0])} has one response, and a group of one has nothing "
            "to be compared with: sample two or more responses a prompt (group_size >= 2)"
        )


def _group_sum(values: Tensor, index: Tensor, counts: Tensor) -> Tensor:
    return values.new_zeros(counts.shape[0]).index_add_(0, index, values)


def _deviations(values: Tensor, index: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Deviation of each value from its group's mean; and which groups have no variance.

    Those give exactly 0: rounding in the mean of equal numbers would be blown up by 1 / eps.
    """
    mean = _group_sum(values, index, counts) / counts
    low, high = (
        values.new_zeros(counts.shape[0]).scatter_reduce(0, index, values, how, include_self=False)
        for how in ("amin", "amax")
    )
    zero_variance = low == high
    return torch.where(zero_variance[index], 0.0, values - mean[index]), zero_variance


def _divided(deviations: Tensor, scale: Tensor) -> Tensor:
    """Deviations over their scale; without variance they are 0, and stay 0 where eps is 0 too."""
    return torch.where(deviations == 0, 0.0, deviations / scale)


def _sum_from_here_on(values: Tensor) -> Tensor:
    return values.flip(1).cumsum(1).flip(1)
