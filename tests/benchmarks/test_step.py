"""The step benchmark runs every algorithm and counts what it says it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from tests.benchmarks.step import ALGORITHMS

pytestmark = pytest.mark.slow


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


def run(folder: Path, algorithm: str, *options: str) -> dict[str, Any]:
    command = [
        *(sys.executable, "-m", "tests.benchmarks.step", "--algorithm", algorithm),
        *("--model", str(folder), "--prompts", "3", "--group-size", "4", "--threads", "1"),
        *("--prompt-tokens", "10", "--completion-tokens", "32", "--steps", "2", *options),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    document: dict[str, Any] = json.loads(done.stdout)
    return document


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_takes_its_steps(folder: Path, algorithm: str) -> None:
    document = run(folder, algorithm, "--precision", "bfloat16")
    # 3 records of 42 tokens; pairs have two sides, groups four completions.
    sequences = {"sft": 3, "prm": 3, "rm": 6, "dpo": 6}.get(algorithm, 12)
    assert document["training_tokens"] == sequences * 42
    online = algorithm in ("grpo", "rloo", "ppo")
    assert document.get("generated_tokens", 0) == (12 * 32 if online else 0)
    parts = document["cpu_seconds_by_part"]
    assert sum(parts.values()) == pytest.approx(document["cpu_seconds_a_step"], rel=0.05, abs=1e-3)
    assert ("generate" in parts) == online
    assert document["peak_memory_bytes"] > 0 and document["fraction_of_peak"] > 0
