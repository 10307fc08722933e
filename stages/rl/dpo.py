"""DPO: credit is implicit, in the difference to the reference policy.

Rafailov et al. 2023 (Direct Preference Optimization), section 4. Offline: pairs instead of
rollouts, no reward model, no critic. The reference's log-probabilities are computed once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.rl import DPOConfig
from stages.adapters import adapters_disabled
from stages.core.losses import dpo_loss
from stages.forward import Sequences, all_completion_logprobs, completion_logprobs
from stages.supervised import MicroLoss
from stages.train_reward_model import Pair, pair_batches


@dataclass(frozen=True)
class PairLogprobs:
    """Summed (or, length-normalised, mean) log-probabilities of both sides, [_B] each."""

    chosen: Tensor
    rejected: Tensor

    def select(self, rows: Sequence[int]) -> PairLogprobs:
        """Some of the pairs."""
        return PairLogprobs(self.chosen[list(rows)], self.rejected[list(rows)])


def loss(
    policy: PairLogprobs, reference: PairLogprobs, nll: Tensor, config: DPOConfig
) -> tuple[Tensor, Tensor]:
    """(losses, reward margins), [_B] each.

    nll [_B]: mean negative log-likelihood of a token of the chosen completion, which keeps it
    from becoming unlikely together with the rejected one (Pang et al. 2024, eq. 2).
    """
    losses, chosen_rewards, rejected_rewards = dpo_loss(
        policy.chosen,
        policy.rejected,
        reference.chosen,
        reference.rejected,
        config.beta,
        config.loss,
        config.label_smoothing,
    )
    return losses + config.nll_coef * nll, chosen_rewards - rejected_rewards


def reference_logprobs(
    model: PreTrainedModel, pairs: Sequence[Pair], config: DPOConfig
) -> PairLogprobs:
    """Log-probabilities of every pair, once for the whole stage.

    model: the reference, or the policy before its first update; adapters have no say.
    """
    sequences = _both_sides(pairs)
    width = max(len(completion) for completion in sequences.completion_ids)
    with adapters_disabled(model):
        logprobs = all_completion_logprobs(model, sequences, width, config.micro_batch_tokens, 1.0)
    return _reduce(logprobs, pairs, config)


def micro_losses(
    model: PreTrainedModel,
    pairs: Sequence[Pair],
    reference: PairLogprobs,
    config: DPOConfig,
    max_tokens: int,
) -> Iterator[MicroLoss]:
    """Mean loss over the pairs of the optimizer step, by micro-batch."""
    for rows in pair_batches(pairs, max_tokens):
        chosen = [pairs[row] for row in rows]
        sequences = _both_sides(chosen)
        width = max(len(completion) for completion in sequences.completion_ids)
        logprobs, _ = completion_logprobs(model, sequences, width)
        counts = torch.tensor([len(p.chosen_ids) for p in chosen], device=logprobs.device)
        nll = -logprobs[: len(chosen)].sum(1) / counts.clamp(min=1)
        losses, margins = loss(
            _reduce(logprobs, chosen, config), reference.select(rows), nll, config
        )
        yield MicroLoss(
            losses.sum() / len(pairs),
            {
                "reward/margin": margins.sum().item() / len(pairs),
                "reward/accuracy": (margins > 0).sum().item() / len(pairs),
                "nll": nll.sum().item() / len(pairs),
            },
        )


def _both_sides(pairs: Sequence[Pair]) -> Sequences:
    prompts = [pair.prompt_ids for pair in pairs]
    completions = [pair.chosen_ids for pair in pairs] + [pair.rejected_ids for pair in pairs]
    return Sequences(prompts * 2, completions)


def _reduce(logprobs: Tensor, pairs: Sequence[Pair], config: DPOConfig) -> PairLogprobs:
    """Sums over tokens, or means; logprobs is 0 behind each completion."""
    sums = logprobs.sum(1)
    if config.length_normalized:
        counts = [len(pair.chosen_ids) for pair in pairs] + [len(p.rejected_ids) for p in pairs]
        sums = sums / torch.tensor(counts, device=sums.device).clamp(min=1)
    return PairLogprobs(sums[: len(pairs)], sums[len(pairs) :])
