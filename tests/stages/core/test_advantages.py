import math
import random
import statistics
from typing import Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.core.advantages import (
    explained_variance,
    gae,
    group_normalized,
    leave_one_out,
    process_supervised,
    response_level,
    token_rewards,
)

NAN = math.nan
rewards_strategy = st.lists(
    st.lists(st.floats(-10, 10, allow_subnormal=False), min_size=2, max_size=5),
    min_size=1,
    max_size=4,
)


def f64(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def flatten(groups: list[list[float]]) -> tuple[Tensor, Tensor, list[tuple[int, int]]]:
    """Rewards and ids of groups, shuffled: nothing may depend on the order of responses."""
    places = [(g, i) for g, group in enumerate(groups) for i in range(len(group))]
    random.Random(0).shuffle(places)
    rewards = f64(*[groups[g][i] for g, i in places])
    return rewards, torch.tensor([10 * g + 3 for g, _ in places]), places


# group_normalized


def test_group_normalized_by_hand() -> None:
    # Group 5: 1, 2, 3: mean 2, sample std 1. Group 2: 0, 4: mean 2, std sqrt(8).
    rewards, ids = f64(1, 0, 2, 4, 3), torch.tensor([5, 2, 5, 2, 5])
    advantages, zero_variance = group_normalized(rewards, ids, eps=0.0)
    root = math.sqrt(0.5)
    assert advantages.tolist() == pytest.approx([-1, -root, 0, root, 1])
    assert zero_variance.tolist() == [False, False]
    advantages, _ = group_normalized(rewards, ids, scale="none")
    assert advantages.tolist() == [-1, -2, 0, 2, 1]
    # all five: mean 2, squares 1 + 4 + 0 + 4 + 1 = 10, std sqrt(10 / 4)
    advantages, _ = group_normalized(rewards, ids, scale="batch", eps=0.5)
    std = math.sqrt(2.5) + 0.5
    assert advantages.tolist() == pytest.approx([-1 / std, -2 / std, 0, 2 / std, 1 / std])


@given(rewards_strategy)
def test_group_normalized_against_the_loop(groups: list[list[float]]) -> None:
    rewards, ids, places = flatten(groups)
    advantages, zero_variance = group_normalized(rewards, ids)
    expected = []
    for g, i in places:
        group = groups[g]
        deviation = group[i] - statistics.fmean(group)
        expected.append(deviation / (statistics.stdev(group) + 1e-4))
    assert advantages.tolist() == pytest.approx(expected, abs=1e-6)
    assert zero_variance.tolist() == [max(group) == min(group) for group in groups]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_group_without_variance_is_exactly_zero(scale: str) -> None:
    # the mean of eight float32 0.1s is not 0.1; divided by eps the difference would be a signal
    rewards, ids = torch.tensor([0.1] * 8 + [0.0, 1.0]), torch.tensor([0] * 8 + [1] * 2)
    advantages, zero_variance = group_normalized(rewards, ids, scale, eps=1e-12)  # type: ignore[arg-type]
    assert advantages[:8].tolist() == [0.0] * 8
    assert (advantages[8:] != 0).all()
    assert zero_variance.tolist() == [True, False]


def test_batch_scale_of_a_batch_without_variance() -> None:
    advantages, _ = group_normalized(torch.full((16,), 0.1), torch.arange(16) // 8, "batch")
    assert advantages.tolist() == [0.0] * 16


def test_groups_do_not_see_each_other() -> None:
    # Rank split: a rank with whole groups gives what the whole batch gives.
    rewards, ids = torch.randn(8, dtype=torch.float64), torch.tensor([0, 0, 1, 1, 2, 2, 3, 3])
    for function in (lambda r, i: group_normalized(r, i)[0], leave_one_out):
        whole = function(rewards, ids)
        parts = [function(rewards[:4], ids[:4]), function(rewards[4:], ids[4:])]
        torch.testing.assert_close(torch.cat(parts), whole)


def test_group_of_one_is_refused_with_the_remedy() -> None:
    rewards, ids = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4, 4, 9])
    steps = [torch.tensor([1.0])] * 3
    ends = [torch.tensor([0])] * 3
    for call in (
        lambda: group_normalized(rewards, ids),
        lambda: group_normalized(rewards, ids, "batch"),
        lambda: group_normalized(rewards, ids, "none"),
        lambda: leave_one_out(rewards, ids),
        lambda: process_supervised(steps, ends, ids, 1),
    ):
        with pytest.raises(
            ValueError, match=r"^group 9 has one response.*nothing to be.*group_size >= 2\)$"
        ):
            call()


# leave_one_out, response_level


def test_leave_one_out_by_hand() -> None:
    # 1 - (2 + 6) / 2 = -3, 2 - 3.5 = -1.5, 6 - 1.5 = 4.5; group of two: 5 - 3 and 3 - 5
    rewards, ids = f64(1, 5, 2, 3, 6), torch.tensor([0, 1, 0, 1, 0])
    assert leave_one_out(rewards, ids).tolist() == pytest.approx([-3, 2, -1.5, -2, 4.5])


@given(rewards_strategy)
def test_leave_one_out_against_the_loop(groups: list[list[float]]) -> None:
    rewards, ids, places = flatten(groups)
    expected = [
        groups[g][i] - statistics.fmean(groups[g][:i] + groups[g][i + 1 :]) for g, i in places
    ]
    assert leave_one_out(rewards, ids).tolist() == pytest.approx(expected, abs=1e-9)
    assert response_level(rewards, ids).tolist() == pytest.approx(expected, abs=1e-9)


def test_leave_one_out_without_variance_is_exactly_zero() -> None:
    rewards = torch.full((8,), 0.1)
    assert leave_one_out(rewards, torch.zeros(8, dtype=torch.long)).tolist() == [0.0] * 8


def test_response_level_with_one_response_a_prompt() -> None:
    # batch mean (1 + 2 + 6) / 3 = 3
    assert response_level(f64(1, 2, 6), None).tolist() == [-2, -1, 3]
    assert response_level(f64(1, 2, 6), torch.tensor([7, 8, 9])).tolist() == [-2, -1, 3]


def test_response_level_mixed() -> None:
    # group 1 is 1 and 3: 1 - 3 and 3 - 1. Group 2 is alone: 8 less the batch mean of 4.
    scores, ids = f64(1, 8, 3), torch.tensor([1, 2, 1])
    assert response_level(scores, ids).tolist() == [-2, 4, 2]


def test_response_level_of_one_response_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^response-level credit .* got one$"):
        response_level(torch.tensor([1.0]), None)


# process_supervised


def test_process_supervised_by_hand() -> None:
    # Step rewards 0, 2 | 4 of one group: mean 2, sample std 2: -1, 0 | 1. The first response's
    # steps end at its first token and at token 2 (token 3, say EOS, follows the last step); the
    # second's only step ends at its last token.
    advantages = process_supervised(
        [f64(0, 2), f64(4)],
        [torch.tensor([0, 2]), torch.tensor([1])],
        torch.tensor([0, 0]),
        width=4,
        eps=0.0,
    )
    assert advantages.tolist() == [[-1, 0, 0, 0], [1, 1, 0, 0]]


@given(st.integers(0, 10_000))
def test_process_supervised_against_the_paper(seed: int) -> None:
    # DeepSeekMath 4.1.3, word for word, over random steps; responses without steps included.
    draw = random.Random(seed)
    width, num_responses = 6, 6
    ids = [0, 0, 1, 1, 1, 0]
    rewards, ends = [], []
    for _ in range(num_responses):
        row_ends = sorted(draw.sample(range(width), draw.randint(0, 3)))
        ends.append(row_ends)
        rewards.append([draw.choice([0.0, 0.25, 1.0]) for _ in row_ends])
    expected = [[0.0] * width for _ in ids]
    for i, group in enumerate(ids):
        pool = [r for j in range(num_responses) if ids[j] == group for r in rewards[j]]
        if len(set(pool)) < 2:
            continue
        mean, std = statistics.fmean(pool), statistics.stdev(pool)
        for t in range(width):
            expected[i][t] = sum(
                (r - mean) / (std + 1e-4)
                for r, end in zip(rewards[i], ends[i], strict=True)
                if end >= t
            )
    advantages = process_supervised(
        [torch.tensor(r, dtype=torch.float64) for r in rewards],
        [torch.tensor(e, dtype=torch.long) for e in ends],
        torch.tensor(ids),
        width,
    )
    for row, want in zip(advantages.tolist(), expected, strict=True):
        assert row == pytest.approx(want, abs=1e-9)


def test_process_supervised_without_variance_without_steps_and_with_one_step() -> None:
    def credit(rewards: list[list[float]], ends: list[list[int]]) -> list[list[float]]:
        return process_supervised(
            [torch.tensor(r) for r in rewards],
            [torch.tensor(e, dtype=torch.long) for e in ends],
            torch.zeros(len(rewards), dtype=torch.long),
            width=2,
            eps=1e-12,
        ).tolist()

    nothing = [[0.0, 0.0], [0.0, 0.0]]
    assert credit([[0.1] * 4] * 2, [[0, 0, 1, 1]] * 2) == nothing
    assert credit([[], []], [[], []]) == nothing
    assert credit([[], [0.7]], [[], [1]]) == nothing


# token_rewards


def test_token_rewards_by_hand() -> None:
    scores = f64(10, 20, 30)
    kl = f64([1, 2, NAN, NAN], [1, NAN, 3, NAN], [NAN] * 4)
    # padded; a masked token inside; fully masked (an empty completion)
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    rewards = token_rewards(scores, kl, mask, kl_coef=0.5)
    assert rewards.tolist() == [[-0.5, 9, 0, 0], [-0.5, 0, 18.5, 0], [0, 0, 0, 0]]


def test_token_rewards_of_a_cut_and_of_a_one_token_completion() -> None:
    rewards = token_rewards(f64(5, 7), f64([1, 1], [1, 1]), torch.tensor([[1, 1], [1, 0]]), 1.0)
    assert rewards.tolist() == [[-1, 4], [6, 0]]


def test_step_rewards_land_on_trained_tokens() -> None:
    # Steps end at the first and the last token; one on a masked token (tool output) goes to the
    # trained token before it; before the first trained token there is no action to reward.
    step_rewards = f64([1, 0, 2], [0, 4, 8], [16, 32, 0], [64, 64, 64])
    mask = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]])
    rewards = token_rewards(f64(0, 0, 0, 0), torch.zeros(4, 3), mask, 0.1, step_rewards)
    assert rewards.tolist() == [[1, 0, 2], [4, 0, 8], [0, 32, 0], [0, 0, 0]]


def test_token_rewards_have_the_number_format_of_the_kl() -> None:
    kl = torch.zeros(1, 2)
    rewards = token_rewards(f64(5), kl, torch.ones(1, 2), 0.1, f64([1, 0]))
    assert rewards.dtype == torch.float32
    assert rewards.tolist() == [[1, 5]]


def test_results_are_where_the_inputs_are() -> None:
    # A tensor made without a device would land on the default one; "meta" holds no numbers.
    scores, mask, groups = f64(1, 2), torch.ones(2, 2), torch.tensor([0, 0])
    steps, ends = [f64(0), f64(2)], [torch.tensor([0]), torch.tensor([1])]
    with torch.device("meta"):
        rewards = token_rewards(scores, mask, mask, 0.5, mask)
        advantages = process_supervised(steps, ends, groups, 2, eps=0.0)
    # -0.5 for the KL, 1 for the step, and the score on the last token
    assert rewards.tolist() == [[0.5, 1.5], [0.5, 2.5]]
    root = math.sqrt(0.5)  # deviations -1 and 1 over the sample std sqrt(2)
    torch.testing.assert_close(advantages, f64([-root, 0], [root, root]))


def test_token_rewards_of_no_tokens() -> None:
    empty = torch.zeros(2, 0)
    assert token_rewards(f64(1, 2), empty, empty, 0.1, empty).shape == (2, 0)
    advantages, returns = gae(empty, empty, empty)
    assert advantages.shape == returns.shape == (2, 0)


# gae


def gae_by_loop(
    rewards: list[float], values: list[float], gamma: float, lam: float, after: float
) -> list[float]:
    """Equation 16 as it is written: A_t = sum_l (gamma lam)^l delta_{t+l}."""
    values = [*values, after]
    deltas = [r + gamma * values[t + 1] - values[t] for t, r in enumerate(rewards)]
    return [
        sum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


def test_gae_by_hand() -> None:
    # gamma 0.5, lam 0.5: delta_1 = 4 - 2 = 2; delta_0 = 1 + 0.5 * 2 - 1 = 1, A_0 = 1 + 0.25 * 2
    advantages, returns = gae(f64([1, 4]), f64([1, 2]), torch.ones(1, 2), gamma=0.5, lam=0.5)
    assert advantages.tolist() == [[1.5, 2.0]]
    assert returns.tolist() == [[2.5, 4.0]]


def test_gae_without_settings_is_that_of_the_papers() -> None:
    # gamma 1, lambda 0.95: delta = 1, 2, so A_0 = 1 + 0.95 * 2
    advantages, _ = gae(f64([1, 2]), f64([0, 0]), torch.ones(1, 2))
    assert advantages.tolist() == [[pytest.approx(2.9), 2.0]]


def test_gae_takes_a_bootstrap_value_in_half_precision() -> None:
    # gamma * V must not be rounded to bfloat16, in which 0.9 is 0.8984
    zero = torch.zeros(1, 1)
    after = torch.ones(1, dtype=torch.bfloat16)
    advantages, _ = gae(zero, zero, torch.ones(1, 1), gamma=0.9, bootstrap_values=after)
    assert advantages.item() == pytest.approx(0.9, rel=1e-6)


@given(
    st.lists(st.booleans(), min_size=1, max_size=8),
    st.integers(0, 1000),
    st.sampled_from([0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
    st.sampled_from([None, 3.0]),
)
def test_gae_with_masked_tokens_is_gae_without_them(
    valid: list[bool], seed: int, gamma: float, lam: float, bootstrap: float | None
) -> None:
    # Whatever is masked, at the start, inside or at the end, and whatever lies there (NaN).
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(1, len(valid), generator=generator, dtype=torch.float64)
    values = torch.randn(1, len(valid), generator=generator, dtype=torch.float64)
    mask = torch.tensor([valid])
    expected = gae_by_loop(
        rewards[mask].tolist(), values[mask].tolist(), gamma, lam, bootstrap or 0.0
    )
    after = None if bootstrap is None else f64(bootstrap)
    advantages, returns = gae(
        rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), mask, gamma, lam, after
    )
    assert advantages[mask].tolist() == pytest.approx(expected, abs=1e-12)
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()
    torch.testing.assert_close(returns[mask], (advantages + values)[mask])


def test_gae_with_lambda_one_and_no_critic_is_the_reward_to_go() -> None:
    advantages, _ = gae(f64([1, 2, 3]), f64([0, 0, 0]), torch.ones(1, 3), 1.0, 1.0)
    assert advantages.tolist() == [[6, 5, 3]]


def test_gae_bootstraps_only_the_rows_that_were_cut() -> None:
    rewards, values, mask = f64([1, 0], [1, 0]), f64([0, 0], [0, 0]), torch.tensor([[1, 0], [1, 0]])
    advantages, _ = gae(rewards, values, mask, bootstrap_values=f64(0, 5))
    assert advantages.tolist() == [[1, 0], [6, 0]]


def test_gae_does_not_see_padding_or_other_rows() -> None:
    rewards, values = torch.randn(4, 5), torch.randn(4, 5)
    mask = torch.tensor([[1, 1, 1, 0, 0]] * 4)
    whole = gae(rewards, values, mask)
    for rows in (slice(0, 2), slice(2, 4)):  # micro-batch split, and no padding
        part = gae(rewards[rows, :3], values[rows, :3], mask[rows, :3])
        for got, want in zip(part, whole, strict=True):
            assert torch.equal(got, want[rows, :3])


def test_float32_stays_float32_and_half_is_upcast() -> None:
    row = torch.ones(1, 2, dtype=torch.bfloat16)
    assert gae(row, row, row)[0].dtype == torch.float32
    assert (
        gae(row.double(), row.double(), row, bootstrap_values=row[:, 0])[0].dtype == torch.float64
    )


# explained_variance


def test_explained_variance_by_hand() -> None:
    # returns 0, 2, 4 (variance 8/3); residuals 0, 1, -1 (variance 2/3): 1 - 1/4
    returns, values = f64([0, 2, 4, NAN]), f64([0, 1, 5, 99])
    mask = torch.tensor([[1, 1, 1, 0]])
    assert explained_variance(values, returns, mask) == pytest.approx(0.75)
    assert explained_variance(returns, returns, mask) == 1.0
    # A constant critic explains nothing, however far off; a bad one less than nothing.
    assert explained_variance(torch.full((1, 4), 9.0), returns, mask) == pytest.approx(0.0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3.0)
    # Two tokens are enough: returns 0, 2 (variance 1), residuals 0, 1 (variance 1/4)
    two = torch.tensor([[1, 1, 0, 0]])
    assert explained_variance(values, returns, two) == pytest.approx(0.75)


@pytest.mark.parametrize("mask", [[1, 1, 0], [1, 0, 0], [0, 0, 0]])
def test_explained_variance_with_nothing_to_explain(mask: list[int]) -> None:
    assert explained_variance(torch.randn(1, 3), f64([0.1, 0.1, 5]), torch.tensor([mask])) == 0.0


def test_unknown_scale_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="'prompt'"):
        group_normalized(torch.ones(2), torch.zeros(2), "prompt")  # type: ignore[arg-type]


@pytest.mark.parametrize("scale", ["group", "batch"])
def test_no_variance_and_no_eps_is_still_zero(scale: Literal["group", "batch"]) -> None:
    rewards, groups = torch.tensor([1.0, 1.0]), torch.tensor([0, 0])
    assert group_normalized(rewards, groups, scale, eps=0.0)[0].tolist() == [0.0, 0.0]
    steps = [torch.tensor([0.5]), torch.tensor([0.5])]
    ends = [torch.tensor([0]), torch.tensor([1])]
    assert process_supervised(steps, ends, groups, 2, eps=0.0).tolist() == [[0.0, 0.0]] * 2
