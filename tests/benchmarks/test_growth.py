"""The table of growth on numbers worked out by hand, and the command on tiny models."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from tests.benchmarks.growth import Point, _parser, command, main, points, relative, table


def line(tokens: int, flops: float, cpu: float, memory: int) -> dict[str, Any]:
    return {
        "training_tokens": tokens,
        "model_flops_a_step": flops,
        "attention_flops_a_step": flops / 4,
        "cpu_seconds_a_step": cpu,
        "peak_memory_bytes": memory,
        "num_trained_parameters": 10,
    }


def test_a_point_is_the_median_of_its_runs() -> None:
    runs = [
        (8, line(100, 400.0, 3.0, 1160)),
        (16, line(200, 800.0, 4.0, 1360)),
        (8, line(100, 400.0, 1.0, 2160)),
        (8, line(100, 400.0, 2.0, 1260)),
    ]
    # 16 bytes for each of 10 parameters are taken off.
    assert points(runs) == [Point(8, 100, 500.0, 2.0, 1100), Point(16, 200, 1000.0, 4.0, 1200)]


def test_cost_is_relative_to_the_work_of_the_first_point() -> None:
    first = Point(1, tokens=100, flops=1e9, cpu_seconds=2.0, memory_bytes=1)
    # Three times the seconds for twice the tokens, and for four times the FLOPs.
    point = Point(2, tokens=200, flops=4e9, cpu_seconds=6.0, memory_bytes=1)
    assert relative(point, first) == (1.5, 0.75)
    assert relative(first, first) == (1.0, 1.0)


def test_the_table_names_the_point_that_is_dearest_for_its_work() -> None:
    found = [
        Point(2, 100, 1e9, 1.0, 2 * 2**20),
        Point(4, 200, 2e9, 2.5, 3 * 2**20),
        Point(8, 400, 4e9, 4.4, 5 * 2**20),
    ]
    lines = table("batch", found).splitlines()
    assert lines[2] == "| 2 | 100 | 1.0 | 1.000 | 2 | 1.00 | 1.00 | 1.00 |"
    assert lines[3] == "| 4 | 200 | 2.0 | 2.500 | 3 | 1.25 | 1.25 | 1.50 |"
    assert lines[4] == "| 8 | 400 | 4.0 | 4.400 | 5 | 1.10 | 1.10 | 2.50 |"
    assert lines[-1].endswith("Highest seconds a FLOP: 1.25, at 4.")


@pytest.mark.parametrize(
    ("over", "option"),
    [
        ("batch", "--prompts"),
        ("length", "--completion-tokens"),
        ("group-size", "--group-size"),
    ],
)
def test_a_point_changes_its_own_dimension_alone(over: str, option: str) -> None:
    args = _parser().parse_args(["--over", over, "--model", "m", "--seed", "7"])
    found = command(args, 99, args.model)
    options = dict(zip(found[3::2], found[4::2], strict=True))
    usual = _parser().parse_args(["--over", "vocabulary"])
    plain = command(usual, 99, args.model)
    expected = dict(zip(plain[3::2], plain[4::2], strict=True))
    assert options == expected | {option: "99", "--seed": "7"}


@pytest.mark.slow
def test_the_command_ends_with_its_table() -> None:
    arguments = [
        *(sys.executable, "-m", "tests.benchmarks.growth", "--over", "model-size"),
        *("--values", "64", "128", "--algorithm", "grpo", "--prompts", "2", "--group-size", "2"),
        *("--prompt-tokens", "4", "--completion-tokens", "4", "--steps", "1", "--threads", "1"),
    ]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=300, check=True)
    lines = done.stdout.splitlines()
    runs = [json.loads(one) for one in lines[:2]]
    assert [one["value"] for one in runs] == [64, 128]
    assert runs[1]["num_parameters"] > runs[0]["num_parameters"]
    assert lines[2].startswith("| model-size |") and lines[4].startswith("| 64 | 32 |")


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (("--over", "batch"), "--over batch needs --model"),
        (("--over", "vocabulary", "--model", "m"), "builds its models: drop --model"),
        (("--over", "group-size", "--model", "m", "--algorithm", "sft"), "algorithms that sample"),
    ],
)
def test_a_dimension_that_does_not_fit_is_refused(
    options: tuple[str, ...], problem: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(options)
    assert refused.value.code == 2 and problem in capsys.readouterr().err
