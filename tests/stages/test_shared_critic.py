"""A value head on the policy's own backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from schemas.training import LoRAConfig
from stages.adapters import add_adapters
from stages.forward import Sequences, completion_values
from stages.models import load_policy
from stages.shared_critic import SharedCritic
from tests.stages.fakes import MemoryTracker
from tests.stages.test_online import ALGORITHMS, train

SEQUENCES = Sequences([[1, 2], [3]], [[4, 5, 6], [7]])


@pytest.fixture
def policy(tiny_folder: Path) -> Any:
    return load_policy(tiny_folder, torch.device("cpu"))


def test_it_owns_the_head_only_and_starts_at_zero(policy: Any) -> None:
    critic = SharedCritic(policy)
    assert set(critic.state_dict()) == {"score.weight", "score.bias"}
    assert not any("score" in name for name in policy.state_dict())
    assert completion_values(critic, SEQUENCES, 3).tolist() == [[0.0] * 3] * 2


def test_the_gradient_reaches_the_backbone_unless_the_head_warms_up(policy: Any) -> None:
    critic = SharedCritic(policy)
    torch.nn.init.ones_(critic.score.weight)
    completion_values(critic, SEQUENCES, 3, head_only=True).sum().backward()
    assert critic.score.weight.grad is not None
    assert all(parameter.grad is None for parameter in policy.parameters())
    completion_values(critic, SEQUENCES, 3).sum().backward()
    moved = [p.grad is not None and bool(p.grad.any()) for p in policy.base_model.parameters()]
    assert all(moved)


def test_below_adapters_the_gradient_reaches_them_and_no_other_weight(policy: Any) -> None:
    add_adapters(policy, LoRAConfig(rank=2), section="rl.online.lora", seed=0)
    critic = SharedCritic(policy)
    torch.nn.init.ones_(critic.score.weight)
    completion_values(critic, SEQUENCES, 3, head_only=True).sum().backward()
    assert critic.score.weight.grad is not None
    assert all(parameter.grad is None for parameter in policy.parameters())
    completion_values(critic, SEQUENCES, 3).sum().backward()
    moved = {name for name, p in policy.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in policy.named_parameters() if "lora_" in name}
    # The other factor is 0 still, and so is the gradient of this one.
    assert all(bool(p.grad.any()) for name, p in policy.named_parameters() if "lora_B" in name)


def test_the_value_loss_moves_the_policy_by_its_weight(
    tiny: Any, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = []
    for coef in (1e-9, 10.0):
        section = {**ALGORITHMS["ppo_shared"]["ppo"], "value_coef": coef}
        monkeypatch.setitem(ALGORITHMS, "weighted", {"algorithm": "ppo", "ppo": section})
        run_dir = tmp_path / str(coef)
        found, _ = train(tiny, tiny_folder, run_dir, MemoryTracker(), "weighted", num_steps=2)
        weights.append(found)
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
