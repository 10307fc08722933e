"""The work of a step: what is drawn, what counts, and what is refused."""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

import pytest

from tests.benchmarks import workload
from tests.benchmarks.workload import ALGORITHMS, Lengths, Shape, step_lengths


def shape(algorithm: str = "sft", *options: str) -> Shape:
    parser = argparse.ArgumentParser()
    parser.add_argument("--algorithm")
    workload.add_options(parser)
    return Shape.of(parser.parse_args(["--algorithm", algorithm, *options]))


VARIED = ("--prompt-tokens", "40", "--min-prompt-tokens", "8", "--completion-tokens", "496")


@pytest.mark.parametrize(
    ("algorithm", "completions"),
    [("sft", 1), ("prm", 1), ("rm", 2), ("dpo", 2), ("grpo", 3), ("rloo", 3), ("ppo", 3)],
)
def test_without_a_shortest_every_length_is_the_longest(algorithm: str, completions: int) -> None:
    found = shape(algorithm, "--prompts", "5", "--group-size", "3").lengths(algorithm)
    assert found == [Lengths(64, (64,) * completions)] * 5


def test_lengths_come_from_the_seed_alone() -> None:
    varied = (*VARIED, "--min-completion-tokens", "16", "--prompts", "50")
    assert shape("dpo", *varied).lengths("dpo") == shape("dpo", *varied).lengths("dpo")
    other = shape("dpo", *varied, "--seed", "1")
    assert shape("dpo", *varied).lengths("dpo") != other.lengths("dpo")


def test_lengths_are_uniform_from_the_shortest_to_the_longest() -> None:
    found = shape("sft", *VARIED, "--min-completion-tokens", "16", "--prompts", "20000")
    prompts = [one.prompt for one in found.lengths("sft")]
    completions = [one.completions[0] for one in found.lengths("sft")]
    assert (min(prompts), max(prompts)) == (8, 40)
    assert (min(completions), max(completions)) == (16, 496)
    # Five standard errors of the mean of a uniform variable, (high - low) / sqrt(12 n).
    assert sum(prompts) / 20000 == pytest.approx(24, abs=5 * 32 / (12 * 20000) ** 0.5)
    assert sum(completions) / 20000 == pytest.approx(256, abs=5 * 480 / (12 * 20000) ** 0.5)


def test_a_prompt_counts_with_each_of_its_completions() -> None:
    lengths = [Lengths(10, (5, 7)), Lengths(4, (1, 2))]
    assert workload.sequences(lengths) == [15, 17, 5, 6]
    assert workload.completion_tokens(lengths) == 15


@pytest.mark.parametrize(
    ("completion", "steps"),
    [
        (2, [2]),
        (15, [15]),
        (16, [16]),
        (17, [17]),  # a step of one token would be nothing but its end
        (18, [16, 2]),
        (48, [16, 16, 16]),
        (49, [16, 16, 17]),
        (1, [1]),
    ],
)
def test_steps_make_up_the_completion(completion: int, steps: list[int]) -> None:
    assert step_lengths(completion) == steps


@pytest.mark.parametrize("algorithm", ["grpo", "rloo", "ppo"])
def test_sampled_completions_do_not_vary_but_prompts_do(algorithm: str) -> None:
    with pytest.raises(ValueError, match=f"{algorithm} samples its completions"):
        shape(algorithm, "--min-completion-tokens", "8")
    found = shape(algorithm, "--min-prompt-tokens", "8", "--prompts", "30").lengths(algorithm)
    assert len({one.prompt for one in found}) > 1
    assert {one.completions for one in found} == {(64,) * 8}


@pytest.mark.parametrize("what", ["prompt", "completion"])
@pytest.mark.parametrize("least", ["1", "65"])
def test_a_shortest_beyond_the_longest_is_refused(what: str, least: str) -> None:
    with pytest.raises(ValueError, match=f"--min-{what}-tokens {least} must lie between 2 and"):
        shape("sft", f"--min-{what}-tokens", least)


def test_every_algorithm_is_either_offline_or_online() -> None:
    assert sorted(ALGORITHMS) == ["dpo", "grpo", "ppo", "prm", "rloo", "rm", "sft"]


def test_the_module_runs_in_any_environment() -> None:
    tree = ast.parse(Path(workload.__file__).read_text(encoding="utf-8"))
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        for name in (
            [alias.name for alias in node.names]
            if isinstance(node, ast.Import)
            else [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    }
    assert imported <= set(sys.stdlib_module_names)
