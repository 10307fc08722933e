import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.shaping import (
    aggregate_steps,
    overlong_penalty,
    place_step_rewards,
    potential_based,
)

probabilities = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_overlong_penalty_by_hand() -> None:
    # DAPO's own numbers: 16384 expected tokens, 4096 more as the buffer.
    lengths = torch.tensor([0, 16384, 16384 + 1024, 16384 + 4096, 16384 + 4097])
    assert overlong_penalty(lengths, 20480, 4096).tolist() == [0, 0, -0.25, -1, -1]
    assert overlong_penalty(torch.tensor([0, 1, 2]), 2, 2).tolist() == [0, -0.5, -1]


@given(st.integers(0, 40), st.integers(1, 20))
def test_overlong_penalty_against_equation_13(length: int, buffer: int) -> None:
    max_length = 20
    if length <= max_length - buffer:
        expected = 0.0
    elif length <= max_length:
        expected = ((max_length - buffer) - length) / buffer
    else:
        expected = -1.0
    penalty = overlong_penalty(torch.tensor([length]), max_length, buffer)
    assert penalty.item() == pytest.approx(expected)


@pytest.mark.parametrize("buffer", [0, -1, 11])
def test_overlong_penalty_refuses_a_buffer_that_does_not_fit(buffer: int) -> None:
    with pytest.raises(ValueError, match=r"buffer must be in 1\.\.max_length"):
        overlong_penalty(torch.tensor([1]), 10, buffer)


def test_aggregates_by_hand() -> None:
    scores = f64(0.5, 0.25, 0.75)
    assert aggregate_steps(scores, "min").item() == 0.25
    assert aggregate_steps(scores, "product").item() == pytest.approx(0.09375)
    assert aggregate_steps(scores, "mean").item() == 0.5
    assert aggregate_steps(scores, "last").item() == 0.75


@given(probabilities)
def test_aggregates_order_themselves(scores: list[float]) -> None:
    # of probabilities: product <= min <= mean
    product, smallest, mean = (
        aggregate_steps(f64(*scores), how).item() for how in ("product", "min", "mean")
    )
    assert product == pytest.approx(math.prod(scores))
    assert product <= smallest + 1e-12
    assert smallest <= mean + 1e-12


def test_no_steps_have_no_aggregate() -> None:
    with pytest.raises(ValueError, match=r"^no steps to aggregate: .* a score of its own$"):
        aggregate_steps(f64(), "min")


def test_potential_based_by_hand() -> None:
    # 0.5 - 0, 0.9 - 0.5, 0.2 - 0.9; with gamma 0.5: 0.25 - 0, 0.45 - 0.5, 0.1 - 0.9
    scores = f64(0.5, 0.9, 0.2)
    assert potential_based(scores).tolist() == pytest.approx([0.5, 0.4, -0.7])
    assert potential_based(scores, gamma=0.5).tolist() == pytest.approx([0.25, -0.05, -0.8])
    assert potential_based(f64()).tolist() == []
    assert potential_based(f64(0.3)).tolist() == [0.3]


@given(probabilities, st.sampled_from([0.5, 0.9, 1.0]))
def test_potential_based_telescopes(scores: list[float], gamma: float) -> None:
    shaped = potential_based(f64(*scores), gamma).tolist()
    total = sum(gamma**s * reward for s, reward in enumerate(shaped))
    assert total == pytest.approx(gamma ** len(scores) * scores[-1], abs=1e-12)


@given(probabilities, st.integers(1, 9))
def test_more_steps_pay_no_more(scores: list[float], repeats: int) -> None:
    # Saying the last step again, equally well, earns nothing; a raw sum of scores would pay it.
    padded = scores + [scores[-1]] * repeats
    short, long = potential_based(f64(*scores)).sum(), potential_based(f64(*padded)).sum()
    assert long.item() == pytest.approx(short.item(), abs=1e-12)


def test_place_step_rewards_by_hand() -> None:
    # first and last token; two steps on one token add up; no steps at all
    placed = place_step_rewards(
        [f64(1, 2), f64(3, 4), f64()],
        [torch.tensor([0, 3]), torch.tensor([2, 2]), torch.tensor([], dtype=torch.long)],
        width=4,
    )
    assert placed.dtype == torch.float64
    assert placed.tolist() == [[1, 0, 0, 2], [0, 0, 7, 0], [0, 0, 0, 0]]


def test_place_step_rewards_takes_the_first_number_format() -> None:
    # a reward model in half precision beside one in single: the first row decides
    placed = place_step_rewards([f64(1).float(), f64(2)], [torch.tensor([0])] * 2, width=1)
    assert placed.dtype == torch.float32
    assert placed.tolist() == [[1], [2]]


@pytest.mark.parametrize("end", [-1, 3])
def test_step_end_outside_the_width_is_refused(end: int) -> None:
    with pytest.raises(ValueError, match=r"sequence 1: step ends .* leave 0\.\.2"):
        place_step_rewards([f64(1), f64(1)], [torch.tensor([0]), torch.tensor([end])], 3)


def test_counts_that_differ_are_refused() -> None:
    with pytest.raises(ValueError, match="sequence 0: 2 step rewards but 1 step ends"):
        place_step_rewards([f64(1, 2)], [torch.tensor([0])], 3)
    with pytest.raises(ValueError, match="same sequences"):
        place_step_rewards([f64(1)], [], 3)
    with pytest.raises(ValueError, match=r"sequences, at least one$"):
        place_step_rewards([], [], 3)


def test_unknown_aggregate_is_a_mistake_of_ours() -> None:
    with pytest.raises(AssertionError, match="'max'"):
        aggregate_steps(f64(1), "max")  # type: ignore[arg-type]
