"""Products by oneDNN against float64, for every kind of view that a gradient needs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from stages.core import kernels
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


FORMATS = [
    pytest.param(
        dtype,
        marks=pytest.mark.skipif(
            not kernels.multiplies(torch.empty(1, 2, dtype=dtype)), reason="no kernel for it here"
        ),
    )
    for dtype in (torch.float32, torch.bfloat16)
]


@pytest.mark.parametrize("dtype", FORMATS)
class TestFewRows:
    def test_two_by_two_by_hand(self, dtype: torch.dtype) -> None:
        states, weight = torch.tensor([[1.0, 2.0], [0.0, -1.0]]), torch.tensor([[3.0, 4.0]])
        bias = kernels.panels_of_bias(torch.tensor([0.5]))
        found = kernels.product(states.to(dtype), kernels.panels(weight.to(dtype)), 1, bias)
        # 1 * 3 + 2 * 4 + 0.5, and -1 * 4 + 0.5
        assert found.tolist() == [[11.5], [-3.5]]

    # Up to 8 rows go together, and 32 columns; of 300, panels lie in more than one group.
    @pytest.mark.parametrize("rows", [0, *range(1, 10), 29, 100])
    @pytest.mark.parametrize(("columns", "size"), [(1, 2), (31, 64), (33, 250), (300, 2048)])
    @pytest.mark.parametrize("biased", [False, True])
    def test_each_sum_is_that_of_float64_rounded_once(
        self, dtype: torch.dtype, rows: int, columns: int, size: int, biased: bool
    ) -> None:
        states, weight = drawn(rows, size).to(dtype), drawn(columns, size, seed=1).to(dtype)
        bias = drawn(columns, seed=2).to(dtype) if biased else None
        own = None if bias is None else kernels.panels_of_bias(bias)
        found = kernels.product(states, kernels.panels(weight), columns, own)
        expected = states.double() @ weight.double().T + (0 if bias is None else bias.double())
        assert found.dtype == dtype and found.shape == (rows, columns)
        # Half of the last bit, and what sums in float32 lose.
        lost = expected.abs() * torch.finfo(dtype).eps / 2 + 5e-7 * size
        assert bool(((found.double() - expected).abs() <= lost).all())

    @pytest.mark.parametrize("threads", [1, 2])
    def test_a_row_is_the_same_to_the_bit_in_any_company(
        self, dtype: torch.dtype, threads: int
    ) -> None:
        states, weight = drawn(40, 576).to(dtype), drawn(1000, 576, seed=1).to(dtype)
        panels, before = kernels.panels(weight), torch.get_num_threads()
        alone = [kernels.product(row[None], panels, 1000, None) for row in states]
        try:
            torch.set_num_threads(threads)
            for rows in (states, states[:17], states.flip(0)[23:].flip(0)):
                found = kernels.product(rows, panels, 1000, None)
                assert torch.equal(found, torch.cat(alone[: len(rows)]))
        finally:
            torch.set_num_threads(before)


def test_pairs_of_bfloat16_are_no_odd_number() -> None:
    assert not kernels.multiplies(torch.empty(4, 3, dtype=torch.bfloat16))
