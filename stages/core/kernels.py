"""The functions of `kernels.c`, `products.c` and `decoder.c` for tensors.

They go through memory once where torch does several times. For contiguous tensors on processors, in
float32 and bfloat16. They are compiled when the project is installed; where no compiler was there,
or for other tensors, `serve` says no and torch's own operations do the same. Nothing here has a
gradient: autograd functions call it.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

logger = logging.getLogger(__name__)

FORMATS = {torch.float32: 0, torch.bfloat16: 1}
# Of what `torch.backends.cpu.get_cpu_capability` names; other processors have the plain build.
_BUILDS = {"AVX512": "_kernels_x86_64_v4", "AVX2": "_kernels_x86_64_v3"}
_WITH_BFLOAT16 = "_bf16"  # AVX512-BF16, which not all of the first have
# What kernels.c says: files that an earlier installation has built may be around.
_INTERFACE_VERSION = 6

_LONG, _FLOAT, _POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_KINDS = {"l": _LONG, "f": _FLOAT, "p": _POINTER, "i": ctypes.c_int}
# Arguments in order: long, float, pointer, int.
_SIGNATURES = {
    "rms_norm": "llppfpipi",
    "rms_norm_backward": "llpppppippi",
    "gated": "lllpppii",
    "gated_backward": "llpppppii",
    "add": "lppii",
    "rotate": "lllpppfpii",
    "causal_softmax": "lllpipi",
    "causal_softmax_backward": "lllppii",
    "attend": "lllllpfpplppllpppipl",
    "token_logprobs": "llpipfppppi",
    "token_logprobs_backward": "llpipfpppi",
    "transpose": "lllppi",
    "multiply": "lllpppipii",
    "decode": "lpppii",
}
_CONSTANTS = (
    "rows_of_a_sum",
    "queries_together",
    "elements_a_thread",
    "columns_of_a_panel",
    "multiplies_bfloat16",
)


def serve(*tensors: Tensor) -> bool:
    """Whether these tensors, of one format, can be given to the functions below."""
    if not _functions():
        return False
    dtype = tensors[0].dtype
    return dtype in FORMATS and all(one.dtype == dtype and one.is_cpu for one in tensors)


def rms_norm(
    states: Tensor, weight: Tensor, epsilon: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x / sqrt(mean x^2 + epsilon) * weight [size], and 1 / sqrt(...) of each row.

    states [..., size] and weight are float32; gives [..., size] in dtype, and [..., 1].
    """
    states = states.contiguous()
    result = torch.empty_like(states, dtype=dtype)
    scales = states.new_empty(*states.shape[:-1], 1)
    rows, size = scales.numel(), states.shape[-1]
    assert weight.numel() == size
    _call(
        "rms_norm", states.numel(), rows, size, states, weight.contiguous(), epsilon, result,
        FORMATS[dtype], scales,
    )  # fmt: skip
    return result, scales


def rms_norm_backward(
    kept: Tensor, inverse: Tensor | None, weight: Tensor, scales: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of `rms_norm`'s states, float32 [..., size], and weight [size].

    kept is the result, and inverse 1 / weight; or kept is the states, and inverse None.
    """
    if inverse is None or kept.dtype != grad.dtype:
        kept = kept.float()
    if inverse is not None and kept.dtype != grad.dtype:
        grad = grad.float()
    kept, grad = kept.contiguous(), grad.contiguous()
    d_states = torch.empty_like(grad, dtype=torch.float32)
    rows, size = scales.numel(), grad.shape[-1]
    assert kept.shape == grad.shape and weight.numel() == size and grad.numel() == rows * size
    d_weight = scales.new_empty(-(-rows // _functions()["rows_of_a_sum"]), size)
    _call(
        "rms_norm_backward", grad.numel(), rows, size, kept, inverse, weight.contiguous(),
        scales.contiguous(), grad, FORMATS[grad.dtype], d_states, d_weight,
    )  # fmt: skip
    return d_states, d_weight.sum(0)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up, [..., size]. Both may be halves of rows [..., 2 * size]."""
    assert gate.shape == up.shape
    size = gate.shape[-1]
    stride = gate.stride(-2) if gate.dim() == 2 and gate.stride() == up.stride() else 0
    if stride < size or gate.stride(-1) != 1:
        gate, up, stride = gate.contiguous(), up.contiguous(), size
    result = torch.empty(gate.shape, dtype=gate.dtype)
    _call(
        "gated", gate.numel(), gate.numel() // size, size, stride, gate, up, result,
        FORMATS[gate.dtype],
    )  # fmt: skip
    return result


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of gate and of up, and `gated`. The first takes grad's place."""
    assert grad.shape == gate.shape == up.shape
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_up, product = torch.empty_like(up), torch.empty_like(up)
    size = gate.shape[-1]
    _call(
        "gated_backward", gate.numel(), gate.numel() // size, size, grad, gate, up, d_up, product,
        FORMATS[gate.dtype],
    )  # fmt: skip
    return grad, d_up, product


def add_(total: Tensor, part: Tensor) -> None:
    """total += part, of the same shape; total is float32 and in one piece."""
    assert total.shape == part.shape and total.is_contiguous()
    _call("add", total.numel(), total.numel(), total, part.contiguous(), FORMATS[part.dtype])


def rotate(states: Tensor, cos: Tensor, sin: Tensor, back: bool = False) -> Tensor:
    """states [tokens, heads, dim] turned by the angles of cos and sin [tokens, dim], or back.

    The second halves of cos and sin are not read.
    """
    states = states.contiguous()
    result = torch.empty_like(states)
    tokens, heads, dim = states.shape
    assert cos.shape == sin.shape == (tokens, dim)
    sign = -1.0 if back else 1.0
    _call(
        "rotate", states.numel(), tokens, heads, dim, states, cos.contiguous(), sin.contiguous(),
        sign, result, FORMATS[states.dtype],
    )  # fmt: skip
    return result


def causal_softmax_(scores: Tensor, chunk: int) -> Tensor:
    """Overwrites scores [..., columns] with their softmax over what each row sees.

    Rows are counted through, chunk by chunk; row j of a chunk sees all but the last chunk - j - 1
    columns.
    """
    scores = scores.contiguous()
    columns = scores.shape[-1]
    assert chunk <= columns
    work = torch.empty(_threads(scores.numel()), columns)
    _call(
        "causal_softmax", scores.numel(), scores.numel() // columns, columns, chunk, scores,
        FORMATS[scores.dtype], work,
    )  # fmt: skip
    return scores


def causal_softmax_backward_(weights: Tensor, grad: Tensor, chunk: int) -> Tensor:
    """Overwrites grad, of the weights that `causal_softmax_` gave, with that of the scores."""
    weights, grad = weights.contiguous(), grad.contiguous()
    columns = grad.shape[-1]
    assert weights.shape == grad.shape and chunk <= columns
    _call(
        "causal_softmax_backward", grad.numel(), grad.numel() // columns, columns, chunk, weights,
        grad, FORMATS[grad.dtype],
    )  # fmt: skip
    return grad


def attend(
    q: Tensor,
    scale: float,
    prompt_of_row: Tensor,
    lengths: Tensor,
    prompts: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor],
    num_drawn: int,
) -> Tensor:
    """Attention of one token a row, whose key is the last of its own: [rows, heads, dim].

    q [rows, heads, dim]. Keys [_P * key heads, dim, tokens] and values [_P * key heads, tokens,
    dim] of the prompts, of which lengths [_P] are seen, and of the rows, num_drawn each;
    prompt_of_row [rows] says which prompt a row sees.
    """
    rows, heads, dim = q.shape
    if q.stride()[1:] != (dim, 1):
        q = q.contiguous()
    keys, width = len(own[0]) // rows, prompts[0].shape[2]
    group, room = heads // keys, own[0].shape[2]
    tensors = (*prompts, *own, prompt_of_row, lengths)
    assert all(one.is_contiguous() for one in tensors) and heads == keys * group
    assert own[1].shape == (rows * keys, room, dim) and num_drawn <= room
    result = torch.empty(rows, heads, dim, dtype=q.dtype)
    columns = width + num_drawn
    num_threads = _threads(rows * heads * columns)
    work = torch.empty(num_threads, attention_work(dim, columns))
    _call(
        "attend", rows * heads * columns, rows, keys, group, dim, q.stride(0), q, scale,
        prompt_of_row, lengths, width, *prompts, num_drawn, room, *own, result, FORMATS[q.dtype],
        work, work.shape[1],
    )  # fmt: skip
    return result


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of logits [rows, size] over the temperature, in float32 [rows] each: log-probability of the
    target, entropy, the greatest, and the sum of exponentials of what is below it.

    Raises IndexError unless 0 <= targets < size.
    """
    rows, size = logits.shape
    assert len(targets) == rows
    if rows and not 0 <= targets.min().item() <= targets.max().item() < size:
        raise IndexError(f"a target is not one of {size} tokens")
    logprobs, entropies, greatest, totals = torch.empty(4, rows)
    _call(
        "token_logprobs", logits.numel(), rows, size, logits.contiguous(), FORMATS[logits.dtype],
        targets.contiguous(), temperature, greatest, totals, logprobs, entropies,
    )  # fmt: skip
    return logprobs, entropies, greatest, totals


def token_logprobs_backward_(
    logits: Tensor,
    targets: Tensor,
    temperature: float,
    greatest: Tensor,
    totals: Tensor,
    upstream: Tensor,
) -> Tensor:
    """Overwrites logits with the gradient of sum(upstream [rows] * log-probabilities).

    The other arguments are those of `token_logprobs`, and what it gave.
    """
    logits = logits.contiguous()
    rows, size = logits.shape
    assert len(targets) == len(greatest) == len(totals) == len(upstream) == rows
    _call(
        "token_logprobs_backward", logits.numel(), rows, size, logits, FORMATS[logits.dtype],
        targets.contiguous(), temperature, greatest, totals, upstream.float().contiguous(),
    )  # fmt: skip
    return logits


def transposed(states: Tensor) -> Tensor:
    """states [rows, columns], bfloat16, as [columns, rows] in one piece."""
    if states.stride(1) != 1:
        states = states.contiguous()
    rows, columns = states.shape
    result = states.new_empty(columns, rows)
    _call("transpose", states.numel(), rows, columns, states.stride(0), states, result)
    return result


def multiplies(weight: Tensor) -> bool:
    """Whether `product` can multiply by a weight [columns, size]."""
    if not serve(weight):
        return False
    return weight.dtype == torch.float32 or (
        _functions()["multiplies_bfloat16"] and weight.shape[1] % 2 == 0
    )


def panels(weight: Tensor) -> Tensor:
    """A weight [columns, size] as `product` reads it: [panels, words, columns of a panel].

    A word is a number of float32 or a pair of bfloat16; here it is an int32 of the same bits.
    """
    words = _filled(weight).view(torch.int32)
    return (
        words.view(-1, _functions()["columns_of_a_panel"], words.shape[1])
        .transpose(1, 2)
        .contiguous()
    )


def panels_of_bias(bias: Tensor) -> Tensor:
    """A bias [columns] as `product` reads it, float32."""
    return _filled(bias.float()[:, None])[:, 0].contiguous()


def product(states: Tensor, weight: Tensor, columns: int, bias: Tensor | None) -> Tensor:
    """states [rows, size] times a weight [columns, size], transposed, plus a bias [columns]:
    [rows, columns].

    The weight and the bias come as `panels` and `panels_of_bias`. Made for few rows. A row's result
    is the same to the bit whatever the others are.
    """
    states = states.contiguous()
    rows, size = states.shape
    words = size * states.element_size() // 4
    assert weight.is_contiguous() and weight.shape[1] == words
    assert 0 <= weight.shape[0] * weight.shape[2] - columns < weight.shape[2]
    assert bias is None or bias.numel() == weight.shape[0] * weight.shape[2]
    result = states.new_empty(rows, columns)
    _call(
        "multiply", rows * size * columns, rows, size, columns, states, weight, bias, False, result,
        FORMATS[states.dtype],
    )  # fmt: skip
    return result


class DecoderNorm(ctypes.Structure):
    """`Norm` of decoder.c."""

    _fields_ = [("weight", _POINTER), ("epsilon", _FLOAT)]


class DecoderMap(ctypes.Structure):
    """`Map` of decoder.c."""

    _fields_ = [
        ("weight", _POINTER),
        ("bias", _POINTER),
        ("adapter_down", _POINTER),
        ("adapter_up", _POINTER),
        ("rank", _LONG),
    ]


class DecoderLayer(ctypes.Structure):
    """`Layer` of decoder.c."""

    _fields_ = [
        *((name, DecoderNorm) for name in ("norm", "mlp_norm", "q_norm", "k_norm")),
        *((name, DecoderMap) for name in ("qkv", "output", "gate_and_up", "down")),
        *((name, _POINTER) for name in ("prompt_keys", "prompt_values", "own_keys", "own_values")),
        ("scale", _FLOAT),
    ]


class DecoderBatch(ctypes.Structure):
    """`Batch` of decoder.c."""

    _fields_ = [
        *(
            (name, _LONG)
            for name in (
                "rows", "hidden", "key_heads", "group", "dim", "inner", "width", "drawn", "room",
            )
        ),
        *(
            (name, _POINTER)
            for name in (
                "prompt_of_row", "lengths", "turns", "normed", "found", "wide", "mixed", "low",
                "scales", "work",
            )
        ),
        ("work_size", _LONG),
    ]  # fmt: skip


def decode_(
    states: Tensor, layers: ctypes.Array[DecoderLayer], batch: DecoderBatch, dtype: torch.dtype
) -> None:
    """Overwrites states, float32 [rows, hidden], with what the layers make of them.

    Their products are in dtype. Whoever fills in the structures answers for what they point at.
    """
    assert states.is_contiguous() and states.dtype == torch.float32
    functions = _functions()
    functions["decode"](
        len(layers), ctypes.addressof(layers), ctypes.addressof(batch), states.data_ptr(),
        FORMATS[dtype], torch.get_num_threads(),
    )  # fmt: skip


def attention_work(dim: int, columns: int) -> int:
    """Numbers that a thread needs for `attend` or `decode_`, of float32."""
    queries: int = _functions()["queries_together"]
    return queries * (2 * dim + columns)


def build() -> str:
    """The name of the build for this processor."""
    capability = torch.backends.cpu.get_cpu_capability()
    name = _BUILDS.get(capability, "_kernels")
    narrows = capability == "AVX512" and torch.cpu._is_avx512_bf16_supported()
    return name + _WITH_BFLOAT16 if narrows else name


def _call(name: str, num_elements: int, *arguments: Any) -> None:
    given = [one.data_ptr() if isinstance(one, Tensor) else one for one in arguments]
    _functions()[name](*given, _threads(num_elements))


def _threads(num_elements: int) -> int:
    least: int = _functions()["elements_a_thread"]
    return min(torch.get_num_threads(), num_elements // least + 1)


def _filled(values: Tensor) -> Tensor:
    """With rows of zeros behind [rows, size], up to whole panels."""
    lacking = -len(values) % _functions()["columns_of_a_panel"]
    return functional.pad(values, (0, 0, 0, lacking)) if lacking else values


@cache
def _functions() -> dict[str, Any]:
    """By name, and what the build says of itself; none where they cannot be used, and a line in the
    log says why."""
    try:
        library = _loaded(build())
    except OSError as error:
        logger.info("layers compute by torch's own operations, which takes longer: %s", error)
        return {}
    functions: dict[str, Any] = {name: getattr(library, name) for name in _SIGNATURES}
    for name, function in functions.items():
        function.argtypes = [_KINDS[kind] for kind in _SIGNATURES[name]]
        function.restype = None
    functions |= {name: ctypes.c_int.in_dll(library, name).value for name in _CONSTANTS}
    return functions


def _loaded(name: str) -> ctypes.CDLL:
    """Raises OSError unless it is there and has the functions as this file knows them."""
    remedy = "install the project again, where there is a C compiler"
    spec = importlib.util.find_spec(f"{__package__}.{name}")
    if spec is None or spec.origin is None:
        raise OSError(f"{name} is not built: {remedy}")
    library = ctypes.CDLL(spec.origin)
    if ctypes.c_int.in_dll(library, "interface_version").value != _INTERFACE_VERSION:
        raise OSError(f"{spec.origin} was built from other code: {remedy}")
    return library
