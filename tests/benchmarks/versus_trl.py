"""The project's steps beside TRL's on the same work: interleaved, as ratios.

    make .venv-trl/.installed
    python -m tests.benchmarks.versus_trl --model FOLDER --algorithms sft,dpo,grpo --rounds 3

Every round runs `step` here and `trl_step` in TRL's own environment, one after the other, for each
algorithm and each of TRL's settings, so that a neighbour on the machine disturbs both alike. Prints
one JSON line a measurement, and at the end one with the median ratios: tokens a CPU-second (ours
over TRL's) and peak memory above the 16 bytes a parameter that training has to hold.

TRL 1.16 has neither PPO nor PRM; `--trl-python` names the Python of another environment (TRL 1.12
has the PRM).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ALGORITHMS = ("sft", "rm", "prm", "dpo", "grpo", "rloo")
_BYTES_A_PARAMETER = 16  # weights, gradient and two moments in float32
_MALLOC = "glibc.malloc.mmap_threshold=4294967296:glibc.malloc.trim_threshold=8589934592"


def main() -> None:
    """Run the command line."""
    args = _parser().parse_args()
    found: list[dict[str, Any]] = []
    for round_ in range(args.rounds):
        for algorithm in args.algorithms.split(","):
            for line in measurements(args, algorithm):
                line["round"] = round_
                found.append(line)
                print(json.dumps(line), flush=True)
    print(json.dumps({"ratios": ratios(found)}), flush=True)


def measurements(args: argparse.Namespace, algorithm: str) -> Iterator[dict[str, Any]]:
    """Ours, and TRL's with each of the settings."""
    work = [
        *("--algorithm", algorithm, "--model", args.model, "--prompts", str(args.prompts)),
        *("--group-size", str(args.group_size), "--prompt-tokens", str(args.prompt_tokens)),
        *("--completion-tokens", str(args.completion_tokens), "--steps", str(args.steps)),
        *("--micro-batch-tokens", str(args.micro_batch_tokens), "--threads", str(args.threads)),
        *("--precision", "bfloat16"),
    ]
    yield _run([sys.executable, "-m", "tests.benchmarks.step", *work]) | {"who": "posttrain"}
    for settings in args.settings.split(","):
        command = [args.trl_python, str(HERE / "trl_step.py"), *work, "--settings", settings]
        yield _run(command) | {"who": f"TRL {settings}"}


def ratios(found: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By algorithm and by TRL's settings: medians over the rounds."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    ours = {(one["algorithm"], one["round"]): one for one in found if one["who"] == "posttrain"}
    theirs = [one for one in found if one["who"] != "posttrain"]
    for algorithm in dict.fromkeys(one["algorithm"] for one in theirs):
        for who in dict.fromkeys(one["who"] for one in theirs):
            pairs = [
                (ours[algorithm, one["round"]], one)
                for one in theirs
                if one["who"] == who and one["algorithm"] == algorithm
            ]
            if pairs:
                result.setdefault(algorithm, {})[who] = {
                    "tokens_a_cpu_second": statistics.median(
                        a["tokens_a_cpu_second"] / b["tokens_a_cpu_second"] for a, b in pairs
                    ),
                    "memory_above_state": statistics.median(
                        _above_state(a, a) / max(_above_state(b, a), 1.0) for a, b in pairs
                    ),
                }
    return result


def _above_state(one: dict[str, Any], ours: dict[str, Any]) -> float:
    return float(one["peak_memory_bytes"] - _BYTES_A_PARAMETER * ours["num_parameters"])


def _run(command: list[str]) -> dict[str, Any]:
    environment = {**os.environ, "GLIBC_TUNABLES": _MALLOC, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--algorithms", default="sft,rm,dpo,grpo,rloo")
    parser.add_argument("--settings", default="defaults", help="defaults, fastest or both")
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    return parser


if __name__ == "__main__":
    main()
