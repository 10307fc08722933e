"""AdamW, its schedule, and one clipped step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from schemas.training import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, num_steps: int) -> float:
    """Learning rate of optimizer step `step` (from 0) out of num_steps.

    Linear warm-up to the peak, then constant, or half a cosine down to
    min_learning_rate_ratio times the peak (Loshchilov and Hutter 2017, eq. 5, one cycle).
    """
    warmup = math.ceil(config.warmup_fraction * num_steps)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(num_steps - warmup, 1)
    low = config.min_learning_rate_ratio
    return config.learning_rate * (low + (1 - low) * 0.5 * (1 + math.cos(math.pi * progress)))


class NonFiniteGradient(ArithmeticError):
    """The gradient is not finite: the step would ruin the weights."""


@dataclass
class Optimizer:
    """AdamW over the trainable parameters of a model; the learning rate follows from the step."""

    adamw: torch.optim.AdamW
    config: OptimizerConfig
    num_steps: int
    parameters: list[nn.Parameter]
    step_count: int = 0

    @classmethod
    def create(cls, model: nn.Module, config: OptimizerConfig, num_steps: int) -> Optimizer:
        """Weight decay on matrices only."""
        parameters = [p for p in model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ]
        adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            fused=True,
        )
        return cls(adamw, config, num_steps, parameters)

    def step(self) -> dict[str, float]:
        """Clip, update, clear. Returns grad_norm (before clipping) and learning_rate.

        Raises NonFiniteGradient, with the weights untouched.
        """
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        if not torch.isfinite(norm):
            raise NonFiniteGradient(
                f"the gradient norm is {norm.item()} at optimizer step {self.step_count}; "
                "lower the learning rate or look at the records of this step"
            )
        rate = learning_rate(self.config, self.step_count, self.num_steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        self.step_count += 1
        return {"grad_norm": norm.item(), "learning_rate": rate}

    def state_dict(self) -> dict[str, Any]:
        """Moments and step count."""
        return {"adamw": self.adamw.state_dict(), "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.adamw.load_state_dict(state["adamw"])
        self.step_count = state["step_count"]
