import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.masks import (
    completion_mask_from_lengths,
    last_valid_index,
    masked_mean,
    masked_sum,
    masked_whiten,
    upcast,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.int64, torch.float32),
    ],
)
def test_upcast(dtype: torch.dtype, expected: torch.dtype) -> None:
    assert upcast(torch.ones(2, dtype=dtype)).dtype == expected


def test_completion_mask_by_hand() -> None:
    # prompt 2 of 4 tokens; one-token completion; empty completion; cut at the width (no EOS)
    prompt, total = torch.tensor([2, 3, 3, 0]), torch.tensor([4, 4, 3, 5])
    assert completion_mask_from_lengths(prompt, total, 5).int().tolist() == [
        [0, 0, 1, 1, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
        [1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize(("prompt", "total"), [(3, 2), (1, 6), (-1, 2)])
def test_completion_mask_refuses_lengths_that_do_not_fit(prompt: int, total: int) -> None:
    with pytest.raises(ValueError, match=f"row 1: prompt length {prompt} and total length {total}"):
        completion_mask_from_lengths(torch.tensor([1, prompt]), torch.tensor([2, total]), 5)


def test_pad_id_equal_to_eos_id_changes_nothing() -> None:
    # ids 7 7 | 5 9 9 9 with 9 both EOS and pad: the completion is 5 9, its last token is the EOS.
    input_ids = torch.tensor([[7, 7, 5, 9, 9, 9]])
    mask = completion_mask_from_lengths(torch.tensor([2]), torch.tensor([4]), 6)
    assert input_ids[mask].tolist() == [5, 9]
    assert last_valid_index(mask).tolist() == [3]


def test_last_valid_index_with_padding_on_either_side_and_holes() -> None:
    mask = torch.tensor([[1, 1, 0, 0], [0, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]])
    assert last_valid_index(mask).tolist() == [1, 3, 2, 0]
    assert last_valid_index(mask.float()).tolist() == [1, 3, 2, 0]


@pytest.mark.parametrize("mask", [torch.tensor([[1, 0], [0, 0]]), torch.ones(2, 0)])
def test_last_valid_index_refuses_an_empty_row(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="has no valid token"):
        last_valid_index(mask)


def test_masked_sum_and_mean_by_hand() -> None:
    values = torch.tensor([[1.0, 2.0, NAN], [4.0, INF, 6.0], [NAN, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [0, 0, 0]])
    assert masked_sum(values, mask).item() == 13.0
    assert masked_sum(values, mask, dim=1).tolist() == [3.0, 10.0, 0.0]
    assert masked_mean(values, mask).item() == 13.0 / 4
    assert masked_mean(values, mask, dim=1).tolist() == [1.5, 5.0, 0.0]
    assert masked_mean(values, mask, dim=0).tolist() == [2.5, 2.0, 6.0]
    assert masked_mean(values, torch.zeros(3, 3)).item() == 0.0


def test_masked_values_send_no_gradient() -> None:
    values = torch.tensor([[1.0, NAN, 3.0]], requires_grad=True)
    masked_mean(values, torch.tensor([[True, False, True]])).backward()
    assert values.grad is not None
    assert values.grad.tolist() == [[0.5, 0.0, 0.5]]


def test_whiten_by_hand() -> None:
    # 1, 3, 5: mean 3, sample variance (4 + 0 + 4) / 2 = 4, so -1, 0, 1; the 100 is masked.
    values = torch.tensor([[1.0, 3.0, 100.0], [5.0, NAN, NAN]], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    expected = torch.tensor([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(masked_whiten(values, mask), expected, rtol=1e-8, atol=1e-8)
    kept_mean = masked_whiten(values, mask, shift_mean=False)
    torch.testing.assert_close(kept_mean, (expected + 3) * mask, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("mask", [[1] * 8, [0, 1] + [0] * 6, [0] * 8])
def test_whiten_without_variance_is_exactly_zero(mask: list[int]) -> None:
    # The mean of eight float32 0.1s is not 0.1: a plain formula gives 1e-8 / 1e-4 here.
    values, mask_ = torch.full((1, 8), 0.1), torch.tensor([mask])
    assert masked_whiten(values, mask_).tolist() == [[0.0] * 8]
    assert torch.equal(masked_whiten(values, mask_, shift_mean=False), values * mask_)


@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.integers(0, 4))
def test_whiten_is_the_standard_score_whatever_the_padding(xs: list[float], pad: int) -> None:
    values = torch.tensor([xs + [1e6] * pad], dtype=torch.float64)
    mask = torch.tensor([[1] * len(xs) + [0] * pad])
    variance = statistics.variance(xs)
    expected = [(x - statistics.fmean(xs)) / math.sqrt(variance + 1e-8) for x in xs] + [0.0] * pad
    if variance == 0:
        expected = [0.0] * len(expected)
    assert masked_whiten(values, mask)[0].tolist() == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(AssertionError):
        masked_mean(torch.ones(3), torch.ones(2, 3))
    with pytest.raises(AssertionError):
        masked_whiten(torch.ones(2, 1), torch.ones(2, 3))
