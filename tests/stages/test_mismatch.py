"""What the importance weights of another engine do to an update."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from schemas.base import UserError
from schemas.rl import OnlineConfig, RLConfig
from schemas.training import StabilityConfig
from stages.forward import all_completion_logprobs
from stages.memory import TokenBudget
from stages.models import load_policy
from stages.optimization import Optimizer
from stages.rewards.composition import RewardBreakdown
from stages.rl.algorithms import online_algorithm
from stages.rl.experience import Credit, Experience
from stages.rl.rollouts import ScoredRollouts, make_experience
from stages.rl.update import Learner, update
from stages.rollout.types import Rollout
from stages.stability import Stability

CPU = torch.device("cpu")
SGD_LIKE = {"learning_rate": 1e-2, "schedule": "constant", "max_grad_norm": 1e9}
COMPLETIONS = [[7, 8, 9, 3], [9, 4], [5, 5, 6]]


def config(**changes: Any) -> RLConfig:
    return RLConfig.model_validate(
        {
            "algorithm": "grpo",
            "grpo": {"optimizer": SGD_LIKE, "aggregation": "token_mean"},
            "online": {
                "prompts_per_step": 1,
                "group_size": 3,
                "sampling": {"max_completion_tokens": 4},
                "max_mismatch_kl": 100.0,
                **changes,
            },
        }
    )


def gradient(
    folder: Path,
    settings: RLConfig,
    noise: Tensor | None,
    advantages: Tensor,
    exact: bool,
    stability: Stability | None = None,
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Gradients of the last pass, with engine log-probabilities that are off by `noise`.

    They stand for the policy's own, as the stage has it, unless the engine is exact.
    """
    online: OnlineConfig | None = settings.online
    assert online is not None
    algorithm = online_algorithm(settings)
    policy = load_policy(folder, CPU)
    rollouts = [Rollout([4, 5], list(ids), [0.0] * len(ids), "stop", 0, 0) for ids in COMPLETIONS]
    zeros = torch.zeros(3)
    found = ScoredRollouts(rollouts, RewardBreakdown(zeros, zeros, {}))
    budget = TokenBudget(online.micro_batch_tokens or 1000, "rl.online")
    experience: Experience = make_experience(
        found, policy.eval(), None, None, config=online, budget=budget, engine_is_exact=False
    )
    old = all_completion_logprobs(policy, experience.sequences, experience.width, 1000, 1.0)
    off = old if noise is None else old - noise
    experience = replace(
        experience, old_logprobs=old if exact else off, rollout_logprobs=off.clone()
    )
    optimizer = Optimizer.create(policy, algorithm.optimizer, 1)
    kept: dict[str, Tensor] = {}
    for name, parameter in policy.named_parameters():
        parameter.register_post_accumulate_grad_hook(
            lambda p, name=name: kept.__setitem__(name, p.grad.clone())
        )
    metrics = update(
        Learner(policy, optimizer),
        experience,
        Credit(advantages),
        algorithm,
        online,
        seed=0,
        train_policy=True,
        engine_is_exact=exact,
        stability=stability or Stability(StabilityConfig(), "rl.online.stability"),
        budget=budget,
        step=1,
        record_ids=lambda rollouts: [],
    )
    return kept, metrics


NOISE = torch.tensor([[0.5, -1.0, 0.2, 0.1], [2.0, 0.3, 0.0, 0.0], [-0.4, 0.0, 0.6, 0.0]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 0]])
ADVANTAGES = torch.tensor([[1.0], [-0.5], [2.0]]) * MASK


def by_hand(level: str, cap: float) -> Tensor:
    """exp(old - rollout) of a token or the sum over a completion, cut at the cap."""
    log_weights = NOISE * MASK
    if level == "sequence":
        log_weights = log_weights.sum(1, keepdim=True).expand(3, 4)
    return log_weights.exp().clamp(max=cap)


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("cap", [1.5, 100.0])
def test_each_token_is_weighted_by_how_much_likelier_the_trainer_finds_it(
    tiny_folder: Path, level: str, cap: float
) -> None:
    settings = config(mismatch_level=level, mismatch_cap=cap)
    found, metrics = gradient(tiny_folder, settings, NOISE, ADVANTAGES, exact=False)
    # Before the first update the ratio is 1, so a weight is as good as a factor of the advantage.
    weighted = ADVANTAGES * by_hand(level, cap)
    expected, _ = gradient(tiny_folder, settings, None, weighted, exact=True)
    unweighted, _ = gradient(tiny_folder, settings, None, ADVANTAGES, exact=True)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, atol=1e-6, rtol=1e-4), name
    assert not all(torch.allclose(found[n], unweighted[n], rtol=1e-2) for n in found)
    # k3 of the engine against the trainer, on the engine's samples.
    kl = ((NOISE.exp() - 1 - NOISE) * MASK).sum() / MASK.sum()
    assert metrics["mismatch_kl"] == pytest.approx(kl.item(), rel=1e-3)


def test_later_passes_measure_against_what_the_first_one_found(tiny_folder: Path) -> None:
    settings = config(num_epochs=3)
    found, _ = gradient(tiny_folder, settings, NOISE, ADVANTAGES, exact=False)
    # The weights are those of the first pass in all, so they are factors of the advantages.
    weighted = ADVANTAGES * by_hand("token", 2.0)
    expected, _ = gradient(tiny_folder, settings, None, weighted, exact=True)
    unmoved, _ = gradient(tiny_folder, config(num_epochs=1), None, weighted, exact=True)
    assert relative_distance(found, expected) < 1e-4
    assert relative_distance(unmoved, expected) > 0.1


class FirstLossIsNaN(Stability):
    """Other micro-batches of its pass are then not come to."""

    num_checked = 0

    def check_loss(self, loss: float) -> None:
        self.num_checked += 1
        super().check_loss(math.nan if self.num_checked == 1 else loss)


def test_after_a_pass_that_was_left_out_the_next_one_is_the_first(tiny_folder: Path) -> None:
    skipping = FirstLossIsNaN(StabilityConfig(non_finite="skip"), "rl.online.stability")
    found, _ = gradient(
        tiny_folder,
        config(num_epochs=2, micro_batch_tokens=8),
        NOISE,
        ADVANTAGES,
        exact=False,
        stability=skipping,
    )
    expected, _ = gradient(tiny_folder, config(num_epochs=1), NOISE, ADVANTAGES, exact=False)
    assert skipping.num_checked > 2
    assert relative_distance(found, expected) < 1e-5


def relative_distance(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """|found - expected| / |expected|, of all gradients as one vector."""
    one, other = (torch.cat([g.flatten() for g in all_.values()]) for all_ in (found, expected))
    return float((one - other).norm() / other.norm())


def test_a_mismatch_beyond_the_limit_stops_the_run(tiny_folder: Path) -> None:
    settings = config(max_mismatch_kl=0.1)
    with pytest.raises(UserError, match=r"above rl\.online\.max_mismatch_kl 0\.1"):
        gradient(tiny_folder, settings, NOISE, ADVANTAGES, exact=False)
