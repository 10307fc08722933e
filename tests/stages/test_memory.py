"""Memory that runs out: half as much at once, the same step, and the user is told."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn

from schemas.base import UserError
from stages import supervised
from stages.forward import Sequences
from stages.memory import TokenBudget, out_of_memory, tokens_at_once
from stages.models import load_base
from stages.train_sft import micro_losses
from tests.stages.conftest import tiny_config
from tests.stages.fakes import MemoryTracker
from tests.stages.test_supervised import CONFIG, examples

CPU_MESSAGE = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"


@pytest.mark.parametrize(
    ("width", "tokens"),
    # 1,179,648 elements of the widest states, between 768 and 8,192 tokens.
    [(64, 8192), (688, 1714), (1024, 1152), (1536, 768), (18944, 768)],
)
def test_a_micro_batch_on_a_processor_is_what_the_cache_holds(width: int, tokens: int) -> None:
    model = _layers(width)
    assert tokens_at_once(None, model) == tokens
    assert tokens_at_once(300, model) == 300


@pytest.mark.parametrize(
    ("prompt", "tokens"),
    # At most an eighth of a micro-batch, unless a GPU's does not suffice.
    [(90.0, 768), (200.0, 1600), (1500.5, 12004), (4000.0, 16384)],
)
def test_a_shared_prompt_is_a_small_part_of_a_micro_batch(prompt: float, tokens: int) -> None:
    model = _layers(1536)
    assert tokens_at_once(None, model, prompt) == tokens
    assert tokens_at_once(512, model, prompt) == 512


def test_prompts_that_no_two_sequences_share_do_not_count() -> None:
    model = _layers(1536)
    long, other = list(range(2000)), list(range(1, 2001))
    apart = Sequences([long, other], [[1], [1]])
    assert list(apart.best_micro_batches(None, model)) == [[0], [1]]
    together = Sequences([long, other, long], [[1], [1], [1]])
    assert list(together.best_micro_batches(None, model)) == [[0, 2, 1]]
    assert len(list(together.best_micro_batches(1024, model))) == 3


def test_a_micro_batch_on_other_devices_keeps_them_busy() -> None:
    assert tokens_at_once(None, _layers(1536).to("meta")) == 16384


def test_neither_vocabulary_nor_a_matrix_for_each_expert_counts() -> None:
    model = _layers(1536)
    model.embedding = nn.Embedding(49152, 8)
    assert tokens_at_once(None, model) == 768
    layers = model.layers
    assert isinstance(layers, nn.ModuleList)
    layers[0].experts = nn.Parameter(torch.zeros(4096, 2, 8))
    assert tokens_at_once(None, model) == 768


def _layers(width: int) -> nn.Module:
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(8, width, bias=False) for _ in range(2)])
    return model


def test_the_budget_is_halved_until_it_fits(caplog: pytest.LogCaptureFixture) -> None:
    budget = TokenBudget(1000, "sft")
    tried: list[int] = []
    cleared: list[None] = []

    def work(tokens: int) -> str:
        tried.append(tokens)
        if tokens > 300:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return "done"

    with caplog.at_level(logging.WARNING):
        assert budget.run(work, lambda: cleared.append(None)) == "done"
    assert tried == [1000, 500, 250]
    assert len(cleared) == 2
    assert "going on with 250 tokens at once; set sft.micro_batch_tokens" in caplog.text
    # It stays: the next step does not fail twice first.
    budget.run(work, lambda: None)
    assert tried[3:] == [250]


def test_what_does_not_fit_at_all_is_an_error() -> None:
    def work(tokens: int) -> None:
        raise RuntimeError(CPU_MESSAGE)

    with pytest.raises(UserError, match="out of memory with 15 tokens at once"):
        TokenBudget(1000, "sft").run(work, lambda: None)


@pytest.mark.parametrize("error", [RuntimeError("shapes do not fit"), ValueError("no")])
def test_other_errors_are_left_alone(error: Exception) -> None:
    def work(tokens: int) -> None:
        raise error

    assert not out_of_memory(error)
    with pytest.raises(type(error)):
        TokenBudget(1000, "sft").run(work, lambda: None)


class Trained(NamedTuple):
    weights: dict[str, Any]
    failures: int
    num_micro_batches: int


def trained(run_dir: Path, tokens: int, limit: int | None = None) -> Trained:
    """SFT on a machine on which more than `limit` tokens at once do not fit."""
    model, _ = load_base(tiny_config(), seed=0)
    data = examples()
    config = CONFIG.model_copy(update={"micro_batch_tokens": tokens})
    failures = count = 0

    def losses(indices: list[int], max_tokens: int) -> Any:
        nonlocal failures, count
        for number, micro in enumerate(
            micro_losses(model, [data[i] for i in indices], config, max_tokens)
        ):
            if limit is not None and max_tokens > limit and number == 1:
                failures += 1
                raise RuntimeError(CPU_MESSAGE)  # after a gradient that must not count
            count += 1
            yield micro

    supervised.train(
        model,
        section="sft",
        record_ids=[str(i) for i in range(len(data))],
        micro_losses=losses,
        settings=config,
        seed=5,
        run_dir=run_dir,
        tracker=MemoryTracker(),
    )
    return Trained(dict(model.state_dict()), failures, count)


def test_training_goes_on_as_if_it_had_begun_with_less(tmp_path: Path) -> None:
    expected = trained(tmp_path / "less", 16)
    observed = trained(tmp_path / "half", 32, limit=16)
    assert observed.failures == 1
    for name, weight in expected.weights.items():
        assert torch.equal(observed.weights[name], weight)
