"""The pages of the algorithms, on tensors that fit on a napkin."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from schemas.rl import DPOConfig, GRPOConfig, PPOConfig, RLOOConfig
from schemas.training import OptimizerConfig
from stages.forward import Sequences
from stages.rewards.composition import RewardBreakdown
from stages.rl import dpo, grpo, ppo, rloo
from stages.rl.experience import Experience, TrainBatch
from stages.rollout.types import Rollout

OPTIMIZER = OptimizerConfig(learning_rate=1e-3)


def experience(
    scores: list[float],
    lengths: list[int],
    *,
    groups: list[int] | None = None,
    steps: tuple[list[list[float]], list[list[int]]] | None = None,
    kl: float = 0.0,
    values: Tensor | None = None,
) -> Experience:
    """Rollouts with given scores and lengths; every token's k1 KL is `kl`."""
    groups = groups or [0] * len(scores)
    rollouts = [
        Rollout([1], [2] * n, [-1.0] * n, "stop", 0, g)
        for n, g in zip(lengths, groups, strict=True)
    ]
    width = max(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    score = torch.tensor(scores)
    rewards = RewardBreakdown(score, score, {"verifier": score})
    if steps is not None:
        step_rewards = [torch.tensor(own) for own in steps[0]]
        ends = [torch.tensor(own) for own in steps[1]]
        total = score + torch.stack([own.min() for own in step_rewards])
        rewards = RewardBreakdown(
            score, total, {"verifier": score}, ends, step_rewards, step_rewards
        )
    old = torch.full(mask.shape, -1.0)
    return Experience(
        rollouts=rollouts,
        sequences=Sequences([r.prompt_ids for r in rollouts], [r.completion_ids for r in rollouts]),
        rewards=rewards,
        group_ids=torch.tensor(groups),
        completion_mask=mask,
        rollout_logprobs=old,
        old_logprobs=old,
        ref_logprobs=old - kl,
        values=values,
        values_after=None if values is None else torch.full((len(scores),), 5.0),
    )


def test_grpo_gives_every_token_the_group_z_score() -> None:
    # Rewards 1, 0: mean .5, sample deviation sqrt(.5) = .70711; .5 / (.70711 + 1e-4) = .70701.
    credit = grpo.credit(experience([1.0, 0.0], [2, 3]), GRPOConfig(optimizer=OPTIMIZER))
    z = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert credit.advantages.tolist() == [
        pytest.approx([z, z, 0.0]),
        pytest.approx([-z, -z, -z]),
    ]


def test_grpo_with_step_rewards_adds_the_steps_to_come() -> None:
    # Scores are equal, so only steps count. Step rewards of the group: 1, 0, 1, 1; mean .75,
    # deviations .25, -.75, .25, .25, sample deviation sqrt(.75 / 3) = .5.
    # Normalised (eps 0): .5, -1.5 | .5, .5. Sums from here on: [-1, -1.5] | [1, .5].
    found = experience([1.0, 1.0], [3, 3], steps=([[1.0, 0.0], [1.0, 1.0]], [[0, 2], [1, 2]]))
    credit = grpo.credit(found, GRPOConfig(optimizer=OPTIMIZER, eps=0.0))
    assert credit.advantages.tolist() == [
        pytest.approx([-1.0, -1.5, -1.5]),
        pytest.approx([1.0, 1.0, 0.5]),
    ]


def test_grpo_kl_in_the_reward() -> None:
    # 2 and 4 tokens of KL .1: rewards 1 - .5 * .2 = .9 and 0 - .5 * .4 = -.2.
    config = GRPOConfig(optimizer=OPTIMIZER, kl_coef=0.5, kl_in="reward", scale="none")
    credit = grpo.credit(experience([1.0, 0.0], [2, 4], kl=0.1), config)
    assert credit.advantages[0, 0].item() == pytest.approx(0.55)
    assert credit.advantages[1, 0].item() == pytest.approx(-0.55)


def batch(advantage: float, logprob_change: float, ref_change: float = 0.0) -> TrainBatch:
    old = torch.tensor([[-1.0]])
    return TrainBatch(
        advantages=torch.tensor([[advantage]]),
        completion_mask=torch.tensor([[True]]),
        old_logprobs=old,
        rollout_logprobs=old,
        ref_logprobs=old + ref_change,
        returns=torch.tensor([[2.0]]),
        old_values=torch.tensor([[0.0]]),
    )


def test_grpo_clips_higher_than_lower() -> None:
    config = GRPOConfig(optimizer=OPTIMIZER, clip_low=0.2, clip_high=0.28)
    up = torch.tensor([[-1.0 + math.log(1.5)]])
    assert grpo.loss(up, batch(1.0, 0.0), config).per_token.item() == pytest.approx(-1.28)
    assert grpo.loss(up, batch(1.0, 0.0), config).clipped.item()
    down = torch.tensor([[-1.0 + math.log(0.5)]])
    assert grpo.loss(down, batch(-1.0, 0.0), config).per_token.item() == pytest.approx(0.8)


def test_grpo_kl_in_the_loss_is_k3() -> None:
    # Ratio 1, advantage 0: the loss is the KL alone. d = .3: exp(.3) - 1 - .3 = .0498588.
    config = GRPOConfig(optimizer=OPTIMIZER, kl_coef=2.0)
    found = grpo.loss(torch.tensor([[-1.0]]), batch(0.0, 0.0, ref_change=0.3), config)
    assert found.per_token.item() == pytest.approx(2 * 0.0498588, rel=1e-5)


def test_rloo_leaves_one_out_and_takes_the_aggregate_of_steps() -> None:
    # Totals: score + smallest step reward = 1 + .5, 0 + 0, 1 + 1; less the mean of the others:
    # 1.5 - 1 = .5; 0 - 1.75; 2 - .75.
    found = experience(
        [1.0, 0.0, 1.0], [2, 2, 2], steps=([[0.5, 1.0], [0.0], [1.0]], [[0, 1], [1], [1]])
    )
    credit = rloo.credit(found, RLOOConfig(optimizer=OPTIMIZER, kl_coef=0.0))
    assert credit.advantages[:, 0].tolist() == pytest.approx([0.5, -1.75, 1.25])
    assert credit.advantages[:, 1].tolist() == pytest.approx([0.5, -1.75, 1.25])


def ppo_config(**changes: object) -> PPOConfig:
    values: dict[str, object] = {
        "optimizer": OPTIMIZER,
        "critic_optimizer": OPTIMIZER,
        "credit": "token",
        "whiten_advantages": False,
        "kl_coef": 0.0,
        "gae_lambda": 1.0,
        **changes,
    }
    return PPOConfig.model_validate(values)


def test_ppo_token_credit_is_the_surprise() -> None:
    # Score 1 at the end, values .25, .5: deltas .25 and .5; lambda 1: advantages .75, .5.
    found = experience([1.0, 0.0], [2, 1], values=torch.tensor([[0.25, 0.5], [0.25, 0.0]]))
    config = ppo_config()
    credit = ppo.credit(found, config, ppo.PPOState.create(config), 0)
    assert credit.advantages.tolist() == [[0.75, 0.5], [-0.25, 0.0]]
    assert credit.returns is not None
    assert credit.returns.tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_ppo_response_credit_is_the_score_less_the_others() -> None:
    found = experience([1.0, 0.0], [2, 1], values=torch.tensor([[0.25, 0.5], [0.25, 0.0]]))
    config = ppo_config(credit="response")
    credit = ppo.credit(found, config, ppo.PPOState.create(config), 0)
    assert credit.advantages.tolist() == [[1.0, 1.0], [-1.0, 0.0]]


def test_ppo_auto_follows_the_critic_and_writes_it_down() -> None:
    config = ppo_config(credit="auto", critic_min_explained_variance=0.5)
    state = ppo.PPOState.create(config)
    blind = experience([1.0, 0.0], [2, 2], values=torch.zeros(2, 2))
    seeing = experience([1.0, 0.0], [2, 2], values=torch.tensor([[1.0, 1.0], [0.0, 0.0]]))
    modes = []
    for step, found in enumerate([blind, blind, seeing, blind]):
        modes.append(ppo.credit(found, config, state, step).mode)
    assert modes == ["response", "response", "token", "response"]
    assert [(s["step"], s["mode"]) for s in state.switches] == [
        (0, "response"),
        (2, "token"),
        (3, "response"),
    ]
    assert state.switches[0]["why"] == "explained variance 0.000 is not above 0.5"
    restored = ppo.PPOState.create(config)
    restored.load_state_dict(state.state_dict())
    assert restored == state


def test_ppo_bootstraps_only_what_was_cut() -> None:
    found = experience([0.0, 0.0], [1, 1], values=torch.zeros(2, 1))
    cut = Rollout([1], [2], [-1.0], "length", 0, 0)
    object.__setattr__(found, "rollouts", [cut, found.rollouts[1]])
    config = ppo_config(bootstrap_truncated=True)
    credit = ppo.credit(found, config, ppo.PPOState.create(config), 0)
    # The value after the last token is 5 for both; only the first completion was cut.
    assert credit.advantages.tolist() == [[5.0], [0.0]]


def test_ppo_adaptive_kl() -> None:
    config = ppo_config(kl_coef=0.1, kl_target=1.0, kl_horizon=10)
    state = ppo.PPOState.create(config)
    found = experience([1.0, 0.0], [2, 2], values=torch.zeros(2, 2), kl=1.0)
    ppo.credit(found, config, state, 0)
    # Sequence KL 2, target 1: the error is cut at .2; 2 completions of a horizon of 10.
    assert state.kl_controller.value == pytest.approx(0.1 * (1 + 0.2 * 2 / 10))


def test_dpo_loss_and_margin() -> None:
    # h = (-1 + 2) - (-3 + 2) = 2, beta .5: -log sigmoid(1) = .313262; margin .5 * 2 = 1.
    policy = dpo.PairLogprobs(torch.tensor([-1.0]), torch.tensor([-3.0]))
    reference = dpo.PairLogprobs(torch.tensor([-2.0]), torch.tensor([-2.0]))
    config = DPOConfig(optimizer=OPTIMIZER, beta=0.5, nll_coef=0.1, max_length=8)
    losses, margins = dpo.loss(policy, reference, torch.tensor([2.0]), config)
    assert losses.item() == pytest.approx(0.313262 + 0.2, rel=1e-5)
    assert margins.item() == pytest.approx(1.0)
