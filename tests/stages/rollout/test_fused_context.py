"""The fused decoder against plain forward passes of transformers."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from schemas.base import UserError
from schemas.rl import SamplingConfig
from schemas.training import LoRAConfig
from stages.adapters import add_adapters
from stages.core import kernels
from stages.precision import compute_dtype, computing, use_precision
from stages.rollout import fused_context
from stages.rollout.attention import decode_attention
from stages.rollout.decoder_step import fits
from stages.rollout.decoding import Context
from stages.rollout.fused_context import FusedContext, computes_alike
from stages.rollout.fused_decoder import FusedDecoder, looks_fusable
from stages.rollout.native import NativeEngine
from stages.rollout.products import LinearMap, Product
from tests.stages.builds import BUILDS, in_use

SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


def made(config: object) -> PreTrainedModel:
    """A model whose biases and norms are drawn, too."""
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model


LIKE_LLAMA = {
    "grouped heads": LlamaConfig(**GROUPED, tie_word_embeddings=False),
    "a head of its own": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "biases everywhere": LlamaConfig(**GROUPED, attention_bias=True, mlp_bias=True),
    "wide heads": LlamaConfig(**GROUPED, head_dim=24, hidden_act="gelu"),
    "scaled rotation": LlamaConfig(
        **GROUPED,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "Mistral without a window": MistralConfig(**GROUPED, sliding_window=None),
    "Qwen2": Qwen2Config(**GROUPED),
    "Qwen3": Qwen3Config(**GROUPED, head_dim=16),
}


def adapted(
    target_modules: str | tuple[str, ...] = "all-linear",
    rank: int = 2,
    base: str = "biases everywhere",
) -> PreTrainedModel:
    model = made(LIKE_LLAMA[base])
    settings = LoRAConfig(rank=rank, alpha=3, target_modules=target_modules)
    add_adapters(model, settings, section="rl.online.lora", seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def can_fuse(model: PreTrainedModel) -> bool:
    return looks_fusable(model) and computes_alike(model)


PROMPTS = [[5, 6, 7], [4], [3, 9, 8, 4, 10, 11, 5]]
# Groups of unlike size, out of order, and then without all of prompt 2 and some of the others.
ROWS, KEPT = [2, 0, 0, 1, 0, 2, 1], [6, 1, 2, 3]
NUM_BEFORE, NUM_AFTER = 19, 21  # caches grow in each part


def drawn() -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(40, (NUM_BEFORE + NUM_AFTER, len(ROWS)), generator=generator)


def steps(context: Context | FusedContext, tokens: Tensor) -> list[Tensor]:
    """Logits after the prompts and after each token; the last rows are those of KEPT."""
    context.select(torch.tensor(ROWS))
    found = [context.logits]
    for number, row in enumerate(tokens):
        if number == NUM_BEFORE:
            context.select(torch.tensor(KEPT))
        context.advance(row[KEPT] if number >= NUM_BEFORE else row)
        found.append(context.logits)
    return found


def by_one_pass(model: PreTrainedModel, tokens: Tensor) -> list[list[Tensor]]:
    """Logits [_V] after each token of each row, from the last of the prompt on."""
    found = []
    for row, prompt in enumerate(ROWS):
        ids = torch.tensor([[*PROMPTS[prompt], *tokens[:, row].tolist()]])
        logits = model(input_ids=ids).logits[0].float()
        found.append(list(logits[len(PROMPTS[prompt]) - 1 :]))
    return found


@pytest.fixture(params=["torch", *BUILDS, "part by part"])
def any_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """By each build of the kernels, all layers in one call or part by part, and without any."""
    if request.param == "part by part":
        monkeypatch.setattr(fused_context, "fits", lambda decoder: False)
        yield
        return
    with in_use(request.param, monkeypatch):
        yield


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("name", LIKE_LLAMA)
def test_logits_are_those_of_one_pass(name: str) -> None:
    compare(made(LIKE_LLAMA[name]))


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("target_modules", ["all-linear", ("q_proj", "v_proj"), ("up_proj",)])
def test_adapters_have_their_say(target_modules: str | tuple[str, ...]) -> None:
    compare(adapted(target_modules))


@torch.inference_mode()
def compare(model: PreTrainedModel) -> None:
    assert can_fuse(model)
    tokens = drawn()
    decoder = FusedDecoder(model, torch.float32)
    found = steps(FusedContext(decoder, PROMPTS, len(tokens)), tokens)
    expected = by_one_pass(model, tokens)
    for number, logits in enumerate(found):
        rows = KEPT if number > NUM_BEFORE else range(len(ROWS))
        for own, row in zip(logits, rows, strict=True):
            size = expected[row][number].abs().max()
            assert (own - expected[row][number]).abs().max() < 1e-5 * size


DRAWN = {name: partial(made, LIKE_LLAMA[name]) for name in ("grouped heads", "Qwen2", "Qwen3")} | {
    "adapters": partial(adapted, base="Qwen3", rank=4)
}


@pytest.mark.usefixtures("any_way")
@pytest.mark.parametrize("name", DRAWN)
@torch.inference_mode()
def test_bfloat16_rounds_where_the_layers_of_transformers_do(name: str) -> None:
    """Errors against float32 are as large, on average over 40 tokens."""
    model = use_precision(DRAWN[name](), "bfloat16")
    tokens = drawn()
    decoder = FusedDecoder(model, compute_dtype(model))
    ours = steps(FusedContext(decoder, PROMPTS, len(tokens)), tokens)
    exact = by_one_pass(model, tokens)
    with decode_attention(model), computing(model):
        theirs = steps(Context(model, PROMPTS, len(tokens), 0), tokens)
    errors: dict[str, list[Tensor]] = {"ours": [], "theirs": [], "apart": []}
    for number, (own, plain) in enumerate(zip(ours, theirs, strict=True)):
        assert own.dtype == plain.dtype == torch.bfloat16
        rows = KEPT if number > NUM_BEFORE else range(len(ROWS))
        whole = torch.stack([exact[row][number] for row in rows])
        errors["ours"].append((own - whole).abs().mean())
        errors["theirs"].append((plain - whole).abs().mean())
        errors["apart"].append((own.float() - plain.float()).abs().mean())
    mean = {name: float(torch.stack(values).mean()) for name, values in errors.items()}
    assert mean["ours"] < 1.15 * mean["theirs"]
    assert mean["apart"] < 1.15 * mean["theirs"]
    assert mean["theirs"] < 0.02 * float(torch.cat(theirs).float().std())


ONE_CALL = {
    "grouped heads": True,
    "a head of its own": True,
    "biases everywhere": True,
    "wide heads": False,  # another activation
    "Qwen2": True,
    "Qwen3": True,  # norms of heads
}


@pytest.mark.parametrize("name", ONE_CALL)
@pytest.mark.skipif(not kernels.serve(torch.zeros(1)), reason="the kernels are not built here")
def test_one_call_is_for_what_it_knows(name: str) -> None:
    decoder = FusedDecoder(made(LIKE_LLAMA[name]), torch.float32)
    assert fits(decoder) is ONE_CALL[name]


@pytest.mark.skipif(
    not kernels.multiplies(torch.empty(2, 2, dtype=torch.bfloat16)), reason="no kernel for it here"
)
def test_one_call_is_for_adapters_whose_rank_the_kernel_multiplies() -> None:
    assert fits(FusedDecoder(adapted(rank=3), torch.float32))
    assert fits(FusedDecoder(adapted(rank=2), torch.bfloat16))
    assert not fits(FusedDecoder(adapted(rank=3), torch.bfloat16))  # pairs, and 3 is odd


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["grouped heads", "adapters"])
@torch.inference_mode()
def test_a_row_is_the_same_to_the_bit_in_any_company_and_by_any_number_of_threads(
    name: str, dtype: torch.dtype
) -> None:
    decoder = FusedDecoder(DRAWN[name](), dtype)
    if not fits(decoder):
        pytest.skip("this processor has no such kernel")
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        prompts = [PROMPTS[0]] * 300  # enough for two threads
        context = FusedContext(decoder, prompts, 3)
        torch.set_num_threads(1)
        alone = FusedContext(decoder, PROMPTS[:1], 3)
        for token in (7, 8, 9):
            torch.set_num_threads(2)
            context.advance(torch.full((300,), token))
            torch.set_num_threads(1)
            alone.advance(torch.tensor([token]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(context.logits, alone.logits.expand(300, -1))


def hooked() -> PreTrainedModel:
    model = made(LIKE_LLAMA["grouped heads"])
    model.base_model.layers[1].mlp.register_forward_hook(lambda module, args, output: 2 * output)
    return model


def silent() -> PreTrainedModel:
    model = adapted()
    model.base_model.layers[0].mlp.up_proj.enable_adapters(False)
    return model


def eager() -> PreTrainedModel:
    model = made(LIKE_LLAMA["grouped heads"])
    model.set_attn_implementation("eager")
    return model


def of_another_module() -> PreTrainedModel:
    model = made(LIKE_LLAMA["grouped heads"])
    model.base_model.layers[1].mlp.extra = nn.Linear(2, 2)
    return model


OTHERS = {
    "GPT-2": lambda: made(GPT2Config(vocab_size=40, n_embd=32, n_layer=2, n_head=4)),
    "GPT-NeoX": lambda: made(GPTNeoXConfig(**SIZES)),
    "a window": lambda: made(MistralConfig(**GROUPED, sliding_window=4)),
    "a rotation that depends on the length": lambda: made(
        LlamaConfig(
            **GROUPED, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
        )
    ),
    "weights in bfloat16": lambda: made(LIKE_LLAMA["grouped heads"]).bfloat16(),
    "a hook": hooked,
    "an adapter that is disabled": silent,
    "eager attention": eager,
    "one more module": of_another_module,
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_keep_the_modules_of_transformers(name: str) -> None:
    assert not can_fuse(OTHERS[name]())


@pytest.mark.parametrize(
    "factor",
    ["embedding_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling"],
)
def test_trying_finds_what_modules_do_not_show(factor: str) -> None:
    plain = {"attention_multiplier": 8**-0.5}
    assert can_fuse(made(GraniteConfig(**GROUPED, **plain)))
    model = made(GraniteConfig(**GROUPED, **(plain | {factor: 0.9})))
    assert looks_fusable(model)
    if factor == "attention_multiplier":  # which attention says itself
        assert can_fuse(model)
    else:
        assert not can_fuse(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 7, 100])
def test_a_product_is_those_of_its_parts(dtype: torch.dtype, num_rows: int) -> None:
    torch.manual_seed(0)
    states = torch.randn(num_rows, 16).to(dtype)
    weights = [torch.randn(size, 16) for size in (3, 5, 8)]
    biases = [None, torch.randn(5), None]
    maps = [LinearMap(*both, None) for both in zip(weights, biases, strict=True)]
    found = Product(maps, dtype)(states)
    expected = [
        functional.linear(states.float(), weight.to(dtype).float(), bias)
        for weight, bias in zip(weights, biases, strict=True)
    ]
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(found.float(), torch.cat(expected, 1), rtol=tolerance, atol=0.01)


def test_both_ways_draw_the_same_tokens() -> None:
    model = made(LIKE_LLAMA["grouped heads"])
    sampling = SamplingConfig(max_completion_tokens=30, temperature=0.8)
    found = []
    for fused in (True, False):
        sampler = NativeEngine(model, eos_token_ids=[2], pad_token_id=0, max_batch_size=11)
        sampler._computes_alike = fused
        found.append(sampler.generate(PROMPTS, sampling, num_samples=6, seed=3))
    assert {rollout.finish_reason for rollout in found[0]} == {"stop", "length"}
    for one, other in zip(*found, strict=True):
        assert one.completion_ids == other.completion_ids
        assert one.rollout_logprobs == pytest.approx(other.rollout_logprobs, abs=1e-5)


def test_weights_that_are_not_numbers_are_refused_as_ever() -> None:
    model = made(LIKE_LLAMA["grouped heads"])
    sampling = SamplingConfig(max_completion_tokens=3)
    sampler = NativeEngine(model, eos_token_ids=[2], pad_token_id=0, max_batch_size=8)
    sampler.generate(PROMPTS, sampling, num_samples=1, seed=0)
    assert sampler._computes_alike
    with torch.no_grad():
        model.base_model.layers[0].mlp.up_proj.weight.fill_(torch.nan)
    fresh = NativeEngine(model, eos_token_ids=[2], pad_token_id=0, max_batch_size=8)
    for one in (sampler, fresh):
        with pytest.raises(UserError, match="logits are not finite"):
            one.generate(PROMPTS, sampling, num_samples=1, seed=0)
