import math

import pytest
import torch

from stages.core.kl import AdaptiveKLController, FixedKLController, kl_k1, kl_k2, kl_k3


def test_estimators_by_hand() -> None:
    # policy 1/2, reference 1/4: d = -log 2, so k1 = log 2, k2 = log(2)^2 / 2, k3 = log 2 - 1/2
    logprobs = torch.tensor([[0.5]], dtype=torch.float64).log()
    ref_logprobs = torch.tensor([[0.25]], dtype=torch.float64).log()
    assert kl_k1(logprobs, ref_logprobs).item() == pytest.approx(math.log(2))
    assert kl_k2(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) ** 2 / 2)
    assert kl_k3(logprobs, ref_logprobs).item() == pytest.approx(math.log(2) - 0.5)


def test_k1_and_k3_are_unbiased() -> None:
    # E over the policy, taken exactly over a vocabulary of three, is KL(policy || reference).
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    kl = sum(p * math.log(p / q) for p, q in zip(policy.tolist(), reference.tolist(), strict=True))
    for estimator in (kl_k1, kl_k3):
        assert (policy * estimator(policy.log(), reference.log())).sum().item() == pytest.approx(kl)


def test_gradient_of_k2_is_that_of_kl() -> None:
    # Exact expectations again: E[d k2 / d theta] = d KL / d theta with theta the logits.
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    ref = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64).log()
    log_policy = logits.log_softmax(0)
    exact = torch.autograd.grad((log_policy.exp() * (log_policy - ref)).sum(), logits)
    log_policy = logits.log_softmax(0)
    sampled = torch.autograd.grad(
        (log_policy.exp().detach() * kl_k2(log_policy, ref)).sum(), logits
    )
    torch.testing.assert_close(sampled, exact)


def test_k3_is_never_negative_where_it_is_tiny() -> None:
    # exp(d) - 1 - d in float32 loses everything below 1e-7 and turns negative; expm1 does not.
    d = torch.linspace(-1e-3, 1e-3, 1001)
    assert (kl_k3(torch.zeros_like(d), d) >= 0).all()


def test_identical_policies_have_no_kl() -> None:
    x = torch.tensor([[-1.0, -30.0]])
    assert kl_k1(x, x).tolist() == kl_k2(x, x).tolist() == kl_k3(x, x).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # on target
        (6.6, 1 + 0.1 * 0.5),  # 10% above, half a horizon
        (60.0, 1 + 0.2 * 0.5),  # clipped above
        (0.0, 1 - 0.2 * 0.5),  # clipped below
    ],
)
def test_adaptive_controller_by_hand(kl: float, factor: float) -> None:
    controller = AdaptiveKLController(value=0.2, target=6.0, horizon=100)
    controller.update(kl, num_steps=50)
    assert controller.value == pytest.approx(0.2 * factor)


def test_adaptive_controller_takes_small_targets_and_horizons() -> None:
    # 10% above a target of 0.5 nats, two horizons of 0.5: 1 + 0.1 * 1 / 0.5
    controller = AdaptiveKLController(value=0.2, target=0.5, horizon=0.5)
    controller.update(0.55, num_steps=1)
    assert controller.value == pytest.approx(0.2 * 1.2)


def test_fixed_controller_stays() -> None:
    controller = FixedKLController(0.1)
    controller.update(100.0, 50)
    assert controller.value == 0.1


def test_controllers_resume() -> None:
    adaptive = AdaptiveKLController(value=0.2, target=6.0, horizon=100)
    adaptive.update(60.0, 50)
    resumed = AdaptiveKLController(value=0.2, target=6.0, horizon=100)
    resumed.load_state_dict(adaptive.state_dict())
    assert resumed == adaptive
    fixed = FixedKLController(0.3)
    fixed.load_state_dict(FixedKLController(0.1).state_dict())
    assert fixed.value == 0.1


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 1.0), (1.0, 0.0), (-1.0, 1.0)])
def test_adaptive_controller_refuses(target: float, horizon: float) -> None:
    with pytest.raises(ValueError, match="target and horizon must be above 0"):
        AdaptiveKLController(0.1, target, horizon)
