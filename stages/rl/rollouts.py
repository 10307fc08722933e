"""From prompts to experience: sample, score, and look up every log-probability once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.rl import OnlineConfig
from stages.adapters import adapters_disabled
from stages.core.shaping import overlong_penalty
from stages.forward import Sequences, all_completion_logprobs, all_completion_values
from stages.memory import TokenBudget
from stages.ordering import records_at
from stages.rewards.composition import RewardBreakdown, Rewarder
from stages.rl.experience import Experience
from stages.rollout.types import Rollout, RolloutEngine
from stages.shared_critic import Critic


@dataclass(frozen=True)
class PromptRecord:
    """A verifiable record and its prompt as token ids."""

    record: dict[str, Any]
    prompt_ids: list[int]


@dataclass
class PromptStream:
    """Prompts in a seeded order; `position` is the data cursor."""

    prompts: Sequence[PromptRecord]
    seed: int
    position: int = 0

    def take(self, count: int) -> list[PromptRecord]:
        """The next prompts, over as many epochs as it takes."""
        indices = records_at(self.position, count, len(self.prompts), self.seed)
        self.position += count
        return [self.prompts[index] for index in indices]

    def record_ids(self, rollouts: Sequence[Rollout]) -> list[str]:
        """Ids of the records that rollouts answer, each once, in order."""
        ids = {tuple(p.prompt_ids): str(p.record["id"]) for p in reversed(self.prompts)}
        return list(dict.fromkeys(ids[tuple(rollout.prompt_ids)] for rollout in rollouts))


@dataclass(frozen=True)
class ScoredRollouts:
    """Rollouts of whole groups and what they earned."""

    rollouts: list[Rollout]
    rewards: RewardBreakdown
    num_replaced_groups: int = 0
    num_zero_variance_groups: int = 0


class Sampler:
    """Draws groups for a step; with dynamic sampling, until enough of them have variance."""

    def __init__(
        self,
        engine: RolloutEngine,
        rewarder: Rewarder,
        stream: PromptStream,
        config: OnlineConfig,
        dynamic_sampling_rounds: int,
    ) -> None:
        self._engine = engine
        self._rewarder = rewarder
        self._stream = stream
        self._config = config
        self._rounds = dynamic_sampling_rounds

    def sample(self, seed: int) -> ScoredRollouts:
        """Rollouts of `prompts_per_step` groups.

        Groups without variance teach nothing; each of at most `dynamic_sampling_rounds` rounds
        replaces them by groups of new prompts (DAPO, Yu et al. 2025, section 3.2).
        """
        found = self._draw(self._config.prompts_per_step, seed)
        first_flat = len(self._flat_groups(found))
        replaced = 0
        for round_ in range(1, self._rounds + 1):
            flat = self._flat_groups(found)
            if not flat:
                break
            found = _replace_groups(found, flat, self._draw(len(flat), seed + round_))
            replaced += len(flat)
        return replace(found, num_replaced_groups=replaced, num_zero_variance_groups=first_flat)

    def _draw(self, num_prompts: int, seed: int) -> ScoredRollouts:
        prompts = self._stream.take(num_prompts)
        rollouts = self._engine.generate(
            [prompt.prompt_ids for prompt in prompts],
            self._config.sampling,
            num_samples=self._config.group_size,
            seed=seed,
        )
        rewards = self._rewarder(rollouts, [prompt.record for prompt in prompts])
        return ScoredRollouts(rollouts, self._shaped(rollouts, rewards))

    def _shaped(self, rollouts: Sequence[Rollout], rewards: RewardBreakdown) -> RewardBreakdown:
        if self._config.overlong_buffer == 0:
            return rewards
        lengths = torch.tensor([len(rollout.completion_ids) for rollout in rollouts])
        penalty = overlong_penalty(
            lengths, self._config.sampling.max_completion_tokens, self._config.overlong_buffer
        )
        weighted = self._config.overlong_weight * penalty
        return replace(
            rewards,
            scores=rewards.scores + weighted,
            total=rewards.total + weighted,
            components=rewards.components | {"overlong": penalty},
        )

    @staticmethod
    def _flat_groups(found: ScoredRollouts) -> list[int]:
        groups = torch.tensor([rollout.prompt_index for rollout in found.rollouts])
        total = found.rewards.total
        return [
            group
            for group in range(int(groups.max()) + 1)
            if bool((total[groups == group] == total[groups == group][0]).all())
        ]


def shared_prompt(prompts: Sequence[PromptRecord], config: OnlineConfig) -> float:
    """Tokens of a prompt that the completions of a group share, on average."""
    if config.group_size == 1:
        return 0.0
    return fmean(len(prompt.prompt_ids) for prompt in prompts)


def make_experience(
    found: ScoredRollouts,
    policy: PreTrainedModel,
    reference: PreTrainedModel | None,
    critic: Critic | None,
    *,
    config: OnlineConfig,
    budget: TokenBudget,
    engine_is_exact: bool,
) -> Experience:
    """Tensors of a rollout batch.

    reference: may be the policy itself, if it has adapters.
    engine_is_exact: the engine samples from the trainer's own weights and its log-probabilities
    are the policy's, so no second pass is made for `old_logprobs`. Nor is one where
    `first_pass_on_policy`: `update` takes them from that pass, and until then those of the engine
    stand for them.
    """
    rollouts = found.rollouts
    device = policy.device
    sequences = Sequences(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
    )
    width = max(len(rollout.completion_ids) for rollout in rollouts)
    mask = _mask(rollouts, width, config.mask_truncated).to(device)
    rollout_logprobs = _padded([rollout.rollout_logprobs for rollout in rollouts], width).to(device)
    temperature = config.sampling.temperature

    def logprobs_of(model: PreTrainedModel) -> Tensor:
        return budget.run(
            lambda max_tokens: all_completion_logprobs(
                model, sequences, width, max_tokens, temperature
            ),
            lambda: None,
        )

    if engine_is_exact or first_pass_on_policy(config):
        old_logprobs = rollout_logprobs
    else:
        old_logprobs = logprobs_of(policy)
    ref_logprobs = None
    if reference is not None:
        with adapters_disabled(reference):
            ref_logprobs = logprobs_of(reference)
    values, values_after = None, None
    if critic is not None:
        values, values_after = budget.run(
            partial(all_completion_values, critic, sequences, width), lambda: None
        )
    return Experience(
        rollouts=rollouts,
        sequences=sequences,
        rewards=found.rewards,
        group_ids=torch.tensor([rollout.prompt_index for rollout in rollouts], device=device),
        completion_mask=mask,
        rollout_logprobs=rollout_logprobs,
        old_logprobs=old_logprobs,
        ref_logprobs=ref_logprobs,
        values=values,
        values_after=values_after,
    )


def first_pass_on_policy(config: OnlineConfig) -> bool:
    """Whether the first pass over a rollout batch ends before the first optimizer step.

    What it says of all tokens is then what the policy said before it was updated.
    """
    return config.num_mini_batches == 1


def _mask(rollouts: Sequence[Rollout], width: int, mask_truncated: bool) -> Tensor:
    lengths = torch.tensor(
        [
            0 if mask_truncated and rollout.truncated else len(rollout.completion_ids)
            for rollout in rollouts
        ]
    )
    return torch.arange(width) < lengths[:, None]


def _padded(rows: Sequence[Sequence[float]], width: int) -> Tensor:
    return torch.tensor([[*row, *[0.0] * (width - len(row))] for row in rows])


def _replace_groups(
    found: ScoredRollouts, flat: Sequence[int], drawn: ScoredRollouts
) -> ScoredRollouts:
    """`found` with its groups `flat` replaced, in order, by the groups of `drawn`."""
    size = len(drawn.rollouts) // len(flat)
    rows = list(range(len(found.rollouts)))
    rollouts = list(found.rollouts)
    offset = len(rollouts)
    for new, old in enumerate(flat):
        for sample in range(size):
            target = old * size + sample
            rows[target] = offset + new * size + sample
            rollouts[target] = replace(drawn.rollouts[new * size + sample], prompt_index=old)
    return ScoredRollouts(rollouts, _merge(found.rewards, drawn.rewards, rows))


def _merge(left: RewardBreakdown, right: RewardBreakdown, rows: Sequence[int]) -> RewardBreakdown:
    """Rows of two breakdowns, counted through both."""
    index = torch.tensor(rows)

    def lists(a: list[Tensor] | None, b: list[Tensor] | None) -> list[Tensor] | None:
        if a is None or b is None:
            return None
        joined = a + b
        return [joined[row] for row in rows]

    return RewardBreakdown(
        scores=torch.cat([left.scores, right.scores])[index],
        total=torch.cat([left.total, right.total])[index],
        components={
            name: torch.cat([value, right.components[name]])[index]
            for name, value in left.components.items()
        },
        step_ends=lists(left.step_ends, right.step_ends),
        step_scores=lists(left.step_scores, right.step_scores),
        step_rewards=lists(left.step_rewards, right.step_rewards),
    )
