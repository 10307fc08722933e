"""What a batch of rollouts looks like to credit assignment and to the loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from stages.core.advantages import token_rewards
from stages.core.kl import kl_k1
from stages.core.masks import masked_sum
from stages.core.shaping import place_step_rewards
from stages.forward import Sequences
from stages.rewards.composition import RewardBreakdown
from stages.rollout.types import Rollout

CreditMode = Literal["response", "step", "token"]
"""How finely credit tells the tokens of one response apart."""


@dataclass(frozen=True)
class Experience:
    """_N rollouts as tensors, completions right-padded to _T. All of it is without gradient."""

    rollouts: Sequence[Rollout]
    sequences: Sequences
    rewards: RewardBreakdown
    group_ids: Tensor
    """long [_N]: rollouts of one prompt share an id."""
    completion_mask: Tensor
    """bool [_N, _T]: the tokens that are trained on."""
    rollout_logprobs: Tensor
    """[_N, _T], from the engine."""
    old_logprobs: Tensor
    """[_N, _T], of the policy that is about to be updated."""
    ref_logprobs: Tensor | None = None
    """[_N, _T], of the SFT policy; None where nothing needs them."""
    values: Tensor | None = None
    """[_N, _T], the critic's, of the state before each token."""
    values_after: Tensor | None = None
    """[_N], the critic's, of the state after the last token."""

    @property
    def width(self) -> int:
        """_T."""
        return self.completion_mask.shape[1]

    @property
    def truncated(self) -> Tensor:
        """bool [_N]: completions that the length limit cut."""
        flags = [rollout.truncated for rollout in self.rollouts]
        return torch.tensor(flags, device=self.completion_mask.device)

    def per_token(self, values: Tensor) -> Tensor:
        """A value for each rollout [_N], repeated for each of its tokens [_N, _T]."""
        return values.to(self.completion_mask.device)[:, None] * self.completion_mask

    def kl(self) -> Tensor | None:
        """k1 of the policy against the SFT policy, nats [_N, _T]; None without its logprobs."""
        if self.ref_logprobs is None:
            return None
        return kl_k1(self.old_logprobs, self.ref_logprobs)

    def sequence_kl(self) -> Tensor:
        """k1 summed over the tokens of each response, nats [_N]; needs the reference."""
        kl = self.kl()
        assert kl is not None
        return masked_sum(kl, self.completion_mask, dim=1)

    def token_rewards(self, kl_coef: float) -> Tensor:
        """The reward of a response spread over its tokens [_N, _T].

        -kl_coef * k1 on every token, the score on the last one, step rewards at their step's end.
        """
        rewards, mask, kl = self.rewards, self.completion_mask, self.kl()
        assert kl is not None or kl_coef == 0, "a KL penalty needs the reference"
        steps = None
        if rewards.step_rewards is not None and rewards.step_ends is not None:
            steps = place_step_rewards(rewards.step_rewards, rewards.step_ends, self.width).to(
                mask.device
            )
        return token_rewards(
            rewards.scores.to(mask.device),
            torch.zeros_like(self.old_logprobs) if kl is None else kl,
            mask,
            kl_coef,
            steps,
        )


@dataclass(frozen=True)
class Credit:
    """What credit assignment decided."""

    advantages: Tensor
    """[_N, _T]."""
    returns: Tensor | None = None
    """[_N, _T], what the critic learns; None without a critic."""
    metrics: dict[str, float] = field(default_factory=dict)
    mode: CreditMode = "response"
    kl_coef: float = 0.0
    """Weight of the KL in the reward that credit was computed from."""
    td_errors: Tensor | None = None
    """[_N, _T], what each token surprised the critic by; None without a critic."""
    unwhitened: Tensor | None = None
    """[_N, _T], the advantages before they were whitened; None where they are not."""


@dataclass(frozen=True)
class TrainBatch:
    """The rows of a micro-batch, all [_B, _T]."""

    advantages: Tensor
    completion_mask: Tensor
    old_logprobs: Tensor
    rollout_logprobs: Tensor
    ref_logprobs: Tensor | None = None
    returns: Tensor | None = None
    old_values: Tensor | None = None

    def select(self, rows: Sequence[int]) -> TrainBatch:
        """Some of the rows."""
        index = torch.tensor(rows, dtype=torch.long, device=self.advantages.device)
        chosen = {
            name: value[index] for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **chosen)


@dataclass(frozen=True)
class TokenLoss:
    """A loss for each token, and counts for the metrics."""

    per_token: Tensor
    """[_B, _T]."""
    clipped: Tensor
    """bool [_B, _T]: tokens whose ratio was clipped."""
    ratio: Tensor | None = None
    """[_B, _T], the ratio that the clip looked at; None for a critic's loss."""
