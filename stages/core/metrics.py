"""What evaluation reports. `_N` records."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def first_error_f1(predicted: Sequence[int], true: Sequence[int]) -> dict[str, float]:
    """First-error F1 of a process reward model (ProcessBench, Zheng et al. 2024, section 3).

    predicted, true: for each solution the index of its first wrong step, or -1 if none is wrong.
    Returns accuracy_erroneous and accuracy_correct, the share of solutions with and without an
    error that are judged exactly right, and f1, their harmonic mean. An accuracy without
    solutions to measure it on is NaN, and f1 with it. Raises ValueError if the counts differ.
    """
    if len(predicted) != len(true):
        raise ValueError(f"{len(predicted)} predictions for {len(true)} solutions")
    erroneous = [p == t for p, t in zip(predicted, true, strict=True) if t != -1]
    correct = [p == t for p, t in zip(predicted, true, strict=True) if t == -1]
    on_erroneous = sum(erroneous) / len(erroneous) if erroneous else math.nan
    on_correct = sum(correct) / len(correct) if correct else math.nan
    total = on_erroneous + on_correct
    f1 = 0.0 if total == 0 else 2 * on_erroneous * on_correct / total
    return {"accuracy_erroneous": on_erroneous, "accuracy_correct": on_correct, "f1": f1}


def expected_calibration_error(probabilities: Tensor, labels: Tensor, num_bins: int = 10) -> float:
    """How far P(right) is from the share that is right (Guo et al. 2017, eq. 3).

    Bins of equal width over [0, 1]; the mean over records of |mean probability - mean label| of
    their bin. probabilities [_N] in [0, 1], labels [_N] of 0 and 1.
    Raises ValueError if there is no record or a probability is outside [0, 1].
    """
    if probabilities.numel() == 0:
        raise ValueError("no records to measure calibration on")
    if not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise ValueError("probabilities must be in [0, 1]: apply softmax or sigmoid first")
    gap = probabilities.double() - labels.double()
    bins = (probabilities.double() * num_bins).long().clamp(max=num_bins - 1)
    per_bin = gap.new_zeros(num_bins).index_add_(0, bins, gap)
    return float(per_bin.abs().sum() / gap.numel())


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """Unbiased pass@k of one problem, 1 - C(n - c, k) / C(n, k) (Chen et al. 2021, eq. 1).

    Raises ValueError unless 0 <= num_correct <= num_samples and 1 <= k <= num_samples.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass@{k} of {num_correct} correct among {num_samples} samples is not defined: "
            "needs 0 <= num_correct <= num_samples and 1 <= k <= num_samples"
        )
    return 1 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def paired_bootstrap(
    differences: Tensor, confidence: float, num_resamples: int, seed: int
) -> tuple[float, float]:
    """Mean difference over records and its one-sided lower confidence bound.

    The percentile bootstrap (Efron and Tibshirani 1993, chapter 13) over records, candidate minus
    baseline on the same record: the bound is the (1 - confidence) quantile of the resampled
    means, the lower neighbour where it falls between two. The same seed gives the same bound.

    differences [_N]. Raises ValueError if there is no record, confidence is not in (0, 1) or
    num_resamples < 1.
    """
    if differences.numel() == 0:
        raise ValueError("no records to compare on")
    if not 0 < confidence < 1 or num_resamples < 1:
        raise ValueError(
            f"needs 0 < confidence < 1 and num_resamples >= 1, got {confidence}, {num_resamples}"
        )
    values = differences.detach().cpu().double()
    generator = torch.Generator().manual_seed(seed)
    num_records = values.numel()
    means = torch.stack(
        [  # one at a time: records x resamples may not fit in memory
            values[torch.randint(num_records, (num_records,), generator=generator)].mean()
            for _ in range(num_resamples)
        ]
    )
    lower = torch.quantile(means, 1 - confidence, interpolation="lower")
    return float(values.mean()), float(lower)
