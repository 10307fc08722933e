"""AdamW and its schedule."""

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

    def clip(self) -> float:
        """Clip the gradient in place; returns its global norm before that."""
        return nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm).item()

    def step(self, scale: float = 1.0) -> float:
        """Update, and clear the gradient. Returns the learning rate: the schedule's times `scale`.

        The gradient is clipped and has been found fit.
        """
        rate = scale * learning_rate(self.config, self.step_count, self.num_steps)
        for group in self.adamw.param_groups:
            group["lr"] = rate
        self.adamw.step()
        self._advance()
        return rate

    def skip(self) -> None:
        """Clear the gradient and leave the weights; the schedule moves on."""
        self._advance()

    def clear(self) -> None:
        """Drop the gradient."""
        self.adamw.zero_grad(set_to_none=True)

    def _advance(self) -> None:
        self.clear()
        self.step_count += 1

    def state_dict(self) -> dict[str, Any]:
        """Moments and step count."""
        return {"adamw": self.adamw.state_dict(), "step_count": self.step_count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.adamw.load_state_dict(state["adamw"])
        self.step_count = state["step_count"]
