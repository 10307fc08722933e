"""The project's steps beside TRL's on the same work: interleaved, as ratios.

    make .venv-trl/.installed .venv-trl-ppo/.installed
    python -m tests.benchmarks.versus_trl --model FOLDER --algorithms sft,dpo,grpo --rounds 3

Every round runs `step` here and `trl_step` in TRL's own environment, one after the other, for each
algorithm and each of TRL's settings, so that a neighbour on the machine disturbs both alike. Each
side's process has the environment that its users' have: ours that of the launcher of stages, with
its settings of glibc's allocator, TRL's the one at hand, or with `+allocator` behind its settings
ours too. Prints one JSON line a measurement, then one with the median ratios, and these as a table:
tokens a CPU-second and a second (ours over TRL's), and peak memory above what training has to hold,
16 bytes for each parameter that an optimizer moves. --offline-lengths and --online-lengths say how
long sequences are; the two sides draw the same lengths. Both have bf16 autocast, TRL's default, or
with --precision float32 neither has: for a processor that does not multiply in bfloat16. TRL's
defaults compute layers again in the backward pass, which saves memory and costs time:
--also-checkpointed measures us once more, doing that too.

TRL 1.16 has neither PPO nor PRM: --trl-python-ppo names the Python of an environment with TRL 1.12.
PPO does TRL's amount of work on both sides: a policy, a critic of its own, a reference and a reward
model of the same size, 4 epochs in one mini-batch each, a reward model's pass over every
completion.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from infra.launch import MALLOC_SETTINGS
from tests.benchmarks.workload import ALGORITHMS, OFFLINE

HERE = Path(__file__).parent
_BYTES_A_PARAMETER = 16  # weights, gradient and two moments in float32
_PPO_EPOCHS = 4  # TRL's default
_LAUNCHED = {"GLIBC_TUNABLES": MALLOC_SETTINGS}
_SETTINGS = ("defaults", "fastest", "defaults+allocator", "fastest+allocator")
_OURS, _CHECKPOINTED = "posttrain", "posttrain, checkpointed"
_COLUMNS = ("tokens_a_cpu_second", "tokens_a_second", "memory_above_state")


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
    print(table(ratios(found)), flush=True)


def measurements(args: argparse.Namespace, algorithm: str) -> Iterator[dict[str, Any]]:
    """Ours, and TRL's with each of the settings."""
    work = ["--algorithm", algorithm, "--model", args.model, *work_of(args, algorithm)]
    budget, trl_budget = (
        ["--micro-batch-tokens", str(tokens)]
        for tokens in (args.micro_batch_tokens, args.trl_micro_batch_tokens)
    )
    ours = [sys.executable, "-m", "tests.benchmarks.step", *work, *budget]
    yield _run(ours, _LAUNCHED) | {"who": _OURS}
    if args.also_checkpointed:
        yield _run([*ours, "--gradient-checkpointing"], _LAUNCHED) | {"who": _CHECKPOINTED}
    python = args.trl_python_ppo if algorithm in ("ppo", "prm") else args.trl_python
    for settings in args.settings:
        command = [python, str(HERE / "trl_step.py"), *work, *trl_budget]
        trainer, _, allocator = settings.partition("+")
        command += ["--settings", trainer]
        yield _run(command, _LAUNCHED if allocator else {}) | {"who": f"TRL {settings}"}


def work_of(args: argparse.Namespace, algorithm: str) -> list[str]:
    """Options that both sides know."""
    offline = algorithm in OFFLINE
    prompt, shortest, longest = args.offline_lengths if offline else args.online_lengths
    options = {
        "prompts": args.records if offline else args.prompts,
        "group-size": args.group_size,
        "prompt-tokens": prompt,
        "min-completion-tokens": shortest,
        "completion-tokens": longest,
        "threads": args.threads,
        "steps": args.steps,
        "warmup": args.warmup,
        "precision": args.precision,
        "reference": args.reference,
        "seed": args.seed,
    }
    if algorithm == "ppo":
        options["num-epochs"] = _PPO_EPOCHS
    found = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    return [*found, "--reward-model"] if algorithm == "ppo" else found


def ratios(found: Sequence[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """By algorithm, and by ours against TRL's settings: medians over the rounds."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    lines = {(one["algorithm"], one["round"], one["who"]): one for one in found}
    for algorithm in dict.fromkeys(one["algorithm"] for one in found):
        others = [who for name, _, who in lines if name == algorithm and who.startswith("TRL")]
        for ours, theirs in itertools.product((_OURS, _CHECKPOINTED), dict.fromkeys(others)):
            pairs = [
                _ratios(lines[algorithm, round_, ours], one)
                for (name, round_, who), one in lines.items()
                if (name, who) == (algorithm, theirs) and (algorithm, round_, ours) in lines
            ]
            if pairs:
                result.setdefault(algorithm, {})[f"{ours} : {theirs}"] = {
                    column: statistics.median(pair[column] for pair in pairs) for column in _COLUMNS
                }
    return result


def table(found: dict[str, dict[str, dict[str, float]]]) -> str:
    """`ratios` in Markdown."""
    lines = [
        "| algorithm | ours : theirs | tokens a CPU-second | tokens a second | memory over state |",
        "|---|---|---|---|---|",
    ]
    for algorithm, settings in found.items():
        for who, one in settings.items():
            numbers = " | ".join(f"{one[column]:.2f}" for column in _COLUMNS)
            lines.append(f"| {algorithm} | {who} | {numbers} |")
    return "\n".join(lines)


def _ratios(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, float]:
    """Ours over theirs. TRL's process does not know how many parameters it trains: as we do."""
    if ours["training_tokens"] != theirs["training_tokens"]:
        raise SystemExit(
            f"{ours['algorithm']}: a step is {ours['training_tokens']} tokens here and "
            f"{theirs['training_tokens']} in TRL: the two did not do the same work"
        )
    state = _BYTES_A_PARAMETER * ours["num_trained_parameters"]
    above = [max(one["peak_memory_bytes"] - state, 1) for one in (ours, theirs)]
    return {
        "tokens_a_cpu_second": ours["tokens_a_cpu_second"] / theirs["tokens_a_cpu_second"],
        "tokens_a_second": ours["tokens_a_second"] / theirs["tokens_a_second"],
        "memory_above_state": above[0] / above[1],
    }


def _run(command: list[str], environment: dict[str, str]) -> dict[str, Any]:
    whole = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=whole)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    document: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return document


def _lengths(text: str) -> tuple[int, int, int]:
    prompt, _, completion = text.partition("+")
    shortest, _, longest = completion.partition("..")
    return int(prompt), int(shortest), int(longest or shortest)


def _settings(text: str) -> list[str]:
    found = text.split(",")
    if unknown := [one for one in found if one not in _SETTINGS]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(_SETTINGS)}")
    return found


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--algorithms", default=",".join(ALGORITHMS))
    parser.add_argument(
        "--settings",
        type=_settings,
        default="defaults,fastest",
        help=f"TRL's, of {', '.join(_SETTINGS)}; see above",
    )
    parser.add_argument(
        "--also-checkpointed", action="store_true", help="ours with gradient_checkpointing too"
    )
    parser.add_argument("--trl-python", default=".venv-trl/bin/python")
    parser.add_argument("--trl-python-ppo", default=".venv-trl-ppo/bin/python")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--records", type=int, default=16, help="records or pairs of a step")
    parser.add_argument("--prompts", type=int, default=8, help="prompts of a step, online")
    parser.add_argument("--group-size", type=int, default=4)
    parser.add_argument(
        "--offline-lengths",
        type=_lengths,
        default=(16, 16, 496),
        help="PROMPT+SHORTEST..LONGEST completion, in tokens; default 16+16..496",
    )
    parser.add_argument(
        "--online-lengths",
        type=_lengths,
        default=(64, 64, 64),
        help="PROMPT+COMPLETION; default 64+64",
    )
    parser.add_argument("--precision", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--reference", choices=("pass", "cached"), default="pass", help="see step")
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=0, help="ours; 0: as many as a stage chooses"
    )
    parser.add_argument(
        "--trl-micro-batch-tokens", type=int, default=2048, help="TRL's, in its fastest settings"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument(
        "--warmup",
        type=int,
        default=2,
        help="steps before: the second still takes new memory, as the optimizer's state is new",
    )
    parser.add_argument("--seed", type=int, default=0)
    return parser


if __name__ == "__main__":
    main()
