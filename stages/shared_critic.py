"""A critic without a backbone of its own: a value head on the policy's."""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel


class SharedCritic(nn.Module):
    """Owns the head only; the backbone is the policy's and stays there.

    Its parameters, its state and so its checkpoint are the head. It stands where a critic model
    of its own would: it has a `base_model`, a `device` and a head named `score`, which starts at
    0, so that an untrained critic says nothing.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.score = nn.Linear(
            policy.config.get_text_config().hidden_size,
            1,
            device=policy.device,
            dtype=next(policy.parameters()).dtype,
        )
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)
        # In a tuple, so that the policy does not become a submodule.
        self._policy = (policy,)

    @property
    def base_model(self) -> nn.Module:
        """The policy's backbone."""
        backbone: nn.Module = self._policy[0].base_model
        return backbone

    @property
    def device(self) -> torch.device:
        """Where it runs."""
        return self.score.weight.device


Critic = PreTrainedModel | SharedCritic
"""A critic with a backbone of its own, or a head on the policy's."""
