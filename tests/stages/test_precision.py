"""bfloat16 products: near the float32 gradient, and never with stale weights."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from schemas.rl import SamplingConfig
from stages.forward import Sequences, all_completion_logprobs, completion_logprobs
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.lean_layers import HeldWeights
from stages.precision import compute_dtype, freeze, held_copy, use_precision, weights_held
from stages.rollout.native import NativeEngine

SEQUENCES = Sequences(
    [[1, 2, 3], [1, 2, 3], [4, 5]], [[(7 * i) % 29 + 1 for i in range(n)] for n in (40, 25, 60)]
)


def fresh(precision: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
    )
    model: PreTrainedModel = LlamaForCausalLM(config)
    return use_precision(model, precision)  # type: ignore[arg-type]


def gradient(model: PreTrainedModel) -> torch.Tensor:
    logprobs, _ = completion_logprobs(model, SEQUENCES, 60)
    assert logprobs.dtype == torch.float32
    logprobs.sum().backward()  # type: ignore[no-untyped-call]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(grad.dtype == torch.float32 for grad in grads)
    return torch.cat([grad.flatten() for grad in grads]).double()


def test_the_gradient_points_where_that_of_float32_does() -> None:
    exact, rough = gradient(fresh("float32")), gradient(fresh("bfloat16"))
    assert not torch.equal(exact, rough)
    assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.999


def test_weights_and_heads_keep_their_format() -> None:
    model = fresh("bfloat16")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert compute_dtype(model) == torch.bfloat16
    assert compute_dtype(fresh("float32")) == torch.float32


def test_a_step_of_the_optimizer_is_seen_by_training_and_by_sampling() -> None:
    """Autocast keeps copies of weights within a region: none may outlive a change."""
    model = fresh("bfloat16")
    engine = NativeEngine(model, eos_token_ids=[0], pad_token_id=0, max_batch_size=8)
    sampling = SamplingConfig(max_completion_tokens=12, temperature=0)

    def greedy() -> list[int]:
        return engine.generate([[1, 2, 3]], sampling, num_samples=1, seed=0)[0].completion_ids

    before, logprobs = greedy(), completion_logprobs(model, SEQUENCES, 60)[0]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
    after = greedy()
    other = use_precision(LlamaForCausalLM(model.config), "bfloat16")
    other.load_state_dict(model.state_dict())
    fresh_engine = NativeEngine(other, eos_token_ids=[0], pad_token_id=0, max_batch_size=8)
    expected = fresh_engine.generate([[1, 2, 3]], sampling, num_samples=1, seed=0)[0]
    assert after == expected.completion_ids != before
    changed = completion_logprobs(model, SEQUENCES, 60)[0]
    torch.testing.assert_close(changed, completion_logprobs(other, SEQUENCES, 60)[0])
    assert not torch.allclose(changed, logprobs)


def test_where_layers_are_computed_again_copies_are_held_for_sampling_alone() -> None:
    """A copy that is held is what a region goes on with, though its weight was changed."""
    for saving in (False, True):
        model = fresh("bfloat16").train()
        use_gradient_checkpointing(model, saving, "rl.online")
        for training in (True, False):
            model.train(training)
            with torch.no_grad(), weights_held(model):
                before, _ = completion_logprobs(model, SEQUENCES, 60)
                model.base_model.layers[0].mlp.up_proj.weight.mul_(0.5)
                after, _ = completion_logprobs(model, SEQUENCES, 60)
            assert torch.equal(before, after) is not (saving and training)


def test_a_head_is_turned_into_bfloat16_once_in_a_region() -> None:
    model = fresh("bfloat16").train()
    weight = model.get_output_embeddings().weight
    assert held_copy(model, weight, torch.bfloat16) is None
    with weights_held(model):
        copy = held_copy(model, weight, torch.bfloat16)
        assert copy is not None and torch.equal(copy, weight.bfloat16())
        assert held_copy(model, weight, torch.bfloat16) is copy
    use_gradient_checkpointing(model, True, "rl.online")
    with weights_held(model):
        assert held_copy(model, weight, torch.bfloat16) is None


def test_passes_without_gradient_turn_each_weight_into_bfloat16_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, other = fresh("bfloat16"), fresh("bfloat16")
    copies: dict[int, list[torch.Tensor]] = defaultdict(list)
    plain = HeldWeights.of

    def seen(self: HeldWeights, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        found = plain(self, weight, dtype)
        copies[id(weight)].append(found)
        return found

    monkeypatch.setattr(HeldWeights, "of", seen)
    found = all_completion_logprobs(model, SEQUENCES, 60, 70, 1.0)
    assert len(copies) == 3 * 7 + 1  # maps of the layers, and the head
    assert all(len(each) == 2 and each[0] is each[1] for each in copies.values())
    assert held_copy(model, model.get_output_embeddings().weight, torch.bfloat16) is None
    for row in range(3):
        alone, _ = completion_logprobs(other, SEQUENCES.select([row]), 60)
        torch.testing.assert_close(found[row : row + 1], alone, rtol=0, atol=0.02)


def test_a_region_may_begin_with_inference_and_go_on_with_training() -> None:
    model, other = fresh("bfloat16"), fresh("bfloat16")
    with weights_held(model):
        with torch.inference_mode():
            before, _ = completion_logprobs(model, SEQUENCES, 60)
        found = gradient(model)
    assert before.any()
    assert torch.equal(found, gradient(other))


def test_a_frozen_model_is_smaller_and_gives_the_same_to_the_bit() -> None:
    model = fresh("bfloat16")
    with torch.no_grad():
        before = completion_logprobs(model, SEQUENCES, 60)
        loaded = {p.data_ptr() for p in model.parameters()}
        kept = [p.data for p in model.parameters()]  # so that no address is used again
        freeze(model)
        after = completion_logprobs(model, SEQUENCES, 60)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not any(p.requires_grad for p in model.parameters())
    # The head's too: a single weight would keep the file that was loaded in memory.
    assert len(kept) == 30 and loaded.isdisjoint(p.data_ptr() for p in model.parameters())
    formats = {name: p.dtype for name, p in model.named_parameters()}
    linear = {name for name in formats if "_proj." in name}
    assert len(linear) == 3 * 7
    assert all((formats[name] == torch.bfloat16) == (name in linear) for name in formats)


def test_a_model_frozen_in_float32_stays_in_it() -> None:
    model = freeze(fresh("float32"))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
