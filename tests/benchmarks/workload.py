"""The work of a step, the same for every trainer that is measured: how many records, how long.

`step` and `trl_step` draw their lengths here. The latter runs in an environment of its own and
finds this module beside itself, so nothing but the standard library may be imported.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from dataclasses import dataclass

OFFLINE = ("sft", "rm", "prm", "dpo")
ONLINE = ("grpo", "rloo", "ppo")
ALGORITHMS = (*OFFLINE, *ONLINE)

_STEP_TOKENS = 16
"""Tokens of a step of a solution, for the process reward model."""


@dataclass(frozen=True)
class Lengths:
    """Tokens of a prompt, and of each completion that is trained on with it."""

    prompt: int
    completions: tuple[int, ...]

    def sequences(self) -> list[int]:
        """Tokens of each sequence, its prompt included."""
        return [self.prompt + completion for completion in self.completions]


@dataclass(frozen=True)
class Shape:
    """What a step is made of."""

    prompts: int
    group_size: int
    prompt_tokens: int
    completion_tokens: int
    min_prompt_tokens: int
    min_completion_tokens: int
    seed: int

    @classmethod
    def of(cls, args: argparse.Namespace) -> Shape:
        """From the options of `add_options`.

        Raises ValueError where the shortest is longer than the longest, or completions vary that
        the policy samples: how long those get is not for the benchmark to choose.
        """
        shape = cls(
            args.prompts,
            args.group_size,
            args.prompt_tokens,
            args.completion_tokens,
            args.min_prompt_tokens or args.prompt_tokens,
            args.min_completion_tokens or args.completion_tokens,
            args.seed,
        )
        for what in ("prompt", "completion"):
            least, most = getattr(shape, f"min_{what}_tokens"), getattr(shape, f"{what}_tokens")
            if not 2 <= least <= most:
                raise ValueError(
                    f"--min-{what}-tokens {least} must lie between 2 and --{what}-tokens {most}"
                )
        if args.algorithm in ONLINE and shape.min_completion_tokens < shape.completion_tokens:
            raise ValueError(
                f"{args.algorithm} samples its completions, all of --completion-tokens: "
                "vary the prompts, with --min-prompt-tokens"
            )
        return shape

    def lengths(self, algorithm: str) -> list[Lengths]:
        """Of every record, uniform between the shortest and the longest, from the seed."""
        drawn = random.Random(self.seed)
        count = {"rm": 2, "dpo": 2}.get(algorithm, self.group_size if algorithm in ONLINE else 1)
        return [
            Lengths(
                drawn.randint(self.min_prompt_tokens, self.prompt_tokens),
                tuple(
                    drawn.randint(self.min_completion_tokens, self.completion_tokens)
                    for _ in range(count)
                ),
            )
            for _ in range(self.prompts)
        ]


def sequences(lengths: Sequence[Lengths]) -> list[int]:
    """Tokens of every sequence; a prompt counts with each of its completions, filling never."""
    return [tokens for one in lengths for tokens in one.sequences()]


def completion_tokens(lengths: Sequence[Lengths]) -> int:
    """Tokens of all completions."""
    return sum(sum(one.completions) for one in lengths)


def step_lengths(completion: int) -> list[int]:
    """A completion cut into steps of a solution; the last one takes what is left."""
    sizes = [_STEP_TOKENS] * (completion // _STEP_TOKENS)
    rest = completion % _STEP_TOKENS
    if rest == 1 and sizes:
        return [*sizes[:-1], sizes[-1] + 1]
    return [*sizes, rest] if rest else sizes


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that say what work a step is."""
    parser.add_argument("--prompts", type=int, default=8, help="records, pairs or prompts a step")
    parser.add_argument("--group-size", type=int, default=8, help="completions a prompt")
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--completion-tokens", type=int, default=64)
    parser.add_argument(
        "--min-prompt-tokens",
        type=int,
        default=0,
        help="shortest prompt, lengths being uniform up to --prompt-tokens; 0: all have those",
    )
    parser.add_argument(
        "--min-completion-tokens",
        type=int,
        default=0,
        help="shortest completion, lengths being uniform up to --completion-tokens; 0: all have "
        "those; for algorithms that learn from fixed records",
    )
    parser.add_argument(
        "--micro-batch-tokens", type=int, default=0, help="0: as many as a stage chooses"
    )
    parser.add_argument("--precision", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--num-epochs", type=int, default=1, help="passes over a rollout batch")
    parser.add_argument(
        "--reward-model",
        action="store_true",
        help="PPO's rewards come from a reward model of the policy's size, not from a number drawn",
    )
    parser.add_argument(
        "--reference",
        choices=("pass", "cached"),
        default="pass",
        help="DPO: with one pass of the reference over each record, as the first epoch needs it, "
        "or without, as in every epoch after that",
    )
    parser.add_argument("--threads", type=int, default=0, help="0: all cores")
    parser.add_argument("--steps", type=int, default=3, help="steps that are measured")
    parser.add_argument("--warmup", type=int, default=1, help="steps before those")
    parser.add_argument("--seed", type=int, default=0)
