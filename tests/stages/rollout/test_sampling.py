"""Drawing from logits: exact sets, exact probabilities."""

import random

import numpy as np
import pytest
import torch
from scipy import stats

from schemas.rl import SamplingConfig
from stages.rollout.sampling import sample
from stages.rollout.streams import uniforms


def grid(num: int) -> torch.Tensor:
    """Numbers spread evenly over (0, 1): what is drawn with them counts probabilities."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


def shares(logits: torch.Tensor, sampling: SamplingConfig, num: int = 5_000) -> torch.Tensor:
    tokens, _ = sample(logits.expand(num, -1), grid(num), sampling)
    return torch.bincount(tokens, minlength=len(logits)).double() / num


@pytest.mark.parametrize("size", [7, 1024, 1025, 3000])
@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_shares_are_the_softmax(size: int, temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(size) * 2
    logits[3] = -torch.inf
    sampling = SamplingConfig(temperature=temperature, max_completion_tokens=1)
    expected = (logits.double() / temperature).softmax(0)
    found = shares(logits, sampling)
    assert found[3] == 0
    # Each token owns one interval (and shares its ends), so a count is off by one at most.
    assert torch.allclose(found, expected, atol=1.5 / 5_000, rtol=0)


@pytest.mark.parametrize(
    ("top_p", "top_k", "kept"),
    [
        (0.5, 0, [4]),  # reaches p with the first token exactly
        (0.51, 0, [4, 1]),
        (0.75, 0, [4, 1]),
        (0.76, 0, [4, 1, 3]),
        (1.0, 3, [4, 1, 3]),
        (1.0, 1, [4]),
        (1.0, 99, [0, 1, 2, 3, 4]),
        (0.6, 2, [4]),  # of the two that top-k leaves, the first holds two thirds
        (0.7, 2, [4, 1]),
    ],
)
def test_top_p_and_top_k_keep_exactly_these(top_p: float, top_k: int, kept: list[int]) -> None:
    probabilities = torch.tensor([1, 4, 1, 2, 8], dtype=torch.float64) / 16
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    sampling = SamplingConfig(top_p=top_p, top_k=top_k, max_completion_tokens=1)
    found = shares(probabilities.log(), sampling)
    assert torch.allclose(found, expected, atol=1.5 / 5_000, rtol=0)


@pytest.mark.parametrize(
    ("min_p", "top_p", "top_k", "kept"),
    [
        (0.5, 1.0, 0, [4, 1]),  # half of the likeliest, exactly
        (0.51, 1.0, 0, [4]),
        (0.25, 1.0, 0, [4, 1, 3]),
        (0.125, 1.0, 0, [0, 1, 2, 3, 4]),
        (1.0, 1.0, 0, [4]),
        (0.25, 1.0, 2, [4, 1]),
        (0.25, 0.57, 0, [4]),  # of the three that min-p leaves, the first holds 8 / 14
        (0.25, 0.58, 0, [4, 1]),
        (0.25, 0.58, 1, [4]),
    ],
)
def test_min_p_goes_before_top_k_and_top_p(
    min_p: float, top_p: float, top_k: int, kept: list[int]
) -> None:
    probabilities = torch.tensor([1, 4, 1, 2, 8], dtype=torch.float64) / 16
    expected = torch.zeros(5, dtype=torch.float64)
    expected[kept] = probabilities[kept] / probabilities[kept].sum()
    sampling = SamplingConfig(min_p=min_p, top_p=top_p, top_k=top_k, max_completion_tokens=1)
    found = shares(probabilities.log(), sampling)
    assert torch.allclose(found, expected, atol=1.5 / 5_000, rtol=0)


@pytest.mark.parametrize("seed", range(60))
def test_shares_are_those_of_an_enumeration(seed: int) -> None:
    """Against the rules applied one after the other to a sorted list of probabilities."""
    choose = random.Random(seed).choice
    size, temperature = choose([3, 40, 1030, 2100]), choose([0.5, 1.0, 1.7])
    min_p, top_k = choose([0.0, 0.02, 0.3, 0.9]), choose([0, 0, 1, 5, 5000])
    top_p = choose([1.0, 0.9, 0.3])
    logits = torch.randn(size, generator=torch.Generator().manual_seed(seed)) * 2
    probabilities = (logits.double() / temperature).softmax(0)
    ranked = sorted(enumerate(probabilities.tolist()), key=lambda pair: -pair[1])
    kept = [(token, p) for token, p in ranked if p >= min_p * ranked[0][1]]
    kept = kept[: top_k or size]
    total, before, nucleus = sum(p for _, p in kept), 0.0, []
    for token, p in kept:
        if before < top_p * total or top_p == 1.0:
            nucleus.append((token, p))
        before += p
    left = sum(p for _, p in nucleus)
    expected = torch.zeros(size, dtype=torch.float64)
    for token, p in nucleus:
        expected[token] = p / left
    sampling = SamplingConfig(
        temperature=temperature,
        min_p=min_p,
        top_k=top_k,
        top_p=top_p,
        max_completion_tokens=1,
    )
    tokens, logprobs = sample(logits.expand(2_000, -1), grid(2_000), sampling)
    found = torch.bincount(tokens, minlength=size).double() / 2_000
    assert torch.allclose(found, expected, atol=1.5 / 2_000, rtol=0)
    assert torch.allclose(logprobs.double(), probabilities.log()[tokens], atol=1e-5)


@pytest.mark.parametrize("scale", [0.1, 1.0, 5.0])
def test_top_p_of_a_large_vocabulary_is_that_of_a_sort(scale: float) -> None:
    """A flat distribution needs more candidates than are looked at first."""
    torch.manual_seed(1)
    logits = torch.randn(1500) * scale
    probabilities, order = logits.double().softmax(0).sort(descending=True)
    kept = order[probabilities.cumsum(0) - probabilities < 0.9]
    sampling = SamplingConfig(top_p=0.9, max_completion_tokens=1)
    found = set(shares(logits, sampling, num=8_000).nonzero().squeeze(1).tolist())
    assert found <= set(kept.tolist())
    assert len(kept) - len(found) <= 0.01 * len(kept) + 1


def test_logprobs_are_of_the_whole_tempered_distribution() -> None:
    torch.manual_seed(2)
    logits = torch.randn(50, 30)
    sampling = SamplingConfig(temperature=0.6, top_p=0.5, top_k=4, max_completion_tokens=1)
    tokens, logprobs = sample(logits, grid(50), sampling)
    expected = (logits.double() / 0.6).log_softmax(-1).gather(1, tokens[:, None]).squeeze(1)
    assert torch.allclose(logprobs.double(), expected, atol=1e-6)


def test_greedy_takes_the_highest_with_its_logprob_at_temperature_1() -> None:
    torch.manual_seed(3)
    logits = torch.randn(9, 30)
    sampling = SamplingConfig(temperature=0, max_completion_tokens=1)
    tokens, logprobs = sample(logits, grid(9), sampling)
    assert tokens.equal(logits.argmax(-1))
    assert torch.allclose(logprobs, logits.log_softmax(-1).amax(-1), atol=1e-6)


@pytest.mark.parametrize("size", [20, 2000])
def test_bfloat16_and_extreme_numbers_stay_inside(size: int) -> None:
    logits = torch.full((2, size), -1e4, dtype=torch.bfloat16)
    logits[:, 5] = 1e4
    ends = torch.tensor([2.0**-33, 1 - 2.0**-33], dtype=torch.float64)
    tokens, logprobs = sample(logits, ends, SamplingConfig(max_completion_tokens=1))
    assert tokens.tolist() == [5, 5]
    assert logprobs.tolist() == [0.0, 0.0]


def test_uniforms_are_uniform_and_of_their_row_alone() -> None:
    prompt, number = (a.ravel() for a in np.meshgrid(np.arange(50), np.arange(8), indexing="ij"))
    drawn = uniforms(5, prompt, number, 64)
    assert drawn.min() > 0
    assert drawn.max() < 1
    assert stats.kstest(drawn.ravel(), "uniform").pvalue > 0.01
    # Columns, rows and neighbours are as uncorrelated as 25,600 numbers can show.
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(drawn[:-1].ravel(), drawn[1:].ravel())[0, 1]) < 0.02
    assert np.array_equal(uniforms(5, prompt[9:10], number[9:10], 64)[0], drawn[9])
    assert np.array_equal(uniforms(5, prompt, number, 9), drawn[:, :9])
    assert len(np.unique(drawn[:, 0])) == 400
    assert not np.array_equal(uniforms(6, prompt, number, 64), drawn)
    # Prompt 1, sample 0 is not prompt 0, sample 1; a negative seed is a seed.
    assert not np.array_equal(drawn[1], drawn[8])
    assert uniforms(-1, prompt, number, 2).shape == (400, 2)
