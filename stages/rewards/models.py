"""Trained reward models as scorers of rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.training import Precision
from stages import heartbeat
from stages.forward import Sequences, scores_at
from stages.models import load_with_head, to_device
from stages.precision import freeze, use_precision
from stages.rewards.served import ServedModel


def load_scorer(
    folder: Path, kind: str, device: torch.device, precision: Precision
) -> PreTrainedModel:
    """A frozen reward model; kind is `outcome` or `process`."""
    return freeze(use_precision(to_device(load_with_head(folder, kind), device), precision))


@torch.inference_mode()
def outcome_scores(
    model: PreTrainedModel | ServedModel, sequences: Sequences, max_tokens: int | None
) -> Tensor:
    """The raw score at the last token of each sequence, [_B]."""
    if isinstance(model, ServedModel):
        return model.outcome_scores(sequences)
    scores = torch.zeros(len(sequences), device=model.device)
    for indices in sequences.best_micro_batches(max_tokens, model):
        heartbeat.beat(f"scoring {len(sequences)} completions with the outcome reward model")
        chosen = sequences.select(indices)
        scores[indices] = scores_at(model, chosen, [[n - 1] for n in chosen.lengths()])[:, 0]
    return scores.clone()


@torch.inference_mode()
def step_scores(
    model: PreTrainedModel | ServedModel,
    sequences: Sequences,
    step_ends: Sequence[Sequence[int]],
    max_tokens: int | None,
) -> list[Tensor]:
    """P(right) at each step's last token; one tensor [_S] a sequence, empty where no step is.

    step_ends count from the first completion token.
    """
    if isinstance(model, ServedModel):
        return model.step_scores(sequences, step_ends)
    scores = [torch.zeros(0, device=model.device) for _ in range(len(sequences))]
    scored = [index for index, ends in enumerate(step_ends) if ends]
    for batch in sequences.select(scored).best_micro_batches(max_tokens, model):
        heartbeat.beat(f"scoring {len(sequences)} completions with the process reward model")
        indices = [scored[i] for i in batch]
        chosen = sequences.select(indices)
        positions = [
            [len(chosen.prompt_ids[i]) + end for end in step_ends[index]]
            for i, index in enumerate(indices)
        ]
        right = scores_at(model, chosen, positions).softmax(-1)[:, 1]
        for index, own in zip(indices, right.split([len(own) for own in positions]), strict=True):
            scores[index] = own.clone()
    return scores
