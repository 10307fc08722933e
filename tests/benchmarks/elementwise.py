"""What lies between a layer's matrix products: our kernels beside torch's operations.

    python -m tests.benchmarks.elementwise --precision bfloat16

Each part is timed by both in turns, with one thread, on shapes that default to SmolLM2's. Prints
one JSON line a part: the best milliseconds of each, and the median of the ratios of the rounds.
Copies of what a part overwrites are in the times.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from unittest import mock

import torch

from stages.core import elementwise, kernels
from stages.core.logprobs import _Head
from stages.core.products import weight_gradient

_CHUNK = 64
Part = Callable[[], object]


def main(arguments: Sequence[str] | None = None) -> None:
    """Time every part and print its line."""
    args = _parser().parse_args(arguments)
    if not kernels.serve(torch.zeros(1)):
        raise SystemExit(f"{kernels.build()} is not built: install the project again")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        for name, part in parts(args):
            print(json.dumps({"part": name, **measured(part, args.rounds)}), flush=True)


def parts(args: argparse.Namespace) -> Iterator[tuple[str, Part]]:
    """Names, and what to run."""
    dtype = getattr(torch, args.precision)
    states, weight = torch.randn(args.tokens, args.hidden), torch.ones(args.hidden)
    grad = states.to(dtype)
    result, scale = elementwise.rms_norm(states, weight, 1e-5, dtype)
    yield "norm", lambda: elementwise.rms_norm(states, weight, 1e-5, dtype)
    yield (
        "norm, backward",
        lambda: elementwise.rms_norm_backward(result, True, weight, scale, grad),
    )
    gate, up, above = torch.randn(3, args.tokens, args.intermediate).to(dtype)
    yield "gate", lambda: elementwise.gated(gate, up)
    yield "gate, backward", lambda: elementwise.gated_backward(above.clone(), gate, up)
    heads = torch.randn(1, args.tokens, args.hidden // args.head, args.head).to(dtype)
    angles = torch.rand(1, args.tokens, args.head)
    cos, sin = angles.cos(), angles.sin()
    yield "rotation", lambda: elementwise.rotated(heads.transpose(1, 2), cos, sin)
    # The kernels have a part in it where the processor has AMX.
    yield "weight gradient", lambda: weight_gradient(gate, grad)
    yield from _of_attention(args, dtype)
    yield from _of_the_head(args, dtype)


def _of_attention(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[tuple[str, Part]]:
    rows = 2**20 // args.length // _CHUNK * _CHUNK
    scores = torch.randn(rows, args.length).to(dtype)
    weights = elementwise.causal_softmax_(scores.clone(), _CHUNK)
    yield "softmax", lambda: elementwise.causal_softmax_(scores.clone(), _CHUNK)
    yield (
        "softmax, backward",
        lambda: elementwise.causal_softmax_backward_(weights, scores.clone(), _CHUNK),
    )


def _of_the_head(args: argparse.Namespace, dtype: torch.dtype) -> Iterator[tuple[str, Part]]:
    head = _Head(1.0, 1024)
    logits = torch.randn(128, args.vocabulary).to(dtype)
    targets, upstream = torch.randint(args.vocabulary, (128,)), torch.randn(128)
    yield "head", lambda: head.logprobs(logits, targets)
    *_, partition = head.logprobs(logits, targets)
    yield (
        "head, backward",
        lambda: head.to_gradient_(logits.clone(), targets, partition, upstream),
    )


def measured(part: Part, rounds: int) -> dict[str, float]:
    """Milliseconds by torch and by the kernels, run in turns."""
    found: dict[str, list[float]] = {"torch": [], "kernels": []}
    for _ in range(rounds + 1):
        with mock.patch.object(kernels, "_functions", dict):
            found["torch"].append(_milliseconds(part))
        found["kernels"].append(_milliseconds(part))
    torchs, ours = found["torch"][1:], found["kernels"][1:]
    return {
        "torch_ms": round(min(torchs), 4),
        "kernels_ms": round(min(ours), 4),
        "ratio": round(statistics.median(a / b for a, b in zip(torchs, ours, strict=True)), 2),
    }


def _milliseconds(part: Part) -> float:
    start = time.perf_counter()
    part()
    return 1e3 * (time.perf_counter() - start)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--precision", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--intermediate", type=int, default=1536)
    parser.add_argument("--head", type=int, default=64, help="dimensions of a head")
    parser.add_argument("--length", type=int, default=256, help="columns of attention's scores")
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=20)
    return parser


if __name__ == "__main__":
    main()
