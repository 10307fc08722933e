"""Micro-batches from measured memory: found out before the first step, and kept."""

from __future__ import annotations

import ctypes
import logging
from pathlib import Path

import psutil
import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from schemas.training import LoRAConfig
from stages import measured_memory
from stages.adapters import add_adapters
from stages.forward import hidden_states
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.measured_memory import bytes_a_token, fitted_budget
from stages.memory import TokenBudget
from stages.models import load_base
from stages.packing import pack
from tests.stages.conftest import tiny_config
from tests.stages.test_memory import trained

# Nothing of these tests is a matter of the machine.
MUCH = 2**50


def test_a_pass_takes_what_was_measured() -> None:
    """Against the process's own memory, with a hundred rows three times as long."""
    model, _ = load_base(tiny_config(hidden_size=128, max_positions=300), seed=0)
    each = bytes_a_token(model)
    rows = 100
    batch = pack([[]] * rows, [[1] * 300] * rows, device=torch.device("cpu"))
    before = _resident()
    hidden = hidden_states(model, batch)
    taken = _resident() - before
    assert hidden.requires_grad  # so the graph is alive
    assert taken == pytest.approx(each * rows * 300, rel=0.1)


def _resident() -> int:
    """Bytes that are in use: what the allocator has free it gives back first."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    resident: int = psutil.Process().memory_info().rss
    return resident


def test_adapters_keep_less() -> None:
    """Without gradients of the weights, many of their inputs are not needed."""
    model, _ = load_base(tiny_config(), seed=0)
    everything = bytes_a_token(model)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model.base_model.layers[-1].mlp.down_proj.weight.requires_grad_(True)
    assert bytes_a_token(model) < everything * 0.7


def test_checkpointed_layers_take_their_inputs_and_one_layer() -> None:
    found = []
    for num_layers in (4, 8):
        model, _ = load_base(tiny_config(num_layers=num_layers), seed=0)
        plain = bytes_a_token(model)
        use_gradient_checkpointing(model, True, "sft")
        found.append((plain, bytes_a_token(model)))
    (plain_4, kept_4), (plain_8, kept_8) = found
    # Each layer more costs its input, 32 numbers in float32, and not what it makes.
    assert kept_8 - kept_4 == pytest.approx(4 * 32 * 4, rel=0.2)
    assert plain_8 - plain_4 > 5 * (kept_8 - kept_4)
    assert plain_4 / 4 < kept_4 < plain_4 / 2


def test_a_model_with_few_positions() -> None:
    config = GPT2Config(
        n_positions=24, n_embd=16, n_layer=1, n_head=2, vocab_size=11, attn_pdrop=0.0
    )
    config._attn_implementation = "sdpa"
    assert bytes_a_token(GPT2LMHeadModel(config)) > 16 * 4


def test_no_random_number_is_drawn_and_the_mode_stays(tmp_path: Path) -> None:
    model, _ = load_base(tiny_config(), seed=0)
    add_adapters(model, LoRAConfig(dropout=0.5), section="sft.lora", seed=0)
    model.eval()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    fitted_budget(64, "sft", [model], tmp_path)
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and not any(part.training for part in model.modules())


def test_the_budget_is_what_memory_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    model, _ = load_base(tiny_config(), seed=0)
    size = sum(weight.numel() for weight in model.parameters())
    vocabulary = model.get_output_embeddings().weight.shape[0]
    # Gradients and two moments; logits of 1,000 tokens: in two formats, and kept.
    beside = 3 * 4 * size + 3 * 4 * 1000 * vocabulary
    free = beside + bytes_a_token(model) * 250
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: free)
    with caplog.at_level(logging.WARNING):
        budget = fitted_budget(1000, "rl.online", [model], tmp_path)
    assert budget.tokens == 200  # four fifths
    assert "rl.online.micro_batch_tokens: memory holds 200 tokens at once, not 1000" in caplog.text


def test_what_is_not_given_is_what_serves_the_narrowest_choice_of_the_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, _ = load_base(tiny_config(), seed=0)
    wide, _ = load_base(tiny_config(intermediate_size=512), seed=0)
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: MUCH)
    assert fitted_budget(None, "sft", [narrow], _made(tmp_path / "sft")).tokens == 8192
    both = fitted_budget(None, "rl.online", [narrow, wide], _made(tmp_path / "online"))
    assert both.tokens == 9 * 2**17 // 512
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: 0)
    assert fitted_budget(None, "sft", [narrow], _made(tmp_path / "little")).tokens == 16


def test_later_attempts_split_as_the_first_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, _ = load_base(tiny_config(), seed=0)
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: MUCH)
    assert fitted_budget(1000, "sft", [model], tmp_path).tokens == 1000
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: 0)
    assert fitted_budget(1000, "sft", [model], tmp_path).tokens == 1000
    assert fitted_budget(1000, "sft", [model], _made(tmp_path / "other")).tokens == 16


def test_a_critic_that_takes_more_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, _ = load_base(tiny_config(), seed=0)
    large, _ = load_base(tiny_config(num_layers=4), seed=0)
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: 2**30)
    both = fitted_budget(10**6, "rl.online", [small, large], _made(tmp_path / "both"))
    alone = fitted_budget(10**6, "rl.online", [large], _made(tmp_path / "alone"))
    assert 16 < both.tokens <= alone.tokens


def test_training_with_little_memory_is_training_with_few_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: 0)
    little = trained(tmp_path / "little", 1000)
    monkeypatch.setattr(measured_memory, "free_bytes", lambda device: MUCH)
    few = trained(tmp_path / "few", 16)
    much = trained(tmp_path / "much", 1000)
    assert much.num_micro_batches < little.num_micro_batches == few.num_micro_batches
    for name, weight in few.weights.items():
        assert torch.equal(little.weights[name], weight)


def _made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_what_is_kept_is_read_as_it_was_written(tmp_path: Path) -> None:
    budget = TokenBudget(100, "sft")
    budget.fit(10.0, 500.0, tmp_path / "budget.json")
    assert budget.tokens == 50
    assert (tmp_path / "budget.json").read_text(encoding="utf-8") == '{"tokens": 50}\n'
