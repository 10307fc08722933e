"""vLLM in process: new weights in place, exact log-probabilities, versions."""

import copy
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from schemas.base import UserError
from schemas.rl import RolloutConfig, SamplingConfig
from schemas.training import LoRAConfig
from stages.adapters import add_adapters
from stages.rollout.engine import build_engine
from stages.rollout.native import NativeEngine
from stages.rollout.types import Rollout, RolloutEngine
from tests.stages.rollout.tiny import EOS, PROMPTS, exact_logprobs, letters, llama

GREEDY = SamplingConfig(temperature=0, max_completion_tokens=20)

# Each ends some greedy completion of the tied model and of the other.
STOPS: list[dict[str, Any]] = [
    {"stop": ("rI", "cl", "kk")},
    {"stop_token_ids": (37, 46)},
    {"stop": ("ooo", "Is", "hd"), "stop_token_ids": (24, 62)},
]

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


def start(model: PreTrainedModel, folder: Path) -> RolloutEngine:
    model.save_pretrained(folder)
    tokenizer = letters(64)
    tokenizer.save_pretrained(folder)
    return build_engine(
        RolloutConfig(engine="vllm", max_batch_size=32),
        model=model,
        model_folder=folder,
        eos_token_ids=[EOS],
        pad_token_id=EOS,
        tokenizer=tokenizer,
    )


@dataclass(frozen=True)
class Renewed:
    """An engine on its second weights, and what was drawn greedily by it and by a fresh one."""

    engine: RolloutEngine
    model: PreTrainedModel
    before: list[Rollout]
    fresh: list[Rollout]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(True, id="tied"),
        pytest.param(False, id="untied", marks=pytest.mark.slow),
    ],
)
def renewed(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Renewed]:
    first, second = llama(0, tied=request.param), llama(1, tied=request.param)
    fresh_engine = start(second, tmp_path_factory.mktemp("second"))
    fresh = fresh_engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
    fresh_engine.close()
    engine = start(first, tmp_path_factory.mktemp("first"))
    before = engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
    engine.update_weights(second, 5)
    yield Renewed(engine, second, before, fresh)
    engine.close()


@pytest.mark.vllm
@needs_vllm
def test_update_is_as_good_as_a_fresh_engine(renewed: Renewed) -> None:
    found = renewed.engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
    assert [r.completion_ids for r in found] == [r.completion_ids for r in renewed.fresh]
    assert [r.completion_ids for r in found] != [r.completion_ids for r in renewed.before]
    for rollout, expected in zip(found, renewed.fresh, strict=True):
        assert rollout.rollout_logprobs == pytest.approx(expected.rollout_logprobs, abs=1e-5)
        exact = exact_logprobs(renewed.model, rollout, 1.0)
        assert rollout.rollout_logprobs == pytest.approx(exact, abs=1e-4)
    assert {r.policy_version for r in [*renewed.before, *renewed.fresh]} == {0}
    assert {r.policy_version for r in found} == {5}


@pytest.mark.vllm
@needs_vllm
def test_both_engines_agree(renewed: Renewed) -> None:
    native = NativeEngine(renewed.model, eos_token_ids=[EOS], pad_token_id=EOS, max_batch_size=32)
    found, expected = (
        engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
        for engine in (renewed.engine, native)
    )
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    assert [r.finish_reason for r in found] == [r.finish_reason for r in expected]


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 1.0},
        {"temperature": 0.7},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 0.7, "top_p": 0.8},
        {"temperature": 1.4, "top_k": 5},
        {"temperature": 1.4, "min_p": 0.1},
    ],
)
def test_logprobs_are_the_trainers(renewed: Renewed, changes: dict[str, Any]) -> None:
    engine, model = renewed.engine, renewed.model
    sampling = SamplingConfig(max_completion_tokens=20, **changes)
    rollouts = engine.generate(PROMPTS, sampling, num_samples=4, seed=1)
    assert [r.prompt_index for r in rollouts] == [i for i in range(len(PROMPTS)) for _ in range(4)]
    for rollout in rollouts:
        assert rollout.prompt_ids == PROMPTS[rollout.prompt_index]
        assert rollout.rollout_logprobs == pytest.approx(
            exact_logprobs(model, rollout, sampling.temperature), abs=1e-4
        )
        ids = rollout.completion_ids
        assert EOS not in ids[:-1]
        assert (ids[-1] == EOS) == (rollout.finish_reason == "stop")
        assert len(ids) == 20 or not rollout.truncated


@pytest.mark.vllm
@needs_vllm
def test_temperature_shapes_what_is_drawn(renewed: Renewed) -> None:
    engine, model = renewed.engine, renewed.model
    sampling = SamplingConfig(temperature=0.5, max_completion_tokens=1)
    rollouts = engine.generate([PROMPTS[0]], sampling, num_samples=2000, seed=3)
    with torch.no_grad():
        expected = (model(torch.tensor([PROMPTS[0]])).logits[0, -1] / 0.5).softmax(-1)
    drawn = torch.bincount(torch.tensor([r.completion_ids[0] for r in rollouts]), minlength=64)
    error = (expected * (1 - expected) / 2000).sqrt()
    assert ((drawn / 2000 - expected).abs() <= 5 * error + 1e-3).all()


@pytest.mark.vllm
@needs_vllm
def test_min_p_keeps_the_tokens_that_the_native_engine_keeps(renewed: Renewed) -> None:
    sampling = SamplingConfig(temperature=1.5, min_p=0.3, max_completion_tokens=1)
    rollouts = renewed.engine.generate(PROMPTS, sampling, num_samples=400, seed=3)
    for index, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            p = (renewed.model(torch.tensor([prompt])).logits[0, -1] / 1.5).softmax(-1)
        kept = set((p >= 0.3 * p.max()).nonzero().squeeze(1).tolist())
        assert {r.completion_ids[0] for r in rollouts if r.prompt_index == index} == kept


@pytest.mark.vllm
@needs_vllm
@pytest.mark.parametrize("changes", STOPS)
def test_both_engines_stop_at_the_same_places(renewed: Renewed, changes: dict[str, Any]) -> None:
    native = NativeEngine(
        renewed.model,
        eos_token_ids=[EOS],
        pad_token_id=EOS,
        max_batch_size=32,
        tokenizer=letters(64),
    )
    sampling = GREEDY.model_copy(update=changes)
    found, expected = (
        engine.generate(PROMPTS, sampling, num_samples=1, seed=0)
        for engine in (renewed.engine, native)
    )
    assert [r.completion_ids for r in found] == [r.completion_ids for r in expected]
    assert [r.finish_reason for r in found] == [r.finish_reason for r in expected]
    assert "stop" in {r.finish_reason for r in found}


@pytest.mark.vllm
@needs_vllm
def test_same_seed_gives_the_same_whatever_came_before(renewed: Renewed) -> None:
    engine = renewed.engine
    sampling = SamplingConfig(max_completion_tokens=10)
    first = engine.generate(PROMPTS, sampling, num_samples=3, seed=7)
    other = engine.generate(PROMPTS, sampling, num_samples=3, seed=8)
    assert engine.generate(PROMPTS, sampling, num_samples=3, seed=7) == first
    assert [r.completion_ids for r in other] != [r.completion_ids for r in first]
    assert len({tuple(r.completion_ids) for r in first[:3]}) > 1


# The last of the module: the engine's weights are others behind it.
@pytest.mark.vllm
@needs_vllm
def test_adapters_are_merged_into_what_the_engine_is_given(renewed: Renewed) -> None:
    model = copy.deepcopy(renewed.model)
    add_adapters(model, LoRAConfig(rank=4), section="rl.online.lora", seed=0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    renewed.engine.update_weights(model, 6)
    found = renewed.engine.generate(PROMPTS, GREEDY, num_samples=1, seed=0)
    assert [r.completion_ids for r in found] != [r.completion_ids for r in renewed.fresh]
    for rollout in found:
        exact = exact_logprobs(model, rollout, 1.0)
        assert rollout.rollout_logprobs == pytest.approx(exact, abs=1e-4)
    assert {r.policy_version for r in found} == {6}


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_machine_without_vllm_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'posttrain\[vllm\]'.*engine: native"):
        start(llama(0, tied=True), tmp_path)
