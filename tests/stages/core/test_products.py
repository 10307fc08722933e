"""Products by oneDNN against float64, for every kind of view that a gradient needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.core.products import has_onednn, linear


@pytest.fixture(params=["AVX512", "AVX2"])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """What the processor is taken for, which decides between the libraries; both run anywhere."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: request.param)
    return str(request.param)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_two_by_two_by_hand() -> None:
    states, weight = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 4.0], [5.0, 6.0]])
    # 1 * 3 + 2 * 4 + 0.5, and 1 * 5 + 2 * 6 - 0.5
    assert linear(states, weight, torch.tensor([0.5, -0.5])).tolist() == [[11.5, 16.5]]


@pytest.mark.usefixtures("capability")
@pytest.mark.parametrize("size", [3, 256])  # below and above what oneDNN is asked for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_products_of_transposed_views_are_those_of_float64(size: int, dtype: torch.dtype) -> None:
    states, weight = drawn(size, size + 1).to(dtype), drawn(size + 2, size + 1, seed=1).to(dtype)
    grad = drawn(size, size + 2, seed=2).to(dtype)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}[dtype]
    for left, right in ((states, weight), (grad, weight.T), (grad.T, states.T)):
        expected = left.double() @ right.double().T
        found = linear(left, right)
        assert found.dtype == dtype
        assert (found - expected).norm() / expected.norm() < tolerance


@pytest.mark.usefixtures("capability")
def test_leading_dimensions_stay_and_the_bias_is_added() -> None:
    states, weight, bias = drawn(2, 3, 200, 300), drawn(280, 300, seed=1), drawn(280, seed=2)
    found = linear(states, weight, bias)
    assert found.shape == (2, 3, 200, 280)
    torch.testing.assert_close(found, states @ weight.T + bias, rtol=1e-4, atol=1e-4)
    assert torch.equal(found, linear(states, weight, bias))
    # A view that cannot be flattened without a copy.
    turned = states.transpose(1, 2)
    torch.testing.assert_close(linear(turned, weight), turned @ weight.T, rtol=1e-4, atol=1e-4)


def test_without_rows_there_is_nothing_to_multiply() -> None:
    assert linear(drawn(0, 8), drawn(5, 8)).shape == (0, 5)


def test_products_go_to_the_library_that_is_the_faster_one(capability: str) -> None:
    states, weight = drawn(300, 2048), drawn(300, 2048, seed=1)
    turned = weight.T.contiguous().T

    def by_onednn(weight: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(states, weight, None, "none", [], "")
        return found

    by_mkl = torch.nn.functional.linear(states, turned)
    assert not torch.equal(by_onednn(turned), by_mkl)  # else this could not tell them apart
    assert torch.equal(linear(states, weight), by_onednn(weight))
    expected = by_onednn(turned) if capability == "AVX512" else by_mkl
    assert torch.equal(linear(states, turned), expected)


def test_without_onednn_it_is_torchs_product(monkeypatch: pytest.MonkeyPatch) -> None:
    states, weight = drawn(300, 300), drawn(300, 300, seed=1)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert not has_onednn(states)
    assert torch.equal(linear(states, weight), torch.nn.functional.linear(states, weight))
