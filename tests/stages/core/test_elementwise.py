"""Parts of a layer, by every build of the kernels that runs here and by torch, against float64."""

from __future__ import annotations

import ctypes
import logging
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from stages.core import elementwise, kernels, products
from stages.core.logprobs import chunked_token_logprobs, weighted_logprob_sum
from tests.stages.builds import BUILDS, in_use

SOURCES = sorted(map(str, Path(kernels.__file__).parent.glob("*.c")))
# Whole vectors, rests, and less than one vector.
SIZES = [1, 3, 8, 16, 17, 40, 100]
DTYPES = {torch.float32: 2e-6, torch.bfloat16: 1e-2}


@pytest.fixture(scope="session")
def sixteen_lanes(tmp_path_factory: pytest.TempPathFactory) -> str:
    """What AVX-512 has, on processors without it."""
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler here")
    built = tmp_path_factory.mktemp("kernels") / "sixteen.so"
    flags = ["-O1", "-fopenmp", "-fPIC", "-shared", "-DWIDTH=16", "-Wno-psabi", "-Wall", "-Werror"]
    subprocess.run([compiler, *flags, *SOURCES, "-o", str(built), "-lm"], check=True)
    return str(built)


@pytest.fixture(params=["torch", *BUILDS, "sixteen lanes"])
def build(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "sixteen lanes":
        path = request.getfixturevalue("sixteen_lanes")
        monkeypatch.setattr(kernels, "_loaded", lambda _: ctypes.CDLL(path))
    with in_use(request.param, monkeypatch):
        yield


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype)


def close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    tolerance = DTYPES[dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)


def exact(function: Callable[..., Tensor], grad: Tensor, *inputs: Tensor) -> list[Tensor]:
    """Value and gradients of the inputs, in float64 and by autograd."""
    leaves = [one.double().requires_grad_() for one in inputs]
    value = function(*leaves)
    value.backward(grad.double())
    return [value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


@pytest.mark.usefixtures("build")
class TestAgainstFloat64:
    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rms_norm(self, size: int, dtype: torch.dtype) -> None:
        states, weight = drawn(2, 67, size), drawn(size).abs() + 0.5
        grad = drawn(2, 67, size, dtype=dtype)
        value, d_states, d_weight = exact(
            lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
            grad,
            states,
            weight,
        )
        result, scale = elementwise.rms_norm(states, weight, 1e-5, dtype)
        assert result.dtype == dtype
        close(result, value, dtype)
        for kept, from_result in ((states, False), (result, True)):
            found = elementwise.rms_norm_backward(kept, from_result, weight, scale, grad)
            assert found[0].dtype == found[1].dtype == torch.float32
            # A bfloat16 result lacks digits of x.
            of = dtype if from_result else torch.float32
            largest = (grad.double() * weight * scale).abs().max()  # of what is subtracted from
            close(found[0] / largest, d_states / largest, of)
            close(found[1] / 12, d_weight / 12, of)  # a sum of 134 numbers of size 1

    @pytest.mark.parametrize("size", SIZES)
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_gated(self, size: int, dtype: torch.dtype) -> None:
        gate, up, grad = (drawn(n, 5, size, dtype=dtype) * 3 for n in (2, 3, 4))
        gate, up, grad = gate[0], up[0], grad[0]
        value, d_gate, d_up = exact(lambda g, u: functional.silu(g) * u, grad, gate, up)
        close(elementwise.gated(gate, up) / 9, value / 9, dtype)
        found = elementwise.gated_backward(grad.clone(), gate, up)
        for one, expected in zip(found, (d_gate, d_up, value), strict=True):
            assert one.dtype == dtype
            close(one / 9, expected / 9, dtype)

    def test_the_norm_of_bfloat16_states_knows_their_format_on_the_way_back(self) -> None:
        """As the norms of queries and keys get them."""
        states, weight = drawn(5, 40, dtype=torch.bfloat16), drawn(40)
        grad = drawn(5, 40, dtype=torch.bfloat16)
        _, d_states, d_weight = exact(
            lambda x, w: x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * w,
            grad,
            states,
            weight,
        )
        _, scale = elementwise.rms_norm(states, weight, 1e-5, torch.bfloat16)
        for upstream in (grad, grad.float()):
            found = elementwise.rms_norm_backward(states, False, weight, scale, upstream)
            close(found[0], d_states, torch.float32)
            close(found[1], d_weight, torch.float32)

    def test_gated_halves_of_the_same_rows(self) -> None:
        both = drawn(6, 40)
        gate, up = both.chunk(2, dim=-1)
        whole = elementwise.gated(gate.contiguous(), up.contiguous())
        close(elementwise.gated(gate, up), whole, torch.float32)
        close(elementwise.gated(gate[:1], up[:1]), whole[:1], torch.float32)
        close(elementwise.gated(gate.T, up.T), whole.T, torch.float32)

    @pytest.mark.parametrize("dim", [2, 8, 16, 32, 34, 64])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_rotation(self, dim: int, dtype: torch.dtype) -> None:
        states = drawn(1, 3, 5, dim, dtype=dtype)
        angles = drawn(1, 5, dim // 2).repeat(1, 1, 2)
        left, right = states.double().chunk(2, dim=-1)
        turned = torch.complex(left, right) * torch.exp(1j * angles[..., : dim // 2].double())
        found = elementwise.rotated(states, angles.cos(), angles.sin())
        close(found, torch.cat([turned.real, turned.imag], dim=-1), dtype)
        back = elementwise.rotated(found, angles.cos(), angles.sin(), back=True)
        close(back, states, dtype)

    @pytest.mark.parametrize(("chunk", "prefix"), [(1, 0), (5, 0), (5, 3), (64, 0), (64, 37)])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_causal_softmax(self, chunk: int, prefix: int, dtype: torch.dtype) -> None:
        scores = drawn(2, 2 * chunk, prefix + chunk, dtype=dtype) * 3
        hidden = torch.ones(chunk, chunk, dtype=torch.bool).triu(1).repeat(2, 1)
        hidden = functional.pad(hidden, (prefix, 0))
        grad = drawn(*scores.shape, dtype=dtype)
        value, d_scores = exact(
            lambda x: x.masked_fill(hidden, -math.inf).softmax(-1), grad, scores
        )
        weights = elementwise.causal_softmax_(scores.clone(), chunk)
        close(weights, value, dtype)
        assert not weights[hidden.expand_as(weights)].any()
        found = elementwise.causal_softmax_backward_(weights, grad.clone(), chunk)
        close(found, d_scores, dtype)
        assert not found[hidden.expand_as(found)].any()

    @pytest.mark.parametrize("size", [*SIZES, 5000])
    @pytest.mark.parametrize("temperature", [1.0, 0.7])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_log_probabilities(self, size: int, temperature: float, dtype: torch.dtype) -> None:
        hidden, weight = drawn(9, 4, dtype=dtype), drawn(size, 4)
        targets, upstream = torch.arange(9) % size, drawn(9)
        logits = (hidden @ weight.to(dtype).T).double().requires_grad_()
        log_probs = (logits / temperature).log_softmax(-1)
        expected = log_probs.gather(1, targets[:, None])[:, 0]
        expected.backward(upstream.double())
        assert logits.grad is not None
        d_weight = logits.grad.T @ hidden.double()
        entropy = -(log_probs.exp() * log_probs).sum(-1)
        for linear in (False, True):
            leaf = weight.clone().requires_grad_()
            if linear:
                total, found, entropies = weighted_logprob_sum(
                    hidden, leaf, targets, upstream, temperature, chunk_size=4
                )
            else:
                found, entropies = chunked_token_logprobs(
                    hidden, leaf, targets, temperature, chunk_size=4
                )
                total = (found * upstream).sum()
            total.backward()
            assert leaf.grad is not None
            # The logits are the same on both sides: only their gradient is rounded.
            close(found.detach(), expected.detach(), torch.float32)
            close(entropies, entropy.detach(), torch.float32)
            close(leaf.grad / 3, d_weight / 3, dtype)


@pytest.mark.usefixtures("build")
@pytest.mark.parametrize("rows", [1, 8, 65, 130])
@pytest.mark.parametrize("columns", [1, 7, 64, 100])
def test_weight_gradients_by_a_transposed_copy(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int
) -> None:
    monkeypatch.setattr(products, "has_amx", lambda: True)
    wide = drawn(rows, columns + 20, dtype=torch.bfloat16)
    states = drawn(rows, 6, dtype=torch.bfloat16)
    for grad in (wide[:, :columns], wide[:, 13 : 13 + columns], wide.T.contiguous().T[:, :columns]):
        if kernels.serve(grad):
            assert torch.equal(kernels.transposed(grad), grad.T)
        found = products.weight_gradient(grad, states)
        close(found / 12, grad.double().T @ states.double() / 12, torch.bfloat16)


@pytest.mark.usefixtures("build")
class TestEdges:
    def test_bfloat16_is_the_nearest_to_float32(self) -> None:
        states, weight = drawn(50, 100) * 1e3, drawn(100)
        wide, _ = elementwise.rms_norm(states, weight, 1e-5, torch.float32)
        narrow, _ = elementwise.rms_norm(states, weight, 1e-5, torch.bfloat16)
        assert torch.equal(narrow, wide.to(torch.bfloat16))

    def test_exponentials_over_their_range(self) -> None:
        below = torch.linspace(-86, 0, 4001)
        scores = torch.stack([torch.zeros_like(below), below], dim=1)
        # Two rows of a chunk of 2; the second of them sees both columns.
        pairs = torch.stack([torch.zeros_like(scores), scores], dim=1)
        found = elementwise.causal_softmax_(pairs, 2)[:, 1, 1]
        expected = below.double().sigmoid()
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=0)

    @pytest.mark.parametrize("low", [-120.0, -1e30, -math.inf])
    def test_what_is_far_below_has_no_weight(self, low: float) -> None:
        scores = torch.tensor([[[0.0, 0.0], [low, 0.0]]])
        assert elementwise.causal_softmax_(scores, 2).tolist() == [[[1.0, 0.0], [0.0, 1.0]]]

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_nan_stays(self, dtype: torch.dtype) -> None:
        for bad in (math.nan, math.inf):
            scores = torch.zeros(2, 2, dtype=dtype)
            scores[1, 0] = bad
            assert elementwise.causal_softmax_(scores, 2)[1].isnan().any()
        states = torch.ones(1, 20)
        states[0, 17] = math.nan
        assert elementwise.rms_norm(states, torch.ones(20), 1e-5, dtype)[0].isnan().all()
        gate = states.to(dtype)
        assert elementwise.gated(gate, torch.ones_like(gate)).isnan().sum() == 1

    def test_gates_of_any_size(self) -> None:
        gate = torch.tensor([[-1e6, -1e4, -90.0, 0.0, 90.0, 1e4, 3e38]])
        found = elementwise.gated(gate, torch.ones_like(gate))
        assert found[0, :3].abs().max() < 1e-30
        assert torch.equal(found[0, 3:], gate[0, 3:])

    def test_a_banned_token_adds_no_entropy(self) -> None:
        bias = torch.tensor([0.0, 0.0, -math.inf])
        hidden, weight = torch.zeros(1, 2), torch.zeros(3, 2, requires_grad=True)
        logprobs, entropy = chunked_token_logprobs(hidden, weight, torch.tensor([1]), bias=bias)
        assert logprobs.tolist() == entropy.neg().tolist()
        assert logprobs.item() == pytest.approx(-math.log(2), rel=1e-6)

    def test_a_row_does_not_depend_on_others(self) -> None:
        states, weight = drawn(300, 40), drawn(40)
        whole, _ = elementwise.rms_norm(states, weight, 1e-5, torch.float32)
        for row in (0, 150, 299):
            alone, _ = elementwise.rms_norm(states[row : row + 1], weight, 1e-5, torch.float32)
            assert torch.equal(alone[0], whole[row])

    def test_the_number_of_threads_changes_nothing(self) -> None:
        def results() -> list[Tensor]:
            states, weight, grad = drawn(2000, 100), drawn(100), drawn(2000, 100)
            result, scale = elementwise.rms_norm(states, weight, 1e-5, torch.float32)
            scores = drawn(50, 64, 64)
            weights = elementwise.causal_softmax_(scores.clone(), 64)
            logprobs = chunked_token_logprobs(states, drawn(70, 100), torch.arange(2000) % 70)
            return [
                result,
                *elementwise.rms_norm_backward(states, False, weight, scale, grad),
                elementwise.gated(states, grad),
                *elementwise.gated_backward(grad.clone(), states, grad),
                weights,
                elementwise.causal_softmax_backward_(weights, scores, 64),
                *logprobs,
            ]

        if not kernels._functions():
            pytest.skip("torch's own operations make no such promise")
        one = results()
        torch.set_num_threads(2)
        try:
            two = results()
        finally:
            torch.set_num_threads(1)
        assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [*SIZES, 5000])
@pytest.mark.usefixtures("build")
def test_a_part_is_added_in_place(size: int, dtype: torch.dtype) -> None:
    total, part = drawn(3, size), drawn(size, 3, dtype=dtype).T
    expected = total + part.float()
    rows = total[1:]
    elementwise.add_(rows, part[1:])
    assert torch.equal(total[1:], expected[1:]) and torch.equal(total[0], drawn(3, size)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 8, 16, 64, 72])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 7])
@pytest.mark.usefixtures("build")
def test_attention_of_one_token_a_row(group: int, dim: int, dtype: torch.dtype) -> None:
    """Two key heads; rows 0 and 2 share the second prompt, of which less is seen."""
    if not kernels._functions():
        pytest.skip("torch's own operations are those of the sampler")
    drawn_tokens, room, lengths, of_row = 9, 20, [37, 5], [1, 0, 1]
    rows, num_prompts, width = len(of_row), len(lengths), max(lengths)
    states = drawn(rows, 2 * (group + 1), dim, dtype=dtype)
    q = states[:, : 2 * group]  # as a projection leaves it, keys behind the queries
    prompts = (
        drawn(num_prompts, 2, dim, width, dtype=dtype),
        drawn(num_prompts, 2, width, dim, dtype=dtype),
    )
    own = drawn(rows, 2, dim, room, dtype=dtype), drawn(rows, 2, room, dim, dtype=dtype)
    own[0][..., drawn_tokens:] = own[1][:, :, drawn_tokens:] = math.nan  # room that is not filled
    keys, values = prompts
    found = kernels.attend(
        q,
        0.3,
        torch.tensor(of_row),
        torch.tensor(lengths),
        (keys.flatten(0, 1), values.flatten(0, 1)),
        (own[0].flatten(0, 1), own[1].flatten(0, 1)),
        drawn_tokens,
    )
    for row, prompt in enumerate(of_row):
        for head in range(2 * group):
            key_head, seen = head // group, lengths[prompt]
            k = torch.cat(
                [keys[prompt, key_head, :, :seen], own[0][row, key_head, :, :drawn_tokens]], 1
            ).double()
            v = torch.cat([values[prompt, key_head, :seen], own[1][row, key_head, :drawn_tokens]])
            weights = (0.3 * q[row, head].double() @ k).softmax(-1)
            close(found[row, head], weights @ v.double(), dtype)


def test_the_kernels_are_built_here() -> None:
    if shutil.which("cc") is None:
        pytest.skip("no C compiler here")
    assert kernels._functions(), "pip install --editable . builds them"


def test_a_target_outside_of_the_vocabulary_is_refused() -> None:
    for bad in (-100, 5):
        with pytest.raises((IndexError, RuntimeError)):
            chunked_token_logprobs(torch.zeros(1, 2), torch.zeros(5, 2), torch.tensor([bad]))


@pytest.mark.parametrize(
    ("name", "value", "why"),
    [
        ("build", lambda: "_kernels_of_nowhere", "nowhere is not built: install the project again"),
        ("_INTERFACE_VERSION", -1, "was built from other code: install the project again"),
    ],
)
def test_without_a_build_torch_computes_and_the_log_says_why(
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    value: object,
    why: str,
) -> None:
    if not kernels._functions():
        pytest.skip("nothing is built here")
    monkeypatch.setattr(kernels, name, value)
    kernels._functions.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert not kernels.serve(torch.zeros(1))
    finally:
        kernels._functions.cache_clear()
    assert why in caplog.text


def test_other_formats_and_devices_are_left_to_torch() -> None:
    assert not kernels.serve(torch.zeros(1, dtype=torch.float64))
    assert not kernels.serve(torch.zeros(1, device="meta"))
    assert not kernels.serve(torch.zeros(1), torch.zeros(1, dtype=torch.bfloat16))
