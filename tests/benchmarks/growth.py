"""How the cost of a step grows with the work, over one dimension of it.

    python -m tests.benchmarks.growth --model FOLDER --over batch
    python -m tests.benchmarks.growth --over vocabulary --algorithm dpo

Runs `step` in a process of its own for each point, in turns as often as --rounds says, and prints
one JSON line a run and at the end a table of medians. Where CPU seconds a token, or a FLOP, grow
from one point to the next, cost grows faster than the work. FLOPs are those of `step`: matrix
products with the weights, and attention over what the causal mask leaves. Memory is the peak above
the 16 bytes that training holds for each parameter; Python and its libraries are in it.

batch, length and group-size take the model of --model. vocabulary and model-size build Llamas of
random weights: hidden 256 and 4 layers under each vocabulary, and each hidden size, with 8 layers,
under a vocabulary of 4,096.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks import workload
from tests.benchmarks.workload import ALGORITHMS, ONLINE

_BYTES_A_PARAMETER = 16  # weights, gradient and two moments in float32
_HEAD_WIDTH = 64

RANGES = {
    "batch": (2, 4, 8, 16, 32),
    "length": (64, 128, 256, 512, 1024),
    "group-size": (2, 4, 8, 16, 32),
    "vocabulary": (4096, 16384, 65536, 131072),
    "model-size": (128, 256, 512, 1024),
}
"""Points of each dimension; of length, tokens of the completion, and of model size, hidden."""


@dataclass(frozen=True)
class Point:
    """Cost of a step at one point, medians over the rounds."""

    value: int
    tokens: int
    flops: float
    cpu_seconds: float
    memory_bytes: float


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line, or what is given in its place."""
    parser = _parser()
    args = parser.parse_args(arguments)
    builds = args.over in ("vocabulary", "model-size")
    if builds == (args.model is not None):
        parser.error(
            f"--over {args.over} {'builds its models: drop' if builds else 'needs'} --model"
        )
    if args.over == "group-size" and args.algorithm not in ONLINE:
        parser.error(f"--over group-size is for algorithms that sample: {', '.join(ONLINE)}")
    values = args.values or RANGES[args.over]
    found: list[tuple[int, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as folder:
        models = {value: _model(args, value, Path(folder)) for value in values}
        for round_ in range(args.rounds):
            for value in values:
                line = _run(command(args, value, models[value]))
                found.append((value, line))
                where = {"over": args.over, "value": value, "round": round_}
                print(json.dumps(where | line), flush=True)
    print(table(args.over, points(found)), flush=True)


def command(args: argparse.Namespace, value: int, model: Path) -> list[str]:
    """The `step` of one point."""
    changed = {"batch": "prompts", "length": "completion_tokens", "group-size": "group_size"}
    options = {name: getattr(args, name) for name in _WORK}
    if args.over in changed:
        options[changed[args.over]] = value
    return [
        *(sys.executable, "-m", "tests.benchmarks.step", "--model", str(model)),
        *(text for k, v in options.items() for text in (f"--{k.replace('_', '-')}", str(v))),
        *(["--reward-model"] if args.reward_model else []),
    ]


def points(found: Sequence[tuple[int, dict[str, Any]]]) -> list[Point]:
    """Medians over the runs of each value."""
    result: list[Point] = []
    for value in dict.fromkeys(value for value, _ in found):
        lines = [line for other, line in found if other == value]
        first = lines[0]
        state = _BYTES_A_PARAMETER * first["num_trained_parameters"]
        result.append(
            Point(
                value,
                first["training_tokens"],
                first["model_flops_a_step"] + first["attention_flops_a_step"],
                statistics.median(line["cpu_seconds_a_step"] for line in lines),
                statistics.median(line["peak_memory_bytes"] for line in lines) - state,
            )
        )
    return result


def table(over: str, found: Sequence[Point]) -> str:
    """Points in Markdown, and how much more the dearest costs for its work than the first."""
    lines = [
        f"| {over} | tokens | GFLOP | CPU seconds | memory above state, MiB | seconds a token | "
        "seconds a FLOP | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    first = found[0]
    for point in found:
        a_token, a_flop = relative(point, first)
        lines.append(
            f"| {point.value:,} | {point.tokens:,} | {point.flops / 1e9:,.1f} | "
            f"{point.cpu_seconds:.3f} | {point.memory_bytes / 2**20:,.0f} | {a_token:.2f} | "
            f"{a_flop:.2f} | {point.memory_bytes / first.memory_bytes:.2f} |"
        )
    dearest = max(found, key=lambda point: relative(point, first)[1])
    lines += [
        "",
        "The last three columns are relative to the first row. Highest seconds a FLOP: "
        f"{relative(dearest, first)[1]:.2f}, at {dearest.value:,}.",
    ]
    return "\n".join(lines)


def relative(point: Point, first: Point) -> tuple[float, float]:
    """Seconds a token, and a FLOP, over those of the first point: 1 where cost grows as work."""
    seconds = point.cpu_seconds / first.cpu_seconds
    return seconds * first.tokens / point.tokens, seconds * first.flops / point.flops


def build(folder: Path, *, vocab_size: int, hidden_size: int, num_layers: int) -> None:
    """Write a Llama of random weights."""
    heads = hidden_size // _HEAD_WIDTH
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        intermediate_size=3 * hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=heads,
        num_key_value_heads=max(heads // 2, 1),
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        pad_token_id=0,
        eos_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def _model(args: argparse.Namespace, value: int, folder: Path) -> Path:
    own = folder / str(value)
    match args.over:
        case "vocabulary":
            build(own, vocab_size=value, hidden_size=256, num_layers=4)
        case "model-size":
            build(own, vocab_size=4096, hidden_size=value, num_layers=8)
        case _:
            return Path(args.model)
    return own


def _run(arguments: list[str]) -> dict[str, Any]:
    done = subprocess.run(arguments, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--over", choices=tuple(RANGES), required=True)
    parser.add_argument("--model", help="Hugging Face folder")
    parser.add_argument("--values", type=int, nargs="+", help="points, in place of the usual ones")
    parser.add_argument("--algorithm", choices=ALGORITHMS, default="grpo")
    parser.add_argument("--rounds", type=int, default=1)
    workload.add_options(parser)
    return parser


def _work_options() -> Iterator[str]:
    """Names of the options that `step` takes as they are."""
    parser = argparse.ArgumentParser(add_help=False)
    workload.add_options(parser)
    yield "algorithm"
    yield from (name for name in vars(parser.parse_args([])) if name != "reward_model")


_WORK = tuple(_work_options())


if __name__ == "__main__":
    main()
