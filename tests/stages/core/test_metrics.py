import itertools
import math
import statistics

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from stages.core.metrics import (
    expected_calibration_error,
    first_error_f1,
    paired_bootstrap,
    pass_at_k,
)


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_first_error_f1_by_hand() -> None:
    # erroneous: 2 of 4 found at the right step (one called correct, one at a wrong step);
    # correct: 3 of 5. F1 = 2 * 0.5 * 0.6 / 1.1
    true = [0, 3, 2, 5, -1, -1, -1, -1, -1]
    predicted = [0, 3, -1, 4, -1, -1, -1, 0, 2]
    result = first_error_f1(predicted, true)
    assert result == {
        "accuracy_erroneous": 0.5,
        "accuracy_correct": 0.6,
        "f1": pytest.approx(0.6 / 1.1),
    }


def test_first_error_f1_at_its_ends() -> None:
    assert first_error_f1([0, -1], [0, -1])["f1"] == 1.0
    assert first_error_f1([-1, 2], [0, -1])["f1"] == 0.0
    only_correct = first_error_f1([-1], [-1])
    assert only_correct["accuracy_correct"] == 1.0
    assert math.isnan(only_correct["accuracy_erroneous"])
    assert math.isnan(only_correct["f1"])
    assert math.isnan(first_error_f1([0], [0])["accuracy_correct"])
    with pytest.raises(ValueError, match="1 predictions for 2 solutions"):
        first_error_f1([0], [0, 1])


def test_expected_calibration_error_by_hand() -> None:
    # bin [0.2, 0.3): 0.2 and 0.25, labels 0 and 1: |0.225 - 0.5|, weight 2/4;
    # bin [0.9, 1]: 0.9 and 1.0, labels 1 and 1: |0.95 - 1|, weight 2/4
    error = expected_calibration_error(f64(0.2, 0.25, 0.9, 1.0), torch.tensor([0, 1, 1, 1]))
    assert error == pytest.approx(0.5 * 0.275 + 0.5 * 0.05)
    assert expected_calibration_error(f64(0.5, 0.5), torch.tensor([0, 1]), num_bins=1) == 0.0


@given(
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1)), min_size=1, max_size=20),
    st.integers(1, 12),
)
def test_expected_calibration_error_against_the_loop(
    records: list[tuple[float, int]], num_bins: int
) -> None:
    bins: dict[int, list[tuple[float, int]]] = {}
    for probability, label in records:
        bins.setdefault(min(int(probability * num_bins), num_bins - 1), []).append(
            (probability, label)
        )
    expected = sum(
        len(b)
        / len(records)
        * abs(statistics.fmean(p for p, _ in b) - statistics.fmean(y for _, y in b))
        for b in bins.values()
    )
    error = expected_calibration_error(
        f64(*[p for p, _ in records]), torch.tensor([y for _, y in records]), num_bins
    )
    assert error == pytest.approx(expected, abs=1e-12)


def test_expected_calibration_error_refuses() -> None:
    with pytest.raises(ValueError, match="no records"):
        expected_calibration_error(f64(), f64())
    for bad in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"must be in \[0, 1\]"):
            expected_calibration_error(f64(bad), f64(1))


@pytest.mark.parametrize(("n", "c"), [(5, 0), (5, 1), (5, 2), (5, 4), (5, 5), (1, 1)])
def test_pass_at_k_against_every_draw(n: int, c: int) -> None:
    for k in range(1, n + 1):
        draws = list(itertools.combinations([1] * c + [0] * (n - c), k))
        expected = sum(any(draw) for draw in draws) / len(draws)
        assert pass_at_k(n, c, k) == pytest.approx(expected)


def test_pass_at_k_of_many_samples_and_refusals() -> None:
    # 1 - prod_{i=n-c+1}^{n} (1 - k / i), the paper's stable form
    expected = 1 - math.prod(1 - 100 / i for i in range(1990 + 1, 2000 + 1))
    assert pass_at_k(2000, 10, 100) == pytest.approx(expected)
    for n, c, k in ((5, 6, 1), (5, -1, 1), (5, 1, 0), (5, 1, 6)):
        with pytest.raises(ValueError, match="is not defined"):
            pass_at_k(n, c, k)


def test_paired_bootstrap_of_two_records_by_hand() -> None:
    # Records 0 and 1: a resample's mean is 0, 1/2, 1 with chances 1/4, 1/2, 1/4. The 10% quantile
    # is 0 and the 40% quantile is 1/2 but for a chance of nothing in 2000 resamples.
    differences = f64(0, 1)
    assert paired_bootstrap(differences, 0.9, 2000, seed=1) == (0.5, 0.0)
    assert paired_bootstrap(differences, 0.6, 2000, seed=1) == (0.5, 0.5)


def test_paired_bootstrap_takes_the_lower_neighbour() -> None:
    # The 40% quantile of two resampled means lies between them; the bound is the lower one.
    for seed in range(20):
        assert paired_bootstrap(f64(0, 1), 0.6, 2, seed)[1] in (0.0, 0.5, 1.0)


def test_paired_bootstrap_is_near_the_normal_bound() -> None:
    differences = torch.randn(400, generator=torch.Generator().manual_seed(0)) + 0.3
    mean, lower = paired_bootstrap(differences, 0.95, 2000, seed=0)
    standard_error = differences.std().item() / math.sqrt(400)
    assert mean == pytest.approx(differences.double().mean().item())
    assert lower == pytest.approx(mean - 1.645 * standard_error, abs=0.15 * standard_error)


def test_paired_bootstrap_is_deterministic_in_its_seed_alone() -> None:
    differences = torch.randn(30, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    first = paired_bootstrap(differences, 0.95, 100, seed=3)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    assert paired_bootstrap(differences, 0.95, 100, seed=3) == first
    assert torch.equal(torch.get_rng_state(), before)
    assert paired_bootstrap(differences, 0.95, 100, seed=4) != first
    # a constant difference has no spread
    assert paired_bootstrap(torch.full((5,), 0.25), 0.95, 10, seed=0) == (0.25, 0.25)


def test_paired_bootstrap_refuses() -> None:
    with pytest.raises(ValueError, match="no records"):
        paired_bootstrap(f64(), 0.95, 10, 0)
    for confidence, num_resamples in ((0.0, 10), (1.0, 10), (0.95, 0)):
        with pytest.raises(ValueError, match="needs 0 < confidence < 1"):
            paired_bootstrap(f64(1), confidence, num_resamples, 0)
