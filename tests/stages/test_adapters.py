"""Adapters against a second model, and against peft's own merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from schemas.base import UserError
from schemas.rl import DPOConfig
from schemas.training import LoRAConfig, OptimizerConfig
from stages.adapters import (
    adapters_disabled,
    add_adapters,
    has_adapters,
    merge,
    plain_parameters,
)
from stages.forward import Sequences, all_completion_logprobs, completion_logprobs
from stages.models import load_policy
from stages.optimization import Optimizer
from stages.precision import use_precision
from stages.rl.dpo import reference_logprobs
from stages.rollout.policy_file import PolicyFile
from stages.rollout.vllm_engine import VLLMEngine
from stages.train_reward_model import Pair

SEQUENCES = Sequences([[3, 4, 5], [3, 4, 5], [6, 7]], [[8, 9, 10], [4], [5, 6, 7, 8, 9]])
CPU = torch.device("cpu")


def llama(*, tied: bool = True, bias: bool = False) -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        tie_word_embeddings=tied,
        attention_bias=bias,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


def qwen2() -> PreTrainedModel:
    torch.manual_seed(1)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    return Qwen2ForCausalLM(Qwen2Config(vocab_size=24, **sizes, **heads)).eval()


def gpt2() -> PreTrainedModel:
    """Its projections are stored the other way round."""
    torch.manual_seed(1)
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=24, n_embd=16, n_layer=2, n_head=2, n_positions=32, **off)
    return GPT2LMHeadModel(config).eval()


def adapted(model: PreTrainedModel, **changes: Any) -> PreTrainedModel:
    """With adapters that do something: peft starts one of the two factors at 0."""
    config = LoRAConfig.model_validate({"rank": 3, "alpha": 5.0, **changes})
    add_adapters(model, config, section="sft.lora", seed=0)
    return stirred(model)


def stirred(model: Any) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return model


def logprobs(model: PreTrainedModel) -> Tensor:
    return all_completion_logprobs(model, SEQUENCES, 5, 64, 0.7)


def state(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_without_its_adapters_a_policy_is_its_reference_to_the_bit(
    tiny_folder: Path, precision: Any
) -> None:
    second = use_precision(load_policy(tiny_folder, CPU), precision).requires_grad_(False)
    policy = adapted(use_precision(load_policy(tiny_folder, CPU), precision))
    policy.train()
    moved = logprobs(policy)
    with adapters_disabled(policy):
        assert torch.equal(logprobs(policy), logprobs(second))
        assert not policy.training
    assert (moved - logprobs(second)).abs().max() > 0.01
    # All is as it was before.
    assert policy.training
    assert torch.equal(logprobs(policy), moved)
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in policy.named_parameters() if "lora_" in name}


def test_dpo_is_measured_against_the_model_without_adapters() -> None:
    pairs = [Pair([3, 4], [5, 6, 7], [8]), Pair([9], [4, 5], [6, 6])]
    config = DPOConfig(optimizer=OptimizerConfig(learning_rate=1.0), max_length=16)
    found = reference_logprobs(adapted(llama()).train(), pairs, config)
    expected = reference_logprobs(llama().requires_grad_(False), pairs, config)
    assert torch.equal(found.chosen, expected.chosen)
    assert torch.equal(found.rejected, expected.rejected)


def test_adapters_come_back_after_an_error() -> None:
    policy = adapted(llama())
    before = logprobs(policy)
    with pytest.raises(ZeroDivisionError), adapters_disabled(policy):
        raise ZeroDivisionError
    assert torch.equal(logprobs(policy), before)


def test_dropout_of_the_adapters_is_off_where_they_are_disabled() -> None:
    policy = adapted(llama(), dropout=0.5).train()
    assert not torch.equal(logprobs(policy), logprobs(policy))
    with adapters_disabled(policy):
        assert torch.equal(logprobs(policy), logprobs(llama().requires_grad_(False)))


def test_new_adapters_do_nothing_and_depend_on_the_seed_alone() -> None:
    plain = logprobs(llama().requires_grad_(False))
    states = []
    for seed in (0, 0, 1):
        model = llama()
        torch.rand(seed + 3)
        add_adapters(model, LoRAConfig(rank=2), section="sft.lora", seed=seed)
        assert logprobs(model) == pytest.approx(plain, abs=1e-6)
        states.append(state(model))
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    name = "model.layers.0.self_attn.q_proj.lora_A.default.weight"
    assert not torch.equal(states[0][name], states[2][name])


MODELS = {
    "tied": llama,
    "untied": lambda: llama(tied=False),
    "bias": lambda: llama(bias=True),
    "qwen2": qwen2,
    "gpt2": gpt2,
}


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.parametrize("targets", ["all-linear", "some"])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_merged_names_and_values_are_those_of_peft(kind: str, targets: str) -> None:
    from peft import LoraConfig, get_peft_model

    own = {"gpt2": ["c_attn"]}.get(kind, ["q_proj", "down_proj"])
    modules: Any = own if targets == "some" else targets
    model = adapted(MODELS[kind](), target_modules=modules)
    theirs = stirred(
        get_peft_model(
            MODELS[kind](),
            LoraConfig(task_type="CAUSAL_LM", r=3, lora_alpha=5.0, target_modules=modules),
        )
    ).merge_and_unload()
    before = state(model)
    found = list(plain_parameters(model))
    expected = list(theirs.named_parameters())
    assert [name for name, _ in found] == [name for name, _ in expected]
    for (name, value), (_, other) in zip(found, expected, strict=True):
        assert torch.equal(value, other), name
        assert not value.requires_grad
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    # A model without adapters gives its own parameters, without a copy.
    plain = MODELS[kind]()
    for (name, value), (other_name, other) in zip(
        plain_parameters(plain), plain.named_parameters(), strict=True
    ):
        assert name == other_name
        assert value.data_ptr() == other.data_ptr()


def test_merging_by_hand() -> None:
    model = adapted(llama(), target_modules=["up_proj"])
    base = dict(llama().named_parameters())
    parts = state(model)
    for name, value in plain_parameters(model):
        expected = base[name].double()
        if "up_proj" in name:
            prefix = name.removesuffix("weight")
            a, b = (parts[f"{prefix}lora_{x}.default.weight"].double() for x in "AB")
            expected = expected + 5.0 / 3 * (b @ a)
            assert (expected - base[name]).abs().max() > 0.01
        assert value.double() == pytest.approx(expected.detach(), abs=1e-6), name


@pytest.mark.parametrize("kind", list(MODELS))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set to False")
def test_a_merged_model_is_a_plain_one_that_says_the_same(kind: str, tmp_path: Path) -> None:
    model = adapted(MODELS[kind]())
    expected, weights = logprobs(model), dict(plain_parameters(model))
    plain = merge(model)
    assert not has_adapters(plain)
    assert all(torch.equal(weights[name], p) for name, p in plain.named_parameters())
    assert state(plain).keys() == state(MODELS[kind]()).keys()
    plain.save_pretrained(tmp_path)
    loaded = type(plain).from_pretrained(tmp_path).eval()
    assert logprobs(loaded) == pytest.approx(expected, abs=1e-5)


def test_merging_a_plain_model_does_nothing() -> None:
    model = llama()
    before = state(model)
    assert merge(model) is model
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())


def test_bfloat16_weights_get_float32_adapters_and_merge_to_bfloat16() -> None:
    model = adapted(llama().to(torch.bfloat16), target_modules=["q_proj"])
    dtypes = {name: p.dtype for name, p in model.named_parameters()}
    assert {t for name, t in dtypes.items() if "lora_" in name} == {torch.float32}
    name = "model.layers.0.self_attn.q_proj."
    parts = state(model)
    a, b = (parts[f"{name}lora_{x}.default.weight"] for x in "AB")
    expected = (parts[f"{name}base_layer.weight"].float() + 5.0 / 3 * (b @ a)).bfloat16()
    assert torch.equal(dict(plain_parameters(model))[f"{name}weight"], expected)


def test_only_the_adapters_are_optimised_and_get_a_gradient() -> None:
    model = adapted(llama(tied=False)).train()
    before = state(model)
    optimizer = Optimizer.create(model, OptimizerConfig(learning_rate=0.1, weight_decay=0.1), 10)
    completion_logprobs(model, SEQUENCES, 5)[0].sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        name for name in before if "lora_" in name
    }
    optimizer.step()
    after = state(model)
    for name in before:
        assert torch.equal(after[name], before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["lm_head"], "lm_head cannot have an adapter"),
        (["q_proj", "embed_tokens"], "model.embed_tokens cannot have an adapter"),
        (["q_proj", "nothing"], "LlamaForCausalLM has no module nothing"),
        (["nothing"], "Target modules {'nothing'} not found"),
        (["input_layernorm"], "Target module LlamaRMSNorm.* is not supported"),
    ],
)
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_modules_that_cannot_be_adapted_are_refused(targets: list[str], message: str) -> None:
    remedy = "use all-linear, or some of down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v"
    with pytest.raises(UserError, match=f"^rl.dpo.lora.target_modules: {message}.*; {remedy}"):
        add_adapters(
            llama(),
            LoRAConfig.model_validate({"target_modules": targets}),
            section="rl.dpo.lora",
            seed=0,
        )


def test_servers_read_merged_weights_under_plain_names(tmp_path: Path) -> None:
    model = adapted(llama())
    file = PolicyFile(tmp_path)
    file.write(model)
    found, expected = load_file(file.path), dict(merge(model).named_parameters())
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


class ScriptedVLLM:
    """Keeps the weights that it is given."""

    def __init__(self) -> None:
        self.weights: list[tuple[str, Tensor]] = []

    def collective_rpc(self, method: str, kwargs: Any) -> None:
        assert method == "reload_weights"
        self.weights += list(kwargs["weights_iterator"])

    def apply_model(self, function: Any) -> None: ...


def test_vllm_is_given_merged_weights_under_plain_names() -> None:
    model = adapted(llama())
    before = state(model)
    engine, inner = VLLMEngine.__new__(VLLMEngine), ScriptedVLLM()
    engine._llm = inner
    engine.update_weights(model, 3)
    assert all(torch.equal(value, before[name]) for name, value in state(model).items())
    expected = list(merge(model).named_parameters())
    assert [name for name, _ in inner.weights] == [name for name, _ in expected]
    for (name, value), (_, other) in zip(inner.weights, expected, strict=True):
        assert torch.equal(value, other), name
