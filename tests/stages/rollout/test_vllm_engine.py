"""vLLM in process: new weights in place, exact log-probabilities, versions."""

import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from schemas.base import UserError
from schemas.rl import RolloutConfig, SamplingConfig
from stages.rollout.engine import build_engine
from stages.rollout.native import NativeEngine
from stages.rollout.types import Rollout, RolloutEngine

EOS = 2
GREEDY = SamplingConfig(temperature=0, max_completion_tokens=20)
PROMPTS = [[5, 6, 7], [4], [3, 9, 8, 4, 10, 11, 5], [6, 6], [12, 3, 4, 5]]

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="vLLM is not installed"
)


def llama(seed: int, *, tied: bool) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=128,
            initializer_range=0.2,
            tie_word_embeddings=tied,
            bos_token_id=1,
            eos_token_id=EOS,
        )
    ).eval()


def start(model: PreTrainedModel, folder: Path) -> RolloutEngine:
    model.save_pretrained(folder)
    config = RolloutConfig(engine="vllm", max_batch_size=32)
    return build_engine(
        config, model=model, model_folder=folder, eos_token_ids=[EOS], pad_token_id=EOS
    )


def exact_logprobs(model: PreTrainedModel, rollout: Rollout, temperature: float) -> list[float]:
    with torch.no_grad():
        logits = model(torch.tensor([rollout.prompt_ids + rollout.completion_ids])).logits[0]
    scaled = logits[len(rollout.prompt_ids) - 1 : -1].double() / temperature
    chosen = scaled.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])
    return chosen.squeeze(1).tolist()


@dataclass(frozen=True)
class Renewed:
    """An engine on its second weights, and what was drawn greedily by it and by a fresh one."""

    engine: RolloutEngine
    model: PreTrainedModel
    before: list[Rollout]
    fresh: list[Rollout]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
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
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, 0), (0.7, 1.0, 0), (1.0, 0.8, 0), (0.7, 0.8, 0), (1.4, 1.0, 5)],
)
def test_logprobs_are_the_trainers(renewed: Renewed, temperature, top_p, top_k) -> None:
    engine, model = renewed.engine, renewed.model
    sampling = SamplingConfig(
        temperature=temperature, top_p=top_p, top_k=top_k, max_completion_tokens=20
    )
    rollouts = engine.generate(PROMPTS, sampling, num_samples=4, seed=1)
    assert [r.prompt_index for r in rollouts] == [i for i in range(len(PROMPTS)) for _ in range(4)]
    for rollout in rollouts:
        assert rollout.prompt_ids == PROMPTS[rollout.prompt_index]
        assert rollout.rollout_logprobs == pytest.approx(
            exact_logprobs(model, rollout, temperature), abs=1e-4
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
def test_same_seed_gives_the_same_whatever_came_before(renewed: Renewed) -> None:
    engine = renewed.engine
    sampling = SamplingConfig(max_completion_tokens=10)
    first = engine.generate(PROMPTS, sampling, num_samples=3, seed=7)
    other = engine.generate(PROMPTS, sampling, num_samples=3, seed=8)
    assert engine.generate(PROMPTS, sampling, num_samples=3, seed=7) == first
    assert [r.completion_ids for r in other] != [r.completion_ids for r in first]
    assert len({tuple(r.completion_ids) for r in first[:3]}) > 1


@pytest.mark.skipif(importlib.util.find_spec("vllm") is not None, reason="vLLM is installed")
def test_a_machine_without_vllm_is_told_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"pip install 'posttrain\[vllm\]'.*engine: native"):
        start(llama(0, tied=True), tmp_path)
