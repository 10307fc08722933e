"""From per-token values to the loss of an optimizer step.

`aggregate` sums over the rows it is given and divides by a denominator of the whole optimizer
step, so that the losses of micro-batches and ranks add up to the same number however the step
was split. `denominator` is additive in the rows for the same reason: sum it over micro-batches and
ranks, then pass the sum in. Gradients must be summed over ranks, too: where they are averaged,
as DDP and FSDP do, multiply the loss by the number of ranks.

Shapes: `_B` sequences, `_T` tokens.
"""

from typing import Literal, assert_never

from torch import Tensor

from stages.core.masks import masked_mean, masked_sum

LossAggregation = Literal["token_mean", "sequence_mean", "constant"]


def denominator(mask: Tensor, how: LossAggregation, constant_length: int | None = None) -> float:
    """The share of this mask, [_B, _T], in what the step's loss is divided by.

    "token_mean": its valid tokens (DAPO, Yu et al. 2025, section 3.3). "sequence_mean": its
    sequences (GRPO, DeepSeekMath eq. 3). "constant": its sequences times constant_length
    (Dr. GRPO, Liu et al. 2025, section 3). A sequence without a valid token is not counted.
    Raises ValueError if "constant" has no positive constant_length.
    """
    valid = mask.bool()
    num_sequences = float(valid.any(dim=1).sum())
    match how:
        case "token_mean":
            return float(valid.sum())
        case "sequence_mean":
            return num_sequences
        case "constant":
            if constant_length is None or constant_length < 1:
                raise ValueError(
                    f"constant aggregation needs constant_length >= 1, got {constant_length}; "
                    "the maximum completion length is the usual choice"
                )
            return num_sequences * constant_length
        case _:
            assert_never(how)


def aggregate(per_token: Tensor, mask: Tensor, how: LossAggregation, denominator: float) -> Tensor:
    """The share of these rows in the step's loss, a scalar.

    The sum over valid tokens, or for "sequence_mean" the sum over sequences of the mean over
    their valid tokens, divided by the denominator of the whole step. A row without a valid token
    adds 0. per_token, mask [_B, _T]. Raises ValueError unless denominator > 0.
    """
    if not denominator > 0:
        raise ValueError("the optimizer step has no token to train on: every row is masked")
    match how:
        case "token_mean" | "constant":
            return masked_sum(per_token, mask) / denominator
        case "sequence_mean":
            return masked_mean(per_token, mask, dim=1).sum() / denominator
        case _:
            assert_never(how)
