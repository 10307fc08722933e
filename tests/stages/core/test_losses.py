import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.core.losses import (
    MAX_LOG_RATIO,
    bradley_terry_loss,
    cispo_loss,
    clipped_policy_loss,
    dpo_loss,
    mismatch_kl,
    mismatch_weights,
    policy_ratio,
    step_cross_entropy,
    value_loss,
)

NAN, INF = math.nan, math.inf


def f64(*rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


# policy_ratio


def test_ratio_at_each_level_by_hand() -> None:
    # ratios 2 and 8 (the 5 is masked): product 16, geometric mean 4; one token; empty completion
    log_ratio = f64([2, 5, 8], [3, NAN, NAN], [NAN, NAN, NAN]).log()
    old = f64([-1, -2, -3], [-4, 0, 0], [0, 0, 0])
    mask = torch.tensor([[1, 0, 1], [1, 0, 0], [0, 0, 0]])
    for level, expected in (
        ("token", [[2, 1, 8], [3, 1, 1], [1, 1, 1]]),
        ("sequence", [[16, 1, 16], [3, 1, 1], [1, 1, 1]]),
        ("sequence_mean", [[4, 1, 4], [3, 1, 1], [1, 1, 1]]),
    ):
        ratio = policy_ratio(old + log_ratio, old, mask, level)  # type: ignore[arg-type]
        torch.testing.assert_close(ratio, torch.tensor(expected, dtype=torch.float64))


def test_ratio_is_bounded_on_both_sides() -> None:
    ratio = policy_ratio(f64([30, -30]), f64([0, 0]), torch.ones(1, 2), "token")
    assert ratio.tolist()[0] == pytest.approx([math.exp(20), math.exp(-20)])


@pytest.mark.parametrize("level", ["token", "sequence", "sequence_mean"])
def test_ratio_of_a_far_policy_keeps_loss_and_gradient_finite(level: str) -> None:
    # exp(200) is infinite in float32, and 0 * inf in the gradient of the clip would be NaN.
    logprobs = torch.zeros(1, 2, requires_grad=True)
    ratio = policy_ratio(logprobs, torch.full((1, 2), -200.0), torch.ones(1, 2), level)  # type: ignore[arg-type]
    assert ratio.max().item() == pytest.approx(math.exp(MAX_LOG_RATIO), rel=1e-6)
    for advantage in (1.0, -1.0):
        loss, _ = clipped_policy_loss(ratio, torch.full((1, 2), advantage), 0.2, 0.2, None)
        (gradient,) = torch.autograd.grad(loss.sum(), logprobs, retain_graph=True)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()


def test_sequence_ratio_gradient_is_shared_by_its_tokens() -> None:
    # d/d logprob_t of s = exp(mean of log-ratios) is s / |y| for each token, 0 for a masked one
    logprobs = f64([0.3, 0.1, NAN]).requires_grad_()
    mask = torch.tensor([[1, 1, 0]])
    ratio = policy_ratio(logprobs, f64([0, 0, 0]), mask, "sequence_mean")
    (gradient,) = torch.autograd.grad(ratio[0, 0], logprobs)
    s = math.exp(0.2)
    assert gradient.tolist()[0] == pytest.approx([s / 2, s / 2, 0])


# clipped_policy_loss


def test_clipped_policy_loss_by_hand() -> None:
    # clip to [0.8, 1.3]. A > 0: gains stop at 1.3, losses do not stop. A < 0: the other way round.
    ratio = f64([0.5, 1.0, 1.3, 2.0] * 2)
    advantages = f64([2.0] * 4 + [-2.0] * 4)
    loss, clipped = clipped_policy_loss(ratio, advantages, 0.2, 0.3, None)
    assert loss.tolist()[0] == pytest.approx([-1.0, -2.0, -2.6, -2.6, 1.6, 2.0, 2.6, 4.0])
    assert clipped.int().tolist() == [[0, 0, 0, 1, 1, 0, 0, 0]]


def test_dual_clip_by_hand() -> None:
    # A = -2, dual clip 3: the loss stops at 6, from ratio 3 on. A > 0 is left alone.
    ratio, advantages = f64([2.0, 3.0, 10.0, 0.5, 10.0]), f64([-2.0, -2.0, -2.0, -2.0, 2.0])
    loss, clipped = clipped_policy_loss(ratio, advantages, 0.2, 0.2, 3.0)
    assert loss.tolist()[0] == pytest.approx([4.0, 6.0, 6.0, 1.6, -2.4])
    assert clipped.int().tolist() == [[0, 0, 1, 1, 1]]


@given(st.floats(0.01, 5), st.floats(-3, 3), st.floats(0, 0.9), st.floats(0, 3), st.floats(1.1, 4))
def test_clipped_policy_loss_against_the_paper_and_its_gradient(
    ratio: float, advantage: float, low: float, high: float, dual: float
) -> None:
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    plain, _ = clipped_policy_loss(f64([ratio]), f64([advantage]), low, high, None)
    assert plain.item() == pytest.approx(-objective)
    if advantage < 0:
        objective = max(objective, dual * advantage)
    x = f64([ratio]).requires_grad_()
    loss, clipped = clipped_policy_loss(x, f64([advantage]), low, high, dual)
    assert loss.item() == pytest.approx(-objective)
    (gradient,) = torch.autograd.grad(loss.sum(), x)
    assert gradient.item() == (0 if clipped.item() else pytest.approx(-advantage))


def test_on_policy_gradient_is_the_policy_gradient() -> None:
    logprobs = f64([-1.0, -2.0]).requires_grad_()
    ratio = policy_ratio(logprobs, logprobs.detach(), torch.ones(1, 2), "token")
    loss, clipped = clipped_policy_loss(ratio, f64([3.0, -0.5]), 0.2, 0.2, None)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist() == [[-3.0, 0.5]]
    assert not clipped.any()


def test_clipped_policy_loss_refuses() -> None:
    one = torch.ones(1, 1)
    for low, high in ((-0.1, 0.2), (0.2, -0.1)):
        with pytest.raises(ValueError, match="must not be negative"):
            clipped_policy_loss(one, one, low, high, None)
    with pytest.raises(ValueError, match="dual_clip must be above 1"):
        clipped_policy_loss(one, one, 0.2, 0.2, 1.0)
    with pytest.raises(AssertionError):
        clipped_policy_loss(torch.ones(2, 3), torch.ones(2, 1), 0.2, 0.2, None)


# cispo_loss


def test_cispo_by_hand() -> None:
    # weights min(ratio, 1 + 4) = 0.1, 2, 5; the gradient is -weight * A for every token.
    logprobs = f64([-1.0, -2.0, -3.0]).requires_grad_()
    ratio = policy_ratio(
        logprobs, logprobs.detach() - f64([0.1, 2.0, 7.0]).log(), torch.ones(1, 3), "token"
    )
    loss, clipped = cispo_loss(ratio, logprobs, f64([1.0, -1.0, 2.0]), clip_high=4.0)
    assert loss.tolist()[0] == pytest.approx([0.1, -4.0, 30.0])
    assert clipped.int().tolist() == [[0, 0, 1]]
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert gradient.tolist()[0] == pytest.approx([-0.1, 2.0, -10.0])
    with pytest.raises(ValueError, match="clip_high must not be negative"):
        cispo_loss(ratio, logprobs, logprobs, -0.1)


def test_cispo_bound_by_hand() -> None:
    # A weight on the bound is not cut, one just above it is; a bound of 1 + 0 is allowed.
    one = f64([1.0, 1.0, 1.0])
    for clip_high, ratios in ((0.5, [1.0, 1.5, 1.75]), (0.0, [0.5, 1.0, 1.25])):
        loss, clipped = cispo_loss(f64(ratios), one, one, clip_high)
        assert loss.tolist()[0] == [-ratios[0], -(1 + clip_high), -(1 + clip_high)]
        assert clipped.int().tolist() == [[0, 0, 1]]


# value_loss


def test_value_loss_by_hand() -> None:
    # old 0, return 3. v 1: 2^2/2 = 2, held at 0.5: 2.5^2/2 = 3.125. v 0.2: 2.8^2/2, not held.
    # v -1: 4^2/2 = 8 against held -0.5: 3.5^2/2, the larger stays.
    values, old, returns = f64([1, 0.2, -1]), f64([0, 0, 0]), f64([3, 3, 3])
    loss, clipped = value_loss(values, old, returns, clip=0.5)
    assert loss.tolist()[0] == pytest.approx([3.125, 3.92, 8.0])
    assert clipped.int().tolist() == [[1, 0, 0]]
    loss, clipped = value_loss(values, old, returns, clip=None)
    assert loss.tolist()[0] == pytest.approx([2.0, 3.92, 8.0])
    assert clipped.int().tolist() == [[0, 0, 0]]
    assert clipped.dtype == torch.bool


def test_value_loss_holds_to_the_old_value_on_both_sides() -> None:
    # old 2. v 2.2, return 1: within the clip, 1.2^2/2. v 1, return 0: held at 1.5, 1.5^2/2.
    # v 1, return 3: held at 1.5, whose error is the smaller: 2^2/2.
    loss, clipped = value_loss(f64([2.2, 1, 1]), f64([2, 2, 2]), f64([1, 0, 3]), clip=0.5)
    assert loss.tolist()[0] == pytest.approx([0.72, 1.125, 2.0])
    assert clipped.int().tolist() == [[0, 1, 0]]


# mismatch


def test_mismatch_weights_by_hand() -> None:
    # old / rollout = 2, 0.25, 8 (masked: 5), capped at 3; of the sequences 2 * 0.25 and 8
    old = f64([2, 0.25, NAN], [8, 5, NAN]).log()
    rollout = torch.zeros(2, 3, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    token = mismatch_weights(old.requires_grad_(), rollout, mask, 3.0, "token")
    torch.testing.assert_close(token, f64([2, 0.25, 1], [3, 1, 1]))
    assert not token.requires_grad
    sequence = mismatch_weights(old, rollout, mask, 3.0, "sequence")
    torch.testing.assert_close(sequence, f64([0.5, 0.5, 1], [3, 1, 1]))
    below_one = mismatch_weights(old, rollout, mask, 0.5, "token")
    torch.testing.assert_close(below_one, f64([0.5, 0.25, 1], [0.5, 1, 1]))


def test_mismatch_weights_refuse_a_cap_that_is_not_positive() -> None:
    with pytest.raises(ValueError, match="cap must be above 0"):
        mismatch_weights(torch.zeros(1, 1), torch.zeros(1, 1), torch.ones(1, 1), 0.0, "token")


def test_mismatch_kl_by_hand() -> None:
    # old / rollout = 2 and 1: k3 = 2 - 1 - log 2, and 0
    old, rollout = f64([math.log(2), 0, NAN]), f64([0, 0, 0])
    mask = torch.tensor([[1, 1, 0]])
    assert mismatch_kl(old, rollout, mask) == pytest.approx((1 - math.log(2)) / 2)
    assert mismatch_kl(old, rollout, torch.zeros(1, 3)) == 0.0


def test_mismatch_kl_is_the_kl_of_the_engine_from_the_trainer() -> None:
    # Its expectation over the engine's tokens, exactly, over a vocabulary of two.
    engine, trainer = [0.75, 0.25], [0.5, 0.5]
    kl = sum(p * math.log(p / q) for p, q in zip(engine, trainer, strict=True))
    tokens = [0, 0, 0, 1]  # three to one, as the engine samples
    old = f64([math.log(trainer[t]) for t in tokens])
    rollout = f64([math.log(engine[t]) for t in tokens])
    assert mismatch_kl(old, rollout, torch.ones(1, 4)) == pytest.approx(kl)


# dpo_loss


def test_dpo_by_hand() -> None:
    # h = (-1 - -3) - (-3 - -6) = 2 - 3 = -1; beta 0.25
    args = (f64(-1), f64(-3), f64(-3), f64(-6))
    losses, chosen, rejected = dpo_loss(*args, beta=0.25, kind="sigmoid")
    assert losses.item() == pytest.approx(-log_sigmoid(-0.25))
    assert (chosen.item(), rejected.item()) == (0.5, 0.75)
    losses, _, _ = dpo_loss(*args, beta=0.25, kind="sigmoid", label_smoothing=0.1)
    assert losses.item() == pytest.approx(-0.9 * log_sigmoid(-0.25) - 0.1 * log_sigmoid(0.25))
    losses, _, _ = dpo_loss(*args, beta=0.25, kind="ipo")
    assert losses.item() == pytest.approx((-1 - 2) ** 2)  # 1 / (2 beta) = 2
    losses, _, _ = dpo_loss(*args, beta=0.25, kind="hinge")
    assert losses.item() == pytest.approx(1.25)
    losses, _, _ = dpo_loss(f64(9), *args[1:], beta=0.25, kind="hinge")
    assert losses.item() == 0.0


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_dpo_gradient_and_detached_rewards(smoothing: float) -> None:
    # at h = 0: d loss / d chosen = -beta * (1 - 2 * smoothing) / 2, and the opposite for rejected
    chosen, rejected = f64(-1).requires_grad_(), f64(-2).requires_grad_()
    losses, *rewards = dpo_loss(
        chosen, rejected, f64(-1), f64(-2), 0.3, "sigmoid", label_smoothing=smoothing
    )
    gradients = torch.autograd.grad(losses.sum(), (chosen, rejected))
    expected = -0.3 * (1 - 2 * smoothing) / 2
    assert [g.item() for g in gradients] == pytest.approx([expected, -expected])
    assert not any(r.requires_grad for r in rewards)


def test_dpo_does_not_overflow() -> None:
    big = torch.tensor([1e4])
    losses, _, _ = dpo_loss(-big, big, big * 0, big * 0, 0.1, "sigmoid")
    assert losses.item() == pytest.approx(2e3)


@pytest.mark.parametrize(
    ("beta", "kind", "smoothing", "message"),
    [
        (0.0, "sigmoid", 0.0, "beta must be above 0"),
        (0.1, "sigmoid", 0.5, "label_smoothing must be in"),
        (0.1, "sigmoid", -0.1, "label_smoothing must be in"),
        (0.1, "ipo", 0.1, "not for 'ipo'"),
        (0.1, "hinge", 0.1, "not for 'hinge'"),
    ],
)
def test_dpo_refuses(beta: float, kind: str, smoothing: float, message: str) -> None:
    zero = torch.zeros(1)
    with pytest.raises(ValueError, match=message):
        dpo_loss(zero, zero, zero, zero, beta, kind, smoothing)  # type: ignore[arg-type]


# reward models


def test_bradley_terry_by_hand() -> None:
    chosen, rejected = f64(2, 0), f64(1, 0)
    plain = bradley_terry_loss(chosen, rejected)
    assert plain.tolist() == pytest.approx([-log_sigmoid(1), math.log(2)])
    with_margin = bradley_terry_loss(chosen, rejected, margin=f64(0.5, 2))
    assert with_margin.tolist() == pytest.approx([-log_sigmoid(0.5), -log_sigmoid(-2)])
    centered = bradley_terry_loss(chosen, rejected, centering=0.01)
    assert centered.tolist() == pytest.approx([-log_sigmoid(1) + 0.09, math.log(2)])


def test_step_cross_entropy_by_hand() -> None:
    # class 1 is "right": odds 3 to 1 for it
    logits = f64([0, math.log(3)], [0, math.log(3)])
    losses = step_cross_entropy(logits, torch.tensor([1, 0]))
    assert losses.tolist() == pytest.approx([-math.log(3 / 4), -math.log(1 / 4)])
    assert step_cross_entropy(logits.bfloat16(), torch.tensor([1, 0])).dtype == torch.float32
    assert step_cross_entropy(torch.zeros(0, 2), torch.zeros(0, dtype=torch.long)).tolist() == []


def test_step_labels_other_than_0_and_1_are_refused() -> None:
    # -100 would be skipped in silence by torch's cross entropy
    with pytest.raises(ValueError, match=r"step labels must be 0 or 1, got \[-100, 1\]"):
        step_cross_entropy(torch.zeros(2, 2), torch.tensor([1, -100]))


def test_unknown_kinds_are_a_mistake_of_ours() -> None:
    one = torch.ones(1, 1)
    with pytest.raises(AssertionError, match="'word'"):
        policy_ratio(one, one, one, "word")  # type: ignore[arg-type]
    with pytest.raises(AssertionError, match="'slic'"):
        dpo_loss(one, one, one, one, 0.1, "slic")  # type: ignore[arg-type]
