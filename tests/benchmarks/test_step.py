"""The step benchmark runs every algorithm and counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.workload import ALGORITHMS, Shape, sequences

pytestmark = pytest.mark.slow

Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=1,
    )
    path = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def arguments(folder: Path, algorithm: str, *options: str) -> list[str]:
    return [
        *("--algorithm", algorithm, "--model", str(folder), "--prompts", "3", "--group-size", "4"),
        *("--prompt-tokens", "10", "--completion-tokens", "32", "--steps", "2", *options),
    ]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    """The benchmark in this process: one of its own costs seconds of imports for each test."""
    from tests.benchmarks import step  # it changes what transformers finds

    def run(algorithm: str, *options: str) -> dict[str, Any]:
        step.main(arguments(folder, algorithm, *options))
        document: dict[str, Any] = json.loads(capsys.readouterr().out)
        return document

    return run


def test_the_command_prints_one_object_and_nothing_else(folder: Path) -> None:
    command = [sys.executable, "-m", "tests.benchmarks.step", "--threads", "1"]
    command += arguments(folder, "sft", "--precision", "float32")
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    document = json.loads(done.stdout)
    assert document["threads"] == 1 and document["precision"] == "float32"
    assert document["training_tokens"] == 3 * 42


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_takes_its_steps(run: Run, algorithm: str) -> None:
    document = run(algorithm, "--precision", "bfloat16")
    # 3 records of 42 tokens; pairs have two sides, groups four completions.
    sequences = {"sft": 3, "prm": 3, "rm": 6, "dpo": 6}.get(algorithm, 12)
    assert document["training_tokens"] == sequences * 42
    online = algorithm in ("grpo", "rloo", "ppo")
    assert document.get("generated_tokens", 0) == (12 * 32 if online else 0)
    parts = document["cpu_seconds_by_part"]
    assert sum(parts.values()) == pytest.approx(document["cpu_seconds_a_step"], rel=0.05, abs=1e-3)
    expected = {"loss and backward", "optimizer"}
    expected |= {"log-probabilities"} if algorithm == "dpo" else set()
    expected |= {"generate", "score", "log-probabilities", "weight sync"} if online else set()
    assert parts.keys() == expected
    assert document["peak_memory_bytes"] > 0 and document["fraction_of_peak"] > 0
    size, trained = document["num_parameters"], document["num_trained_parameters"]
    assert trained == (2 * size - 32 * 64 + 33 if algorithm == "ppo" else size)


def test_lengths_between_two_are_those_that_are_drawn(run: Run) -> None:
    document = run("dpo", "--min-completion-tokens", "4", "--reference", "cached")
    drawn = Shape(3, 4, 10, 32, 10, 4, 0).lengths("dpo")
    tokens = sequences(drawn)
    assert document["training_tokens"] == sum(tokens) and len(set(tokens)) > 1
    assert "log-probabilities" not in document["cpu_seconds_by_part"]
    # 2 layers of 4 heads of 8: six times layers x width x length squared, summed over sequences.
    attention = 6 * 2 * 32 * sum(length**2 for length in tokens)
    assert document["attention_flops_a_step"] == attention
    assert document["model_flops_a_step"] == 6 * document["num_parameters"] * sum(tokens)


def test_layers_are_computed_again_where_that_is_asked_for(run: Run) -> None:
    document = run("rm", "--gradient-checkpointing", "--precision", "bfloat16")
    assert document["shape"]["gradient_checkpointing"] is True
    assert run("rm")["shape"]["gradient_checkpointing"] is False


def test_ppo_counts_every_pass_that_it_makes(run: Run) -> None:
    document = run("ppo", "--reward-model", "--num-epochs", "2", "--steps", "1")
    size, critic = document["num_parameters"], document["num_trained_parameters"]
    critic -= size
    tokens, generated = 12 * 42, 12 * 32
    # The policy: two epochs. In float32 its own samples need no other pass. The critic: two epochs
    # and the values before them. The reference, and the reward model, whose head has no bias.
    passes = 12 * size + 14 * critic + 2 * size + 2 * (critic - 1)
    assert document["model_flops_a_step"] == passes * tokens + 2 * size * generated
    # Everybody has the same backbone: 12 + 14 + 2 + 2, and sampling, which sees prompts only once.
    attention = 30 * 64 * 12 * 42**2 + 2 * 64 * 12 * (42**2 - 10**2)
    assert document["attention_flops_a_step"] == attention
