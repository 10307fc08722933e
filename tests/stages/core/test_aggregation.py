import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stages.core.aggregation import LossAggregation, aggregate, denominator

HOWS: list[LossAggregation] = ["token_mean", "sequence_mean", "constant"]
LENGTH = 8


def test_by_hand() -> None:
    # sequences of 1, 3 and no tokens: sums 6 and 3, means 6 and 1
    per_token = torch.tensor([[6.0, math.nan, math.inf], [0.5, 1.0, 1.5], [math.nan] * 3])
    mask = torch.tensor([[1, 0, 0], [1, 1, 1], [0, 0, 0]])
    for how, total, expected in (
        ("token_mean", 4, 9 / 4),
        ("sequence_mean", 2, 7 / 2),
        ("constant", 2 * LENGTH, 9 / 16),
    ):
        assert denominator(mask, how, LENGTH) == total  # type: ignore[arg-type]
        assert aggregate(per_token, mask, how, total).item() == expected  # type: ignore[arg-type]


def test_masked_token_inside_counts_for_nothing() -> None:
    per_token, mask = torch.tensor([[2.0, 100.0, 4.0]]), torch.tensor([[True, False, True]])
    for how, expected in (("token_mean", 3.0), ("sequence_mean", 3.0), ("constant", 6 / LENGTH)):
        loss = aggregate(per_token, mask, how, denominator(mask, how, LENGTH))  # type: ignore[arg-type]
        assert loss.item() == expected


def loss_and_gradient(
    weight: Tensor, values: Tensor, mask: Tensor, how: LossAggregation, total: float
) -> tuple[Tensor, Tensor]:
    loss = aggregate((weight * values).square(), mask, how, total)
    return loss.detach(), torch.autograd.grad(loss, weight)[0]


@given(
    st.lists(st.lists(st.booleans(), min_size=5, max_size=5), min_size=1, max_size=6),
    st.integers(1, 6),
    st.integers(0, 3),
    st.sampled_from(HOWS),
)
def test_any_split_and_any_padding_give_the_same_loss_and_gradient(
    rows: list[list[bool]], micro_batch: int, pad: int, how: LossAggregation
) -> None:
    # Micro-batches of one rank and ranks of one step are split alike: rows are parted, and the
    # denominators are added before any loss is divided. Fully masked parts are among them.
    mask = torch.tensor(rows)
    if not mask.any():
        return
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    weight = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    whole = loss_and_gradient(weight, values, mask, how, denominator(mask, how, LENGTH))

    padded_mask = torch.nn.functional.pad(mask, (0, pad))
    padded_values = torch.nn.functional.pad(values, (0, pad), value=1e30)
    masks, parts = padded_mask.split(micro_batch), padded_values.split(micro_batch)
    total = sum(denominator(m, how, LENGTH) for m in masks)
    pieces = [
        loss_and_gradient(weight, v, m, how, total) for v, m in zip(parts, masks, strict=True)
    ]
    assert sum(loss.item() for loss, _ in pieces) == pytest.approx(whole[0].item())
    assert sum(gradient.item() for _, gradient in pieces) == pytest.approx(whole[1].item())


def test_a_step_without_a_token_is_refused() -> None:
    mask = torch.zeros(2, 3)
    for how in HOWS:
        total = denominator(mask, how, LENGTH)
        assert total == 0.0
        with pytest.raises(ValueError, match="no token to train on"):
            aggregate(torch.ones(2, 3), mask, how, total)


@pytest.mark.parametrize("constant_length", [None, 0])
def test_constant_needs_its_length(constant_length: int | None) -> None:
    with pytest.raises(ValueError, match="constant aggregation needs constant_length"):
        denominator(torch.ones(1, 1), "constant", constant_length)


def test_unknown_aggregation_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError):
        denominator(torch.ones(1, 1), "sum")  # type: ignore[arg-type]
    with pytest.raises(AssertionError):
        aggregate(torch.ones(1, 1), torch.ones(1, 1), "sum", 1.0)  # type: ignore[arg-type]
