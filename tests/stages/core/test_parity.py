"""The numbers that TRL and verl publish, from their formulas written out anew in plain Python.

float64, relative 1e-6. Where the two differ (eps, aggregation, bounds) both are held, with the
arguments that reproduce each.
"""

import math
import random
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from stages.core.advantages import gae, group_normalized, leave_one_out, token_rewards
from stages.core.aggregation import LossAggregation, aggregate, denominator
from stages.core.kl import kl_k3
from stages.core.losses import (
    RatioLevel,
    bradley_terry_loss,
    cispo_loss,
    clipped_policy_loss,
    dpo_loss,
    policy_ratio,
    value_loss,
)
from stages.core.masks import masked_mean, masked_whiten

REL = 1e-6
GROUP, NUM_GROUPS, WIDTH = 4, 3, 6
Rows = list[list[float]]


class Batch:
    """Random rows of unequal length, drawn with the standard library and kept as lists."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        n = GROUP * NUM_GROUPS
        self.lengths = [draw.randint(1, WIDTH) for _ in range(n)]
        self.rewards = [draw.choice([0.0, 0.5, 1.0, draw.gauss(0, 1)]) for _ in range(n)]

        def rows(scale: float) -> Rows:
            return [[draw.gauss(0, scale) for _ in range(k)] for k in self.lengths]

        self.old = [[-abs(x) for x in row] for row in rows(2.0)]
        noise = rows(0.4)
        self.new = [
            [o + e for o, e in zip(a, b, strict=True)] for a, b in zip(self.old, noise, strict=True)
        ]
        self.ref = [
            [o + e for o, e in zip(a, b, strict=True)]
            for a, b in zip(self.old, rows(0.4), strict=True)
        ]
        self.values, self.old_values = rows(1.0), rows(1.0)
        self.advantages = [draw.gauss(0, 1) for _ in range(n)]

    def tensor(self, rows: Rows) -> Tensor:
        """Right-padded with what must not matter."""
        padded = [row + [7.0] * (WIDTH - len(row)) for row in rows]
        return torch.tensor(padded, dtype=torch.float64)

    @property
    def mask(self) -> Tensor:
        return torch.tensor([[t < k for t in range(WIDTH)] for k in self.lengths])

    @property
    def group_ids(self) -> Tensor:
        return torch.arange(NUM_GROUPS).repeat_interleave(GROUP)

    @property
    def token_advantages(self) -> Tensor:
        column = torch.tensor(self.advantages, dtype=torch.float64)
        return column[:, None].expand(-1, WIDTH)

    def groups(self) -> list[list[float]]:
        return [self.rewards[g * GROUP : (g + 1) * GROUP] for g in range(NUM_GROUPS)]


@pytest.fixture(params=range(3))
def batch(request: pytest.FixtureRequest) -> Batch:
    return Batch(request.param)


# Advantages


@pytest.mark.parametrize("eps", [1e-4, 1e-6])  # TRL, verl
def test_grpo_advantages(batch: Batch, eps: float) -> None:
    expected = [
        (r - statistics.fmean(group)) / (statistics.stdev(group) + eps)
        for group in batch.groups()
        for r in group
    ]
    rewards = torch.tensor(batch.rewards, dtype=torch.float64)
    advantages, _ = group_normalized(rewards, batch.group_ids, eps=eps)
    assert advantages.tolist() == pytest.approx(expected, rel=REL)


def test_grpo_advantages_with_batch_scale_and_without_scale(batch: Batch) -> None:
    # TRL: scale_rewards="batch", "none"; verl: norm_adv_by_std_in_grpo=False (Dr. GRPO)
    centered = [r - statistics.fmean(group) for group in batch.groups() for r in group]
    std = statistics.stdev(batch.rewards)
    rewards = torch.tensor(batch.rewards, dtype=torch.float64)
    advantages, _ = group_normalized(rewards, batch.group_ids, "none")
    assert advantages.tolist() == pytest.approx(centered, rel=REL, abs=1e-15)
    advantages, _ = group_normalized(rewards, batch.group_ids, "batch")
    expected = [x / (std + 1e-4) for x in centered]
    assert advantages.tolist() == pytest.approx(expected, rel=REL, abs=1e-15)


def test_rloo_advantages(batch: Batch) -> None:
    # verl: r * n / (n - 1) - mean * n / (n - 1); TRL: r - (sum - r) / (n - 1)
    n = GROUP
    verl = [
        r * n / (n - 1) - statistics.fmean(group) * n / (n - 1)
        for group in batch.groups()
        for r in group
    ]
    trl = [r - (sum(group) - r) / (n - 1) for group in batch.groups() for r in group]
    advantages = leave_one_out(torch.tensor(batch.rewards, dtype=torch.float64), batch.group_ids)
    assert advantages.tolist() == pytest.approx(verl, rel=REL, abs=1e-15)
    assert advantages.tolist() == pytest.approx(trl, rel=REL, abs=1e-15)


# Policy losses


def ratio_rows(batch: Batch, level: RatioLevel) -> Rows:
    rows = []
    for new, old in zip(batch.new, batch.old, strict=True):
        log_ratio = [n - o for n, o in zip(new, old, strict=True)]
        if level == "sequence":
            log_ratio = [sum(log_ratio)] * len(new)
        if level == "sequence_mean":
            log_ratio = [sum(log_ratio) / len(new)] * len(new)
        rows.append([math.exp(x) for x in log_ratio])
    return rows


def clipped_objective(ratio: float, advantage: float, low: float, high: float) -> float:
    return -min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)


def token_mean(rows: Rows) -> float:  # TRL "dapo", "bnpo"; verl "token-mean"
    return sum(map(sum, rows)) / sum(map(len, rows))


def sequence_mean(rows: Rows) -> float:  # TRL "grpo"; verl "seq-mean-token-mean"
    return statistics.fmean(statistics.fmean(row) for row in rows)


def constant(rows: Rows) -> float:  # TRL "dr_grpo": sequences x max_completion_length
    return sum(map(sum, rows)) / (len(rows) * WIDTH)


@pytest.mark.parametrize(
    ("level", "low", "high", "how", "reduce"),
    [
        pytest.param("token", 0.2, 0.2, "sequence_mean", sequence_mean, id="grpo"),
        pytest.param("token", 0.2, 0.28, "token_mean", token_mean, id="dapo"),
        pytest.param("token", 0.2, 0.2, "constant", constant, id="dr_grpo"),
        pytest.param("sequence_mean", 3e-4, 4e-4, "sequence_mean", sequence_mean, id="gspo"),
        pytest.param("sequence", 0.2, 0.2, "sequence_mean", sequence_mean, id="rloo"),
    ],
)
def test_policy_loss(
    batch: Batch,
    level: RatioLevel,
    low: float,
    high: float,
    how: LossAggregation,
    reduce: Callable[[Rows], float],
) -> None:
    beta = 0.04  # of the k3 penalty in the loss
    rows = []
    for i, ratios in enumerate(ratio_rows(batch, level)):
        row = []
        for t, ratio in enumerate(ratios):
            d = batch.ref[i][t] - batch.new[i][t]
            policy = clipped_objective(ratio, batch.advantages[i], low, high)
            row.append(policy + beta * (math.exp(d) - d - 1))
        rows.append(row)

    new, old, mask = batch.tensor(batch.new), batch.tensor(batch.old), batch.mask
    ratio = policy_ratio(new, old, mask, level)
    loss, _ = clipped_policy_loss(ratio, batch.token_advantages, low, high, None)
    loss = loss + beta * kl_k3(new, batch.tensor(batch.ref))
    total = aggregate(loss, mask, how, denominator(mask, how, WIDTH))
    assert total.item() == pytest.approx(reduce(rows), rel=REL)


def test_gspo_gradient_is_that_of_its_token_form(batch: Batch) -> None:
    # verl and TRL write s_{i,t} = sg(s_i) * pi / sg(pi); with one advantage for all tokens the
    # gradient is that of the plain s_i (GSPO, section 4.3).
    new = batch.tensor(batch.new).requires_grad_()
    old, mask = batch.tensor(batch.old), batch.mask
    log_s = masked_mean(new - old, mask, dim=1).detach()[:, None]
    token_form = (log_s + new - new.detach()).exp()
    gradients = []
    for ratio in (policy_ratio(new, old, mask, "sequence_mean"), token_form):
        loss, _ = clipped_policy_loss(ratio, batch.token_advantages, 0.1, 0.1, None)
        total = aggregate(loss, mask, "sequence_mean", denominator(mask, "sequence_mean"))
        gradients.append(torch.autograd.grad(total, new)[0])
    torch.testing.assert_close(*gradients, rtol=REL, atol=1e-12)


def test_verl_dual_clip(batch: Batch) -> None:
    dual = 1.05  # verl: clip_ratio_c, 3.0 by default; low here, so that it binds
    rows = [
        [
            min(clipped_objective(ratio, a, 0.2, 0.2), -dual * a)
            if a < 0
            else clipped_objective(ratio, a, 0.2, 0.2)
            for ratio in ratios
        ]
        for a, ratios in zip(batch.advantages, ratio_rows(batch, "token"), strict=True)
    ]
    ratio = policy_ratio(batch.tensor(batch.new), batch.tensor(batch.old), batch.mask, "token")
    loss, _ = clipped_policy_loss(ratio, batch.token_advantages, 0.2, 0.2, dual)
    total = aggregate(loss, batch.mask, "token_mean", denominator(batch.mask, "token_mean"))
    assert total.item() == pytest.approx(token_mean(rows), rel=REL)


def test_cispo(batch: Batch) -> None:
    # TRL clamps at epsilon_high itself, the paper and verl at 1 + epsilon_high. verl's lower bound
    # is out of reach with the paper's large epsilon_low.
    trl_epsilon_high = 1.2
    rows = [
        [-min(r, trl_epsilon_high) * a * lp for r, lp in zip(ratios, logprobs, strict=True)]
        for a, ratios, logprobs in zip(
            batch.advantages, ratio_rows(batch, "token"), batch.new, strict=True
        )
    ]
    new, mask = batch.tensor(batch.new), batch.mask
    ratio = policy_ratio(new, batch.tensor(batch.old), mask, "token")
    loss, _ = cispo_loss(ratio, new, batch.token_advantages, clip_high=trl_epsilon_high - 1)
    total = aggregate(loss, mask, "token_mean", denominator(mask, "token_mean"))
    assert total.item() == pytest.approx(token_mean(rows), rel=REL)


# PPO


def test_ppo_rewards_gae_whitening_and_value_loss(batch: Batch) -> None:
    # TRL's PPOTrainer: non-score reward -kl_coef * k1, the score on the last token, GAE, returns
    # from unwhitened advantages, whitening over the batch; clipped value loss.
    kl_coef, lam, clip = 0.05, 0.95, 0.2
    all_advantages, all_returns = [], []
    for i, length in enumerate(batch.lengths):
        rewards = [-kl_coef * (batch.old[i][t] - batch.ref[i][t]) for t in range(length)]
        rewards[-1] += batch.rewards[i]
        last, reversed_advantages = 0.0, []
        for t in reversed(range(length)):
            next_value = batch.old_values[i][t + 1] if t < length - 1 else 0.0
            delta = rewards[t] + next_value - batch.old_values[i][t]
            last = delta + lam * last
            reversed_advantages.append(last)
        row = reversed_advantages[::-1]
        all_advantages.append(row)
        all_returns.append([a + v for a, v in zip(row, batch.old_values[i], strict=True)])
    flat = [a for row in all_advantages for a in row]
    mean, std = statistics.fmean(flat), math.sqrt(statistics.variance(flat) + 1e-8)
    whitened = [[(a - mean) / std for a in row] for row in all_advantages]
    value_rows = []
    for i in range(len(batch.lengths)):
        row = []
        for v, old_v, ret in zip(batch.values[i], batch.old_values[i], all_returns[i], strict=True):
            held = min(max(v, old_v - clip), old_v + clip)
            row.append(0.5 * max((v - ret) ** 2, (held - ret) ** 2))
        value_rows.append(row)

    mask, old_values = batch.mask, batch.tensor(batch.old_values)
    kl = batch.tensor(batch.old) - batch.tensor(batch.ref)
    scores = torch.tensor(batch.rewards, dtype=torch.float64)
    advantages, returns = gae(token_rewards(scores, kl, mask, kl_coef), old_values, mask, lam=lam)
    got = masked_whiten(advantages, mask)
    for i, length in enumerate(batch.lengths):
        assert returns[i, :length].tolist() == pytest.approx(all_returns[i], rel=REL)
        assert got[i, :length].tolist() == pytest.approx(whitened[i], rel=REL)
    loss, _ = value_loss(batch.tensor(batch.values), old_values, returns, clip)
    total = aggregate(loss, mask, "token_mean", denominator(mask, "token_mean"))
    assert total.item() == pytest.approx(token_mean(value_rows), rel=REL)


# Preferences


def log_sigmoid(x: float) -> float:
    return min(x, 0.0) - math.log1p(math.exp(-abs(x)))


@pytest.mark.parametrize(
    ("kind", "smoothing", "loss"),
    [
        ("sigmoid", 0.0, lambda h, b: -log_sigmoid(b * h)),
        ("sigmoid", 0.1, lambda h, b: -0.9 * log_sigmoid(b * h) - 0.1 * log_sigmoid(-b * h)),
        ("hinge", 0.0, lambda h, b: max(0.0, 1 - b * h)),
        ("ipo", 0.0, lambda h, b: (h - 1 / (2 * b)) ** 2),
    ],
)
@pytest.mark.parametrize("length_normalized", [False, True])
def test_dpo_family(
    batch: Batch,
    kind: str,
    smoothing: float,
    loss: Callable[[float, float], float],
    length_normalized: bool,
) -> None:
    # Odd rows are rejected. TRL takes means over tokens for IPO and the length-normalised form.
    def total(row: list[float]) -> float:
        return statistics.fmean(row) if length_normalized else math.fsum(row)

    pairs = [(i, i + 1) for i in range(0, len(batch.new), 2)]
    sides = [
        [total(rows[pair[side]]) for pair in pairs]
        for rows in (batch.new, batch.ref)
        for side in (0, 1)
    ]
    chosen, rejected, ref_chosen, ref_rejected = sides
    beta = 0.1
    expected = [
        loss((c - rc) - (r - rr), beta)
        for c, r, rc, rr in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True)
    ]
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        *(torch.tensor(side, dtype=torch.float64) for side in sides),
        beta,
        kind,  # type: ignore[arg-type]
        smoothing,
    )
    assert losses.tolist() == pytest.approx(expected, rel=REL)
    assert chosen_rewards.tolist() == pytest.approx(
        [beta * (c - rc) for c, rc in zip(chosen, ref_chosen, strict=True)], rel=REL
    )
    assert rejected_rewards.tolist() == pytest.approx(
        [beta * (r - rr) for r, rr in zip(rejected, ref_rejected, strict=True)], rel=REL
    )


def test_reward_model_with_margin_and_centering(batch: Batch) -> None:
    # TRL's RewardTrainer: mean of the log-sigmoids, plus the coefficient times the mean square
    chosen, rejected = batch.rewards[0::2], batch.rewards[1::2]
    margin = [abs(a) for a in batch.advantages[0::2]]
    centering = 0.01
    expected = statistics.fmean(
        -log_sigmoid(c - r - m) for c, r, m in zip(chosen, rejected, margin, strict=True)
    ) + centering * statistics.fmean((c + r) ** 2 for c, r in zip(chosen, rejected, strict=True))
    losses = bradley_terry_loss(
        *(torch.tensor(side, dtype=torch.float64) for side in (chosen, rejected, margin)),
        centering=centering,
    )
    assert losses.mean().item() == pytest.approx(expected, rel=REL)
