"""Estimators of KL(policy || reference) from sampled tokens, and the coefficient that weighs it.

The estimators are those of Schulman, "Approximating KL Divergence" (2020), for tokens drawn from
the policy: with d = ref_logprobs - logprobs, each has a mean near KL; nats per token. All are
elementwise and differentiable in logprobs.
"""

from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor


def kl_k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """-d: unbiased, high variance, negative for some tokens. [_B, _T] each."""
    return logprobs - ref_logprobs


def kl_k2(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """d^2 / 2: biased, never negative; its gradient in the loss is KL's own. [_B, _T] each."""
    return (ref_logprobs - logprobs).square() / 2


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(d) - 1 - d: unbiased and never negative; GRPO's (DeepSeekMath, eq. 4). [_B, _T] each."""
    d = ref_logprobs - logprobs
    return torch.expm1(d) - d


class KLControllerState(TypedDict):
    """What a checkpoint keeps of a controller."""

    value: float


@dataclass
class FixedKLController:
    """A KL coefficient that stays as it is."""

    value: float

    def update(self, kl: float, num_steps: int) -> None:
        """Nothing changes, whatever kl [nats] was observed."""

    def state_dict(self) -> KLControllerState:
        """The coefficient."""
        return {"value": self.value}

    def load_state_dict(self, state: KLControllerState) -> None:
        """Restore what `state_dict` gave."""
        self.value = state["value"]


@dataclass
class AdaptiveKLController:
    """A KL coefficient steered towards a target KL (Ziegler et al. 2019, section 2.2).

    `target` is in the unit of the `kl` given to `update` (nats per sequence, in the paper);
    `horizon` is in the unit of `num_steps` (episodes, in the paper). Raises ValueError unless
    both are positive.
    """

    value: float
    target: float
    horizon: float

    def __post_init__(self) -> None:
        """Refuse a target or a horizon that is not positive."""
        if not (self.target > 0 and self.horizon > 0):
            raise ValueError(
                f"target and horizon must be above 0, got {self.target} and {self.horizon}"
            )

    def update(self, kl: float, num_steps: int) -> None:
        """Apply value *= 1 + clip(kl / target - 1, -0.2, 0.2) * num_steps / horizon."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * num_steps / self.horizon

    def state_dict(self) -> KLControllerState:
        """The coefficient; target and horizon are configuration."""
        return {"value": self.value}

    def load_state_dict(self, state: KLControllerState) -> None:
        """Restore what `state_dict` gave."""
        self.value = state["value"]
