"""The same numbers on CUDA as on the CPU. Run with `pytest -m gpu` on a machine that has one."""

from __future__ import annotations

import copy

import pytest
import torch

from schemas.rl import RolloutConfig, SamplingConfig
from stages.forward import Sequences, completion_logprobs
from stages.models import load_base, to_device
from stages.rollout.engine import build_engine
from tests.stages.conftest import tiny_config

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def test_logprobs_and_gradients_agree_with_the_cpu() -> None:
    cpu, _ = load_base(tiny_config(), seed=0)
    cuda = to_device(copy.deepcopy(cpu), torch.device("cuda"))
    sequences = Sequences([[4, 5, 6], [7, 8]], [[9, 10, 1], [11, 12, 13, 1]])
    results = []
    for model in (cpu, cuda):
        logprobs, _ = completion_logprobs(model, sequences, 5, 0.7)
        logprobs.sum().backward()
        gradient = model.base_model.layers[0].mlp.up_proj.weight.grad
        results.append((logprobs.detach().cpu(), gradient.cpu()))
    for left, right in zip(*results, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-4)


def test_native_sampling_carries_the_logprobs_of_the_model() -> None:
    model, tokenizer = load_base(tiny_config(), seed=0)
    to_device(model, torch.device("cuda"))
    engine = build_engine(
        RolloutConfig(),
        model=model,
        model_folder=None,  # type: ignore[arg-type] - the native engine does not look at it
        eos_token_ids=[tokenizer.eos_token_id],
        pad_token_id=tokenizer.pad_token_id,
    )
    sampling = SamplingConfig(max_completion_tokens=8)
    rollouts = engine.generate([[4, 5], [6, 7, 8]], sampling, num_samples=4, seed=0)
    sequences = Sequences(
        [rollout.prompt_ids for rollout in rollouts],
        [rollout.completion_ids for rollout in rollouts],
    )
    logprobs, _ = completion_logprobs(model, sequences, 8)
    for row, rollout in zip(logprobs.tolist(), rollouts, strict=True):
        own = rollout.rollout_logprobs
        assert row[: len(own)] == pytest.approx(own, abs=1e-3)
