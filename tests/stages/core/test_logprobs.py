import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from stages.core import logprobs as logprobs_module
from stages.core.logprobs import (
    KEPT_ELEMENTS,
    chunked_token_logprobs,
    token_logprobs,
    token_logprobs_and_entropy,
    weighted_logprob_sum,
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def by_loop(logits: list[float], target: int, temperature: float) -> tuple[float, float]:
    """Softmax as in a textbook, one token at a time."""
    weights = [math.exp(x / temperature) for x in logits]
    probs = [w / sum(weights) for w in weights]
    return math.log(probs[target]), -sum(p * math.log(p) for p in probs)


def test_by_hand() -> None:
    # logits log 1, log 3 -> p 1/4, 3/4. At temperature 0.5 the odds are squared: 1/10, 9/10.
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]], dtype=torch.float64)
    targets = torch.tensor([[0, 1]])
    expected = [[math.log(1 / 4), math.log(3 / 4)]]
    assert token_logprobs(logits, targets).tolist()[0] == pytest.approx(expected[0])
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, temperature=0.5)
    assert logprobs.tolist()[0] == pytest.approx([math.log(0.1), math.log(0.9)])
    h = -0.1 * math.log(0.1) - 0.9 * math.log(0.9)
    assert entropy.tolist()[0] == pytest.approx([h, h])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7])
def test_against_the_loop(temperature: float) -> None:
    logits = random(2, 3, 5) * 3
    targets = torch.tensor([[0, 4, 2], [1, 1, 3]])
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, temperature)
    for b in range(2):
        for t in range(3):
            expected = by_loop(logits[b, t].tolist(), int(targets[b, t]), temperature)
            assert (logprobs[b, t].item(), entropy[b, t].item()) == pytest.approx(expected)
    assert torch.equal(logprobs, token_logprobs(logits, targets, temperature))


def test_half_precision_logits_are_upcast_first() -> None:
    logits = (random(1, 4, 50) * 5).bfloat16()
    targets = torch.zeros(1, 4, dtype=torch.long)
    logprobs = token_logprobs(logits, targets, 0.7)
    assert logprobs.dtype == torch.float32
    hidden, weight = random(4, 8).bfloat16(), random(50, 8, seed=1).bfloat16()
    chunked, entropy = chunked_token_logprobs(hidden, weight, targets[0], 0.7)
    assert chunked.dtype == entropy.dtype == torch.float32
    assert torch.equal(chunked, token_logprobs(hidden @ weight.T, targets[0], 0.7))
    exact = token_logprobs(logits.double(), targets, 0.7)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(logprobs.double(), exact, rtol=1e-6, atol=1e-6)


def test_huge_logits_do_not_overflow() -> None:
    logits = torch.tensor([[[1e4, 1e4 - 1, -1e4]]])
    expected = -math.log(1 + math.exp(-1))
    assert token_logprobs(logits, torch.tensor([[0]])).item() == pytest.approx(expected, rel=1e-6)


def test_banned_token_keeps_entropy_and_gradient_finite() -> None:
    # two tokens of equal weight and a banned one: entropy log 2, gradient 0 by symmetry
    logits = torch.tensor([[[1.0, 1.0, -math.inf]]], requires_grad=True)
    _, entropy = token_logprobs_and_entropy(logits, torch.tensor([[0]]))
    assert entropy.item() == pytest.approx(math.log(2))
    entropy.sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == pytest.approx([0.0, 0.0, 0.0], abs=1e-7)


def test_gradients() -> None:
    logits = random(1, 2, 4).requires_grad_()
    targets = torch.tensor([[3, 0]])
    assert torch.autograd.gradcheck(
        lambda x: token_logprobs_and_entropy(x, targets, 0.8), (logits,)
    )


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature must be above 0"):
        token_logprobs(torch.zeros(1, 1, 2), torch.zeros(1, 1, dtype=torch.long), temperature)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("with_bias", [False, True])
def test_chunked_equals_unchunked(chunk_size: int, with_bias: bool) -> None:
    hidden = random(7, 3).requires_grad_()
    weight = random(5, 3, seed=1).requires_grad_()
    bias = random(5, seed=2).requires_grad_() if with_bias else None
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    leaves = [hidden, weight] + ([bias] if bias is not None else [])
    upstream = random(7, seed=3)

    logprobs, entropy = chunked_token_logprobs(hidden, weight, targets, 0.6, chunk_size, bias)
    logits = hidden @ weight.T + (0 if bias is None else bias)
    expected, expected_entropy = token_logprobs_and_entropy(logits, targets, 0.6)

    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    assert not entropy.requires_grad
    got = torch.autograd.grad((logprobs * upstream).sum(), leaves)
    want = torch.autograd.grad((expected * upstream).sum(), leaves)
    torch.testing.assert_close(got, want)


def test_chunked_gradcheck() -> None:
    targets = torch.tensor([1, 0, 3, 2, 2])
    inputs = (
        random(5, 3).requires_grad_(),
        random(4, 3, seed=1).requires_grad_(),
        random(4, seed=2).requires_grad_(),
    )
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_token_logprobs(h, w, targets, 0.9, 2, b)[0], inputs
    )


def test_chunked_without_tokens_without_gradients_and_with_a_bad_chunk_size() -> None:
    weight = random(4, 3)
    empty = torch.zeros(0, dtype=torch.long)
    logprobs, entropy = chunked_token_logprobs(random(0, 3), weight, empty)
    assert logprobs.shape == entropy.shape == (0,)
    with torch.no_grad():
        logprobs, _ = chunked_token_logprobs(random(2, 3), weight, torch.tensor([0, 1]))
    assert not logprobs.requires_grad
    with pytest.raises(ValueError, match="chunk_size must be at least 1"):
        chunked_token_logprobs(random(2, 3), weight, torch.tensor([0, 1]), chunk_size=0)


class Watch(TorchDispatchMode):
    """Every tensor that an operation gives, in the forward and the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, weakref.ref[Tensor]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if isinstance(tensor, Tensor):
                self.seen.append((tensor.numel(), weakref.ref(tensor)))
        return out

    @property
    def largest(self) -> int:
        return max(numel for numel, _ in self.seen)

    def num_alive(self, min_numel: int) -> int:
        return sum(numel >= min_numel and ref() is not None for numel, ref in self.seen)


def test_chunked_never_makes_more_than_a_chunk_of_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs_module, "KEPT_ELEMENTS", 3 * 4 * 50)
    hidden = random(64, 2).requires_grad_()
    weight = random(50, 2, seed=1).requires_grad_()
    targets = torch.zeros(64, dtype=torch.long)
    with Watch() as watch:
        logprobs, _ = chunked_token_logprobs(hidden, weight, targets, chunk_size=4)
        assert watch.num_alive(min_numel=4 * 50) == 3  # these wait for the backward pass
        logprobs.sum().backward()
    assert watch.largest == 4 * 50
    with Watch() as watch, torch.no_grad():
        logprobs, _ = chunked_token_logprobs(hidden, weight, targets, chunk_size=4)
        assert watch.num_alive(min_numel=4 * 50) == 0
    with Watch() as watch:  # and the watch does see what it should
        logprobs = token_logprobs(hidden @ weight.T, targets)
        assert watch.num_alive(min_numel=4 * 50) > 0
    assert watch.largest == 64 * 50


def test_kept_logits_change_no_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for kept in (0, 1, 100):
        monkeypatch.setattr(logprobs_module, "KEPT_ELEMENTS", kept * 2 * 5)
        hidden = random(7, 3).bfloat16().requires_grad_()
        weight = random(5, 3, seed=1).float().requires_grad_()
        targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])
        logprobs, entropy = chunked_token_logprobs(hidden, weight, targets, 0.6, 2)
        loss = (logprobs * random(7, seed=3).float()).sum()
        # A second backward pass makes again what the first has used up.
        first, again = (
            torch.autograd.grad(loss, [hidden, weight], retain_graph=True) for _ in range(2)
        )
        found.append((logprobs.detach(), entropy, *first, *again))
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            assert torch.equal(one, two)


def test_the_product_is_in_the_format_of_hidden() -> None:
    weight = random(5, 3, seed=1).float().requires_grad_()
    bias = random(5, seed=2).float().requires_grad_()
    targets = torch.tensor([0, 4])
    for dtype, surroundings in ((torch.float32, True), (torch.bfloat16, False)):
        hidden = random(2, 3).to(dtype).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=surroundings):
            logprobs, _ = chunked_token_logprobs(hidden, weight, targets, bias=bias)
        logits = (hidden @ weight.to(dtype).T + bias.to(dtype)).detach()
        expected = logits.float().log_softmax(-1).gather(1, targets[:, None])[:, 0]
        torch.testing.assert_close(logprobs.detach(), expected, atol=1e-2, rtol=1e-2)
        if dtype == torch.float32:
            torch.testing.assert_close(logprobs.detach(), expected)
        logprobs.sum().backward()
        assert hidden.grad is not None and hidden.grad.dtype == dtype
        assert bias.grad is not None and bias.grad.dtype == torch.float32


def test_chunked_at_the_edges_of_what_numbers_can_hold() -> None:
    """A banned token, and one whose probability underflows."""
    weight = torch.tensor([[0.0], [1.0], [2.0], [3.0]]).requires_grad_()
    bias = torch.tensor([-math.inf, 0.0, 0.0, 0.0])
    hidden = torch.tensor([[1.0], [300.0]]).requires_grad_()
    targets = torch.tensor([2, 1])
    logprobs, entropy = chunked_token_logprobs(hidden, weight, targets, bias=bias)
    log_sum = math.log(math.exp(1) + math.exp(2) + math.exp(3))
    probs = [math.exp(x - log_sum) for x in (1, 2, 3)]
    torch.testing.assert_close(logprobs.detach(), torch.tensor([2 - log_sum, -600.0]))
    torch.testing.assert_close(
        entropy, torch.tensor([-sum(p * math.log(p) for p in probs), 0.0]), atol=1e-6, rtol=1e-6
    )
    logprobs.sum().backward()
    assert hidden.grad is not None and bool(hidden.grad.isfinite().all())
    # d/dh of log p_1 at h = 300: w_1 - E[w] = 1 - 3.
    torch.testing.assert_close(hidden.grad[1], torch.tensor([-2.0]))


@pytest.mark.parametrize("kept", [0, KEPT_ELEMENTS])
@pytest.mark.parametrize("chunk_size", [1, 3, 100])
def test_a_weighted_sum_and_its_gradient_come_from_one_pass(
    chunk_size: int, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.core.logprobs.KEPT_ELEMENTS", kept)
    leaves = [
        random(7, 3).requires_grad_(),
        random(5, 3, seed=1).requires_grad_(),
        random(5, seed=2).requires_grad_(),
    ]
    hidden, weight, bias = leaves
    targets = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    weights = random(7, seed=3)
    total, logprobs, entropy = weighted_logprob_sum(
        hidden, weight, targets, weights, 0.6, chunk_size, bias
    )
    expected, expected_entropy = token_logprobs_and_entropy(hidden @ weight.T + bias, targets, 0.6)
    torch.testing.assert_close(logprobs, expected)
    torch.testing.assert_close(entropy, expected_entropy)
    torch.testing.assert_close(total, (expected * weights).sum())
    assert total.requires_grad and not logprobs.requires_grad and not entropy.requires_grad
    # Twice the sum, so that what comes from above counts.
    got = torch.autograd.grad(2 * total, leaves)
    want = torch.autograd.grad((2 * expected * weights).sum(), leaves)
    torch.testing.assert_close(got, want)


def test_a_weighted_sum_whose_logits_are_kept_adds_to_the_gradient_in_place() -> None:
    hidden, weight = random(4, 3), random(5, 3, seed=1).requires_grad_()
    targets, token_weights = torch.tensor([0, 1, 2, 3]), random(4, seed=2)
    (once,) = torch.autograd.grad(
        weighted_logprob_sum(hidden, weight, targets, token_weights)[0], weight
    )
    from_autograd: list[Tensor | None] = []
    weight.register_hook(from_autograd.append)
    for _ in range(2):
        weighted_logprob_sum(hidden, weight, targets, token_weights)[0].backward()
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, 2 * once)
    assert from_autograd[1] is None  # the second time nothing is left for autograd to add


@pytest.mark.parametrize("kept", [0, KEPT_ELEMENTS])
def test_a_copy_of_the_weight_is_what_is_multiplied(
    kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.core.logprobs.KEPT_ELEMENTS", kept)
    hidden, weight = random(4, 3).bfloat16(), random(5, 3, seed=1).float().requires_grad_()
    targets, copy = torch.tensor([0, 1, 2, 3]), weight.detach().bfloat16()
    for given in (copy, 2 * copy):
        doubled = weight if given is copy else (2 * weight).detach()
        found, expected = (
            weighted_logprob_sum(hidden, one, targets, torch.ones(4), copy=two)[1]
            for one, two in ((weight, given), (doubled, None))
        )
        assert torch.equal(found, expected)


def test_a_frozen_head_gets_no_gradient() -> None:
    hidden = random(4, 3).float().requires_grad_()
    total, _, _ = weighted_logprob_sum(
        hidden, random(5, 3, seed=1).float(), torch.tensor([0, 1, 2, 3]), torch.ones(4)
    )
    total.backward()
    assert hidden.grad is not None and bool(hidden.grad.any())


def test_in_bfloat16_the_gradient_of_the_weight_is_summed_in_float32() -> None:
    """The format of the products follows hidden; rounding does not grow with the chunks."""
    hidden = random(64, 8).bfloat16()
    weight = random(6, 8, seed=1).float().requires_grad_()
    targets = torch.arange(64) % 6
    sums = []
    for chunk_size in (1, 64):
        logprobs, _ = chunked_token_logprobs(hidden, weight, targets, 1.0, chunk_size)
        assert logprobs.dtype == torch.float32
        (gradient,) = torch.autograd.grad(logprobs.sum(), weight)
        assert gradient.dtype == torch.float32
        sums.append(gradient)
    exact = torch.autograd.grad(token_logprobs(hidden.float() @ weight.T, targets).sum(), weight)[0]
    for found in sums:
        assert (found - exact).norm() / exact.norm() < 0.02
