"""Gradient checkpointing: the same gradients to the bit, from less memory."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from schemas.base import UserError
from schemas.fingerprint import fingerprint
from schemas.requests import TrainRLRequest
from schemas.rl import DPOConfig, SamplingConfig
from schemas.training import (
    LoRAConfig,
    ProcessRewardModelConfig,
    RewardModelConfig,
    SFTConfig,
)
from stages import train_process_reward_model, train_reward_model, train_sft
from stages.adapters import add_adapters
from stages.forward import Sequences, completion_outputs, completion_values
from stages.gradient_checkpointing import use_gradient_checkpointing
from stages.models import load_policy, load_with_head
from stages.precision import use_precision, weights_held
from stages.rl import dpo
from stages.rollout.native import NativeEngine
from stages.shared_critic import SharedCritic
from stages.train_process_reward_model import Labelled
from stages.train_reward_model import Pair
from stages.train_sft import Example
from tests.stages import test_rl_adapters as online_stages
from tests.stages.test_rl_adapters import assert_same_when_cut, run, sft_request
from tests.stages.test_stages import House

CPU = torch.device("cpu")
PROMPTS = [[1, 2, 3], [1, 2, 3], [4, 5], [6, 7, 8, 9]]
COMPLETIONS = [[(7 * i + n) % 29 + 1 for i in range(n)] for n in (19, 12, 23, 8)]
SEQUENCES = Sequences(PROMPTS, COMPLETIONS)
PAIRS = [
    Pair(PROMPTS[0], COMPLETIONS[0], COMPLETIONS[1]),
    Pair(PROMPTS[3], COMPLETIONS[2], COMPLETIONS[3]),
]
LABELLED = [
    Labelled(prompt, completion, [3, len(completion) - 1], [1, 0])
    for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
]
SETTINGS: dict[str, Any] = {"optimizer": {"learning_rate": 1e-3}, "max_length": 64}
NUM_LAYERS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        pad_token_id=0,
        eos_token_id=0,
    )
    path = tmp_path_factory.mktemp("llama")
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def sft_loss(model: PreTrainedModel) -> Iterator[Tensor]:
    config = SFTConfig.model_validate(SETTINGS)
    examples = [Example(ids, [True] * len(ids)) for ids in COMPLETIONS]
    yield from (micro.loss for micro in train_sft.micro_losses(model, examples, config, 40))


def outcome_loss(model: PreTrainedModel) -> Iterator[Tensor]:
    config = RewardModelConfig.model_validate(SETTINGS)
    found = train_reward_model.micro_losses(model, PAIRS, config, 40)
    yield from (micro.loss for micro in found)


def process_loss(model: PreTrainedModel) -> Iterator[Tensor]:
    config = ProcessRewardModelConfig.model_validate(SETTINGS)
    found = train_process_reward_model.micro_losses(model, LABELLED, config, 40)
    yield from (micro.loss for micro in found)


def preference_loss(model: PreTrainedModel) -> Iterator[Tensor]:
    config = DPOConfig.model_validate(SETTINGS)
    reference = dpo.PairLogprobs(torch.tensor([-40.0, -30.0]), torch.tensor([-50.0, -20.0]))
    found = dpo.micro_losses(model, PAIRS, reference, config, 40)
    yield from (micro.loss for micro in found)


def policy_loss(model: PreTrainedModel) -> Iterator[Tensor]:
    """A weighted sum of log-probabilities, as in the losses of every online algorithm."""
    for indices in SEQUENCES.micro_batches(40):
        logprobs, _, _ = completion_outputs(model, None, SEQUENCES.select(indices), 23, 0.7)
        yield (logprobs * torch.linspace(-1, 1, 23)).sum()


def critic_loss(model: PreTrainedModel) -> Iterator[Tensor]:
    nn.init.ones_(model.score.weight)
    for indices in SEQUENCES.micro_batches(40):
        yield (completion_values(model, SEQUENCES.select(indices), 23) - 1).square().sum()


def shared_loss(model: PreTrainedModel) -> Iterator[Tensor]:
    critic = SharedCritic(model)
    nn.init.ones_(critic.score.weight)
    for indices in SEQUENCES.micro_batches(40):
        chosen = SEQUENCES.select(indices)
        logprobs, _, values = completion_outputs(model, critic, chosen, 23, 0.7)
        assert values is not None
        yield logprobs.sum() + (values - 1).square().sum()


Losses = Callable[[PreTrainedModel], Iterator[Tensor]]
LOSSES: dict[str, tuple[Losses, str | None]] = {
    "sft": (sft_loss, None),
    "reward model": (outcome_loss, "outcome"),
    "process reward model": (process_loss, "process"),
    "dpo": (preference_loss, None),
    "policy": (policy_loss, None),
    "separate critic": (critic_loss, "value"),
    "shared critic": (shared_loss, None),
}


def fresh(
    folder: Path, precision: Any, kind: str | None = None, *, lora: float | None = None
) -> PreTrainedModel:
    """lora: dropout of adapters, if there are any."""
    model = load_policy(folder, CPU) if kind is None else load_with_head(folder, kind, 0)
    use_precision(model, precision)
    if lora is not None:
        config = LoRAConfig(rank=4, dropout=lora)
        add_adapters(model, config, section="sft.lora", seed=0)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:  # 0 at first: then no loss would see the dropout
                nn.init.normal_(parameter, std=0.1)
    return model.train()


def backward(model: PreTrainedModel, losses: Losses, *, held: bool = True) -> list[float]:
    """Gradients are added up in the model; returns the losses."""
    torch.manual_seed(5)
    found = []

    def all_of_them() -> None:
        for loss in losses(model):
            loss.backward()
            found.append(loss.item())

    if held:
        with weights_held(model):
            all_of_them()
    else:
        all_of_them()
    assert len(found) > 1
    return found


def assert_same_gradients(left: PreTrainedModel, right: PreTrainedModel) -> None:
    others = dict(right.named_parameters())
    moved = 0
    for name, parameter in left.named_parameters():
        assert (parameter.grad is None) == (others[name].grad is None), name
        if parameter.grad is not None:
            assert torch.equal(parameter.grad, others[name].grad), name
            moved += bool(parameter.grad.any())
    assert moved > NUM_LAYERS


def count_layers(model: PreTrainedModel) -> list[int]:
    """One entry for each time that a decoder layer begins to compute."""
    calls: list[int] = []
    for number, layer in enumerate(model.base_model.layers):
        layer.register_forward_pre_hook(lambda *_, number=number: calls.append(number))
    return calls


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", LOSSES)
def test_gradients_are_the_same_to_the_bit(folder: Path, name: str, precision: str) -> None:
    losses, kind = LOSSES[name]
    plain, saving = (fresh(folder, precision, kind) for _ in range(2))
    use_gradient_checkpointing(saving, True, "section")
    once, twice = count_layers(plain), count_layers(saving)
    assert backward(plain, losses) == backward(saving, losses)
    assert_same_gradients(plain, saving)
    assert len(twice) == 2 * len(once) > 0  # what was recomputed was really forgotten


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_below_adapters_gradients_are_the_same_with_and_without_dropout(
    folder: Path, precision: str, dropout: float
) -> None:
    plain, saving, other = (fresh(folder, precision, lora=dropout) for _ in range(3))
    use_gradient_checkpointing(saving, True, "sft")
    assert backward(plain, sft_loss) == backward(saving, sft_loss)
    assert_same_gradients(plain, saving)
    if dropout:
        other.eval()
        assert backward(other, sft_loss) != backward(saving, sft_loss)


def test_copies_of_weights_need_not_be_held_until_the_backward_pass(folder: Path) -> None:
    plain, saving = (fresh(folder, "bfloat16") for _ in range(2))
    use_gradient_checkpointing(saving, True, "sft")
    backward(plain, sft_loss)
    backward(saving, sft_loss, held=False)
    assert_same_gradients(plain, saving)


def saved_bytes(model: PreTrainedModel) -> int:
    """Bytes that wait for the backward pass beside weights and their copies, each once."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights and tensor.shape[-1:] != tensor.shape[-2:-1]:
            found[storage.data_ptr()] = storage.nbytes()
        return tensor

    with weights_held(model), torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        logprobs, _, _ = completion_outputs(model, None, SEQUENCES, 23, 1.0)
        held = sum(found.values())
        logprobs.sum().backward()  # type: ignore[no-untyped-call]
    return held


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_less_waits_for_the_backward_pass(folder: Path, precision: str) -> None:
    plain, saving = (fresh(folder, precision) for _ in range(2))
    use_gradient_checkpointing(saving, True, "rl.online")
    assert saved_bytes(saving) < saved_bytes(plain) / 2


def test_sampling_with_a_cache_is_as_it_was(folder: Path) -> None:
    sampling = SamplingConfig(max_completion_tokens=12)
    drawn = []
    for wanted in (False, True):
        model = fresh(folder, "bfloat16")
        use_gradient_checkpointing(model, wanted, "rl.online")
        assert model.is_gradient_checkpointing is wanted
        engine = NativeEngine(model, eos_token_ids=[0], pad_token_id=0, max_batch_size=8)
        tokens: list[int] = []
        model.base_model.layers[0].register_forward_pre_hook(
            lambda _, inputs, tokens=tokens: tokens.append(inputs[0].shape[1])
        )
        found = engine.generate([[1, 2, 3]], sampling, num_samples=4, seed=0)
        assert model.training
        assert tokens[0] == 3 and set(tokens[1:]) == {1}  # the cache holds what came before
        drawn.append([(one.completion_ids, one.rollout_logprobs) for one in found])
    assert drawn[0] == drawn[1]


def test_a_model_that_cannot_is_refused_by_the_name_of_the_option(folder: Path) -> None:
    class Stubborn(LlamaForCausalLM):
        supports_gradient_checkpointing = False

    model = Stubborn.from_pretrained(folder)
    use_gradient_checkpointing(model, False, "sft")
    with pytest.raises(UserError, match=r"sft\.gradient_checkpointing is true, but Stubborn"):
        use_gradient_checkpointing(model, True, "sft")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> House:
    return House(tmp_path_factory.mktemp("house"))


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["grpo", "ppo", "ppo_shared", "dpo"])
def test_every_algorithm_ends_with_the_same_model_and_resumes_with_either_setting(
    house: House, tmp_path: Path, algorithm: str
) -> None:
    orders = [
        online_stages.request(house, algorithm, None, gradient_checkpointing=wanted)
        for wanted in (False, True)
    ]
    plain, saving = orders
    assert fingerprint(plain) == fingerprint(saving)
    whole = run(plain, tmp_path / "whole")
    assert_same_when_cut(saving, whole, tmp_path / "cut", [3])
    config = json.loads((whole.content / "config.json").read_text())
    assert not [name for name in config if "checkpoint" in name]


def test_supervised_stages_end_with_the_same_model_when_cut(house: House, tmp_path: Path) -> None:
    whole = run(sft_request(house, lora=None), tmp_path / "whole")
    saving = sft_request(house, lora=None, gradient_checkpointing=True)
    assert_same_when_cut(saving, whole, tmp_path / "cut", [3])


def test_what_changes_the_result_still_counts(house: House) -> None:
    def order(algorithm: str, **changes: Any) -> TrainRLRequest:
        return online_stages.request(house, algorithm, None, **changes)

    for algorithm in ("grpo", "dpo"):
        assert fingerprint(order(algorithm)) != fingerprint(order(algorithm, precision="bfloat16"))
    sft = sft_request(house)
    assert fingerprint(sft) == fingerprint(sft_request(house, gradient_checkpointing=True))
    assert fingerprint(sft) != fingerprint(sft_request(house, precision="bfloat16"))
