"""From raw scores to rewards: length penalties and step scores.

Shapes: `_B` sequences, `_T` tokens, `_S` steps of one sequence. Step ends are token positions
within the completion, from 0.
"""

from collections.abc import Sequence
from typing import Literal, assert_never

import torch
from torch import Tensor

from stages.core.masks import upcast

StepAggregate = Literal["min", "product", "mean", "last"]


def overlong_penalty(lengths: Tensor, max_length: int, buffer: int) -> Tensor:
    """Soft overlong punishment (DAPO, Yu et al. 2025, eq. 13), to be added to the score.

    0 up to max_length - buffer tokens, then linearly down to -1 at max_length and beyond.
    lengths [_B] in completion tokens. Returns [_B]. Raises ValueError unless
    0 < buffer <= max_length.
    """
    if not 0 < buffer <= max_length:
        raise ValueError(f"buffer must be in 1..max_length ({max_length}), got {buffer}")
    return ((max_length - buffer - upcast(lengths)) / buffer).clamp(min=-1.0, max=0.0)


def aggregate_steps(step_scores: Tensor, how: StepAggregate) -> Tensor:
    """One score of a response from its step scores [_S], each P(right).

    min and product: Lightman et al. 2023, section 2 and appendix F; last: Uesato et al. 2022.
    Returns a scalar tensor. Raises ValueError if there is no step.
    """
    if step_scores.numel() == 0:
        raise ValueError("no steps to aggregate: give a response without steps a score of its own")
    step_scores = upcast(step_scores)
    match how:
        case "min":
            return step_scores.min()
        case "product":
            return step_scores.prod()
        case "mean":
            return step_scores.mean()
        case "last":
            return step_scores[-1]
        case _:
            assert_never(how)


def potential_based(step_scores: Tensor, gamma: float = 1.0) -> Tensor:
    """Step rewards gamma * phi_s - phi_{s-1}, phi being the step scores (Ng et al. 1999, eq. 2).

    A raw step score pays for every step, so that ten fair steps beat three good ones. These
    rewards telescope: with the potential of the prompt, phi_0, taken as 0, their sum, discounted
    by gamma a step, is gamma^_S * phi_S, the last step's score, however many steps led there.
    That sum is kept (the last potential is not reset to 0, as policy invariance would ask):
    it is the process reward's say on the response. gamma is per step; with the default of 1.0
    and an undiscounted return the sum is exactly phi_S.

    step_scores [_S]. Returns [_S]; no steps give no rewards.
    """
    phi = upcast(step_scores)
    previous = torch.cat([phi.new_zeros(1), phi[:-1]])[: phi.numel()]
    return gamma * phi - previous


def place_step_rewards(
    step_rewards: Sequence[Tensor], step_ends: Sequence[Tensor], width: int
) -> Tensor:
    """Each step's reward on its last token, 0 elsewhere; steps that share an end add up.

    step_rewards: _B tensors [_S]; step_ends: _B long tensors [_S]. Returns [_B, _T], _T = width.
    Raises ValueError if there is no sequence, the counts differ or an end is outside the width.
    """
    if len(step_rewards) != len(step_ends) or not step_rewards:
        raise ValueError(
            f"step rewards of {len(step_rewards)} sequences, step ends of {len(step_ends)}: "
            "both must be given for the same sequences, at least one"
        )
    first = upcast(step_rewards[0])
    placed = first.new_zeros(len(step_rewards), width)
    for row, (rewards, ends) in enumerate(zip(step_rewards, step_ends, strict=True)):
        if rewards.shape != ends.shape:
            raise ValueError(
                f"sequence {row}: {rewards.numel()} step rewards but {ends.numel()} step ends"
            )
        if ((ends < 0) | (ends >= width)).any():
            raise ValueError(f"sequence {row}: step ends {ends.tolist()} leave 0..{width - 1}")
        placed[row].index_add_(0, ends, rewards.to(placed.dtype))
    return placed
