"""The native engine against loops that are too simple to be wrong."""

import copy
import itertools
import math
from collections import Counter
from typing import Any

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer, decoders, models
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from schemas.base import UserError
from schemas.rl import SamplingConfig
from schemas.training import LoRAConfig
from stages.adapters import add_adapters
from stages.precision import use_precision
from stages.rollout.native import NativeEngine
from stages.rollout.stop_strings import StopStrings
from tests.stages.rollout.tiny import letters

EOS = 2
PROMPTS = [[5, 6, 7], [4], [3, 9, 8, 4, 10, 11, 5], [6, 6], [12, 3, 4, 5]]


def llama(**changes: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings: dict[str, object] = {
        "vocab_size": 16,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=16, n_embd=32, n_layer=2, n_head=4, n_positions=64, initializer_range=0.3
        )
    )


def mistral() -> MistralForCausalLM:
    """A model whose layers look back four tokens only."""
    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=16,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            sliding_window=4,
            initializer_range=0.3,
        )
    )


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return llama()


def engine(model: PreTrainedModel, *, max_batch_size: int = 64, eos: int = EOS) -> NativeEngine:
    return NativeEngine(model, eos_token_ids=[eos], pad_token_id=EOS, max_batch_size=max_batch_size)


def logits_of(model: PreTrainedModel, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor([ids])).logits[0].double()


def greedy(model: PreTrainedModel, prompt: list[int], limit: int) -> list[int]:
    completion: list[int] = []
    while len(completion) < limit and completion[-1:] != [EOS]:
        completion.append(int(logits_of(model, prompt + completion)[-1].argmax()))
    return completion


def eager() -> LlamaForCausalLM:
    """A model that does not use torch's attention keeps its own."""
    return llama(attn_implementation="eager")


@pytest.mark.parametrize("make", [llama, gpt2, mistral, eager])
def test_greedy_is_the_argmax_without_a_cache(make) -> None:
    model = make()
    sampling = SamplingConfig(temperature=0, max_completion_tokens=12)
    rollouts = engine(model).generate(PROMPTS, sampling, num_samples=1, seed=0)
    assert [r.prompt_ids for r in rollouts] == PROMPTS
    for prompt, rollout in zip(PROMPTS, rollouts, strict=True):
        assert rollout.completion_ids == greedy(model, prompt, 12)


@pytest.mark.parametrize("make", [llama, gpt2, mistral])
@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, 0), (0.7, 1.0, 0), (0.7, 0.8, 5), (0.0, 1.0, 0)]
)
def test_logprobs_are_those_of_a_full_forward(make, temperature, top_p, top_k) -> None:
    model = make()
    sampling = SamplingConfig(
        temperature=temperature, top_p=top_p, top_k=top_k, max_completion_tokens=12
    )
    for rollout in engine(model).generate(PROMPTS, sampling, num_samples=3, seed=1):
        logits = logits_of(model, rollout.prompt_ids + rollout.completion_ids)
        logits = logits[len(rollout.prompt_ids) - 1 : -1] / (temperature or 1.0)
        expected = logits.log_softmax(-1).gather(1, torch.tensor(rollout.completion_ids)[:, None])
        assert rollout.rollout_logprobs == pytest.approx(expected.squeeze(1).tolist(), abs=1e-5)


def test_order_groups_and_versions(model: LlamaForCausalLM) -> None:
    sampling = SamplingConfig(max_completion_tokens=5)
    sampler = engine(model)
    before = sampler.generate(PROMPTS, sampling, num_samples=3, seed=1)
    assert [r.prompt_index for r in before] == [i for i in range(len(PROMPTS)) for _ in range(3)]
    assert {r.policy_version for r in before} == {0}
    sampler.update_weights(model, 7)
    after = sampler.generate(PROMPTS, sampling, num_samples=3, seed=1)
    assert {r.policy_version for r in after} == {7}
    assert [r.completion_ids for r in after] == [r.completion_ids for r in before]
    assert len({tuple(r.completion_ids) for r in before[:3]}) > 1


def test_same_seed_is_bitwise_the_same_and_another_is_not(model: LlamaForCausalLM) -> None:
    sampling = SamplingConfig(max_completion_tokens=20)
    first, again, other = (
        engine(model).generate(PROMPTS, sampling, num_samples=8, seed=seed) for seed in (3, 3, 4)
    )
    assert first == again
    assert [r.completion_ids for r in first] != [r.completion_ids for r in other]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_completion_does_not_depend_on_its_batch(model: LlamaForCausalLM, top_p: float) -> None:
    sampling = SamplingConfig(max_completion_tokens=20, top_p=top_p)
    whole = engine(model).generate(PROMPTS, sampling, num_samples=6, seed=3)
    # 7 cuts through groups; the first two prompts alone are never padded to the longest one.
    chunked = engine(model, max_batch_size=7).generate(PROMPTS, sampling, num_samples=6, seed=3)
    fewer = engine(model).generate(PROMPTS[:2], sampling, num_samples=6, seed=3)
    single = engine(model, max_batch_size=1).generate(PROMPTS, sampling, num_samples=6, seed=3)
    for others in (chunked, fewer, single):
        for rollout, expected in zip(others, whole, strict=False):
            assert rollout.completion_ids == expected.completion_ids
            assert rollout.rollout_logprobs == pytest.approx(expected.rollout_logprobs, abs=1e-5)


def test_first_samples_do_not_depend_on_how_many_are_drawn(model: LlamaForCausalLM) -> None:
    sampling = SamplingConfig(max_completion_tokens=20)
    two, five = (
        engine(model).generate(PROMPTS[:1], sampling, num_samples=num, seed=3) for num in (2, 5)
    )
    assert [r.completion_ids for r in two] == [r.completion_ids for r in five[:2]]


def test_sampled_sequences_follow_the_exact_distribution() -> None:
    model = llama(vocab_size=5, initializer_range=0.2)
    prompt, limit, temperature, num_samples = [3, 4], 3, 0.8, 20_000
    expected: dict[tuple[int, ...], float] = {}
    for completion in itertools.chain.from_iterable(
        itertools.product(range(5), repeat=length) for length in range(1, limit + 1)
    ):
        ended = completion[-1] == EOS
        if EOS in completion[:-1] or (len(completion) < limit and not ended):
            continue
        logits = logits_of(model, prompt + list(completion))[len(prompt) - 1 : -1] / temperature
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])
        expected[completion] = math.exp(chosen.sum().item())
    total = sum(expected.values())  # of float32 logits, one prefix at a time
    assert total == pytest.approx(1.0)
    sampling = SamplingConfig(temperature=temperature, max_completion_tokens=limit)
    rollouts = engine(model, max_batch_size=4096).generate(
        [prompt], sampling, num_samples=num_samples, seed=11
    )
    counts = Counter(tuple(r.completion_ids) for r in rollouts)
    assert set(counts) <= set(expected)
    result = stats.chisquare(
        [counts[c] for c in expected], [p / total * num_samples for p in expected.values()]
    )
    assert result.pvalue > 0.01


@pytest.mark.parametrize("pad", [EOS, 0])
def test_end_token_closes_and_limit_cuts(model: LlamaForCausalLM, pad: int) -> None:
    sampler = NativeEngine(model, eos_token_ids=[EOS], pad_token_id=pad, max_batch_size=64)
    sampling = SamplingConfig(temperature=1.5, max_completion_tokens=8)
    rollouts = sampler.generate(PROMPTS, sampling, num_samples=20, seed=0)
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    for rollout in rollouts:
        ids = rollout.completion_ids
        assert len(ids) == len(rollout.rollout_logprobs)
        assert EOS not in ids[:-1]
        assert (ids[-1] == EOS) == (rollout.finish_reason == "stop")
        assert rollout.truncated == (rollout.finish_reason == "length")
        assert len(ids) == 8 or not rollout.truncated


def test_pad_id_does_not_matter_even_as_a_prompt_token(model: LlamaForCausalLM) -> None:
    sampling = SamplingConfig(max_completion_tokens=8)
    prompts = [[EOS, 5, EOS], [EOS], [4, 5, 6, 7, EOS]]
    found = [
        NativeEngine(model, eos_token_ids=[EOS], pad_token_id=pad, max_batch_size=64).generate(
            prompts, sampling, num_samples=4, seed=5
        )
        for pad in (EOS, 0, 9)
    ]
    assert found[0] == found[1] == found[2]


def test_immediate_end_token_is_a_completion_of_one_token(model: LlamaForCausalLM) -> None:
    first = greedy(model, PROMPTS[0], 1)[0]
    sampling = SamplingConfig(temperature=0, max_completion_tokens=8)
    sampler = engine(model, eos=first)
    (rollout,) = sampler.generate(PROMPTS[:1], sampling, num_samples=1, seed=0)
    assert rollout.completion_ids == [first]
    assert rollout.finish_reason == "stop"
    assert len(rollout.rollout_logprobs) == 1


def test_limit_of_one_token_and_any_of_several_end_tokens(model: LlamaForCausalLM) -> None:
    sampler = NativeEngine(model, eos_token_ids=[EOS, 5, 9], pad_token_id=EOS, max_batch_size=64)
    one = SamplingConfig(max_completion_tokens=1)
    assert all(
        len(r.completion_ids) == 1 and r.truncated == (r.completion_ids[0] not in (EOS, 5, 9))
        for r in sampler.generate(PROMPTS, one, num_samples=10, seed=0)
    )
    many = SamplingConfig(max_completion_tokens=30)
    ends = {
        r.completion_ids[-1]
        for r in sampler.generate(PROMPTS, many, num_samples=10, seed=0)
        if not r.truncated
    }
    assert ends <= {EOS, 5, 9}
    assert len(ends) > 1


def cut(tokenizer: PreTrainedTokenizerFast, ids: list[int], stop: tuple[str, ...]) -> list[int]:
    """The shortest beginning whose text has a stop string in it, or all."""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end], skip_special_tokens=True)
        if any(one in text for one in stop):
            return ids[:end]
    return ids


def test_the_tokenizer_of_these_tests_says_letters() -> None:
    assert letters(16).decode([3, 1, 4, 15, 2], skip_special_tokens=True) == "abm"


@pytest.mark.parametrize("stop", [("h",), ("ab", "m"), ("cd", "dcb", "kk")])
@pytest.mark.parametrize("max_batch_size", [64, 3])
def test_stop_strings_cut_where_the_text_has_them(
    model: LlamaForCausalLM, stop: tuple[str, ...], max_batch_size: int
) -> None:
    tokenizer = letters(16)
    sampler = NativeEngine(
        model,
        eos_token_ids=[EOS],
        pad_token_id=EOS,
        max_batch_size=max_batch_size,
        tokenizer=tokenizer,
    )
    free = SamplingConfig(temperature=1.5, max_completion_tokens=30)
    whole = sampler.generate(PROMPTS, free, num_samples=8, seed=2)
    stopping = free.model_copy(update={"stop": stop})
    found = sampler.generate(PROMPTS, stopping, num_samples=8, seed=2)
    num_cut = 0
    for rollout, uncut in zip(found, whole, strict=True):
        expected = cut(tokenizer, uncut.completion_ids, stop)
        assert rollout.completion_ids == expected
        text = tokenizer.decode(expected, skip_special_tokens=True)
        stopped = expected[-1] == EOS or any(one in text for one in stop)
        assert rollout.finish_reason == ("stop" if stopped else "length")
        assert rollout.rollout_logprobs == pytest.approx(
            uncut.rollout_logprobs[: len(expected)], abs=1e-5
        )
        num_cut += len(expected) < len(uncut.completion_ids)
    assert num_cut > 3


def test_a_stop_string_that_begins_in_the_prompt_does_not_count() -> None:
    strings = StopStrings(letters(16), ["aaa"], [[3, 3], [5]])
    assert [strings.ends(0, 3) for _ in range(4)] == [False, False, True, True]
    # Rows are apart, and a special token is no text.
    assert [strings.ends(1, token) for token in (3, 1, 3, 4, 3, 3)] == [False] * 6
    assert strings.ends(1, 3)


def test_characters_of_several_tokens_are_seen_when_they_are_whole() -> None:
    vocabulary = {f"<0x{byte:02X}>": byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    strings = StopStrings(fast, ["né"], [list(b"x"), list(b"x")])
    assert [strings.ends(0, byte) for byte in "née".encode()] == [False, False, True, False]
    assert [strings.ends(1, byte) for byte in "nn\u00e8n\u00e9".encode()][-1]


def test_stop_strings_need_a_fast_tokenizer() -> None:
    class Slow(PreTrainedTokenizerBase):
        pass

    with pytest.raises(UserError, match=r"Slow is none: use sampling\.stop_token_ids"):
        StopStrings(Slow(), ["x"], [[1]])


def test_stop_tokens_end_a_completion_and_are_kept(model: LlamaForCausalLM) -> None:
    sampling = SamplingConfig(temperature=1.5, max_completion_tokens=30, stop_token_ids=(5, 9))
    rollouts = engine(model).generate(PROMPTS, sampling, num_samples=20, seed=0)
    ends = {r.completion_ids[-1] for r in rollouts if not r.truncated}
    assert ends == {EOS, 5, 9}
    for rollout in rollouts:
        assert not {EOS, 5, 9} & set(rollout.completion_ids[:-1])
        assert rollout.truncated == (rollout.completion_ids[-1] not in {EOS, 5, 9})


def test_sequences_under_min_p_follow_their_exact_distribution() -> None:
    model = llama(vocab_size=5, initializer_range=0.2)
    prompt, limit, min_p, num_samples = [3, 4], 3, 0.2, 20_000
    expected: dict[tuple[int, ...], tuple[float, float]] = {}

    def grow(done: tuple[int, ...], chance: float, logprob: float) -> None:
        if done and (done[-1] == EOS or len(done) == limit):
            expected[done] = (chance, logprob)
            return
        p = logits_of(model, prompt + list(done))[-1].softmax(-1)
        kept = torch.where(p >= min_p * p.max(), p, 0.0)
        for token in kept.nonzero().squeeze(1).tolist():
            share = (kept[token] / kept.sum()).item()
            grow((*done, token), chance * share, logprob + p[token].log().item())

    grow((), 1.0, 0.0)
    assert len(expected) > 5
    sampling = SamplingConfig(min_p=min_p, max_completion_tokens=limit)
    rollouts = engine(model, max_batch_size=4096).generate(
        [prompt], sampling, num_samples=num_samples, seed=11
    )
    counts = Counter(tuple(r.completion_ids) for r in rollouts)
    assert set(counts) <= set(expected)
    result = stats.chisquare(
        [counts[c] for c in expected], [p * num_samples for p, _ in expected.values()]
    )
    assert result.pvalue > 0.01
    for rollout in rollouts[:200]:
        _, logprob = expected[tuple(rollout.completion_ids)]
        assert sum(rollout.rollout_logprobs) == pytest.approx(logprob, abs=1e-4)


def test_a_copy_stays_as_it_is_until_it_is_renewed() -> None:
    model = llama()
    sampling = SamplingConfig(max_completion_tokens=10)
    sampler = NativeEngine(
        model, eos_token_ids=[EOS], pad_token_id=EOS, max_batch_size=64, own_copy=True
    )
    before = sampler.generate(PROMPTS, sampling, num_samples=4, seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert sampler.generate(PROMPTS, sampling, num_samples=4, seed=1) == before
    sampler.update_weights(model, 1)
    after = sampler.generate(PROMPTS, sampling, num_samples=4, seed=1)
    fresh = engine(model).generate(PROMPTS, sampling, num_samples=4, seed=1)
    assert [r.completion_ids for r in after] == [r.completion_ids for r in fresh]
    assert [r.completion_ids for r in after] != [r.completion_ids for r in before]
    assert {r.policy_version for r in after} == {1}
    assert all(parameter.requires_grad for parameter in model.parameters())


def adapted(model: LlamaForCausalLM) -> LlamaForCausalLM:
    add_adapters(model, LoRAConfig(rank=2), section="rl.online.lora", seed=0)
    stir(model)
    return model


def stir(model: LlamaForCausalLM) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.2 * torch.randn_like(parameter))


@pytest.mark.parametrize("own_copy", [False, True])
def test_adapters_have_their_say_and_stay_as_they_are(own_copy: bool) -> None:
    model = adapted(llama())
    sampling = SamplingConfig(max_completion_tokens=10, temperature=0.7)
    sampler = NativeEngine(
        model, eos_token_ids=[EOS], pad_token_id=EOS, max_batch_size=64, own_copy=own_copy
    )
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    for version in (0, 1):
        sampler.update_weights(model, version)
        exact = copy.deepcopy(model).double()
        for rollout in sampler.generate(PROMPTS, sampling, num_samples=3, seed=version):
            logits = logits_of(exact, rollout.prompt_ids + rollout.completion_ids) / 0.7
            expected = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
            chosen = expected.gather(1, torch.tensor(rollout.completion_ids)[:, None]).squeeze(1)
            assert rollout.rollout_logprobs == pytest.approx(chosen.tolist(), abs=1e-4)
        stir(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == trainable
    assert any(trainable.values()) and not all(trainable.values())


def test_a_copy_below_adapters_is_one_of_the_adapters_alone() -> None:
    model = adapted(llama())
    sampler = NativeEngine(
        model, eos_token_ids=[EOS], pad_token_id=EOS, max_batch_size=64, own_copy=True
    )
    own = dict(sampler._model.named_parameters())
    for name, parameter in model.named_parameters():
        assert own[name] is not parameter
        assert (own[name].data_ptr() == parameter.data_ptr()) == ("lora_" not in name), name


class Casts(TorchDispatchMode):
    """Counts how often a tensor is turned into bfloat16."""

    def __init__(self, watched: torch.Tensor) -> None:
        super().__init__()
        self.watched = watched.data_ptr()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        found = func(*args, **(kwargs or {}))
        if args and isinstance(args[0], torch.Tensor) and args[0].data_ptr() == self.watched:
            self.count += isinstance(found, torch.Tensor) and found.dtype == torch.bfloat16
        return found


@pytest.mark.parametrize("adapters", [False, True])
@pytest.mark.parametrize("own_copy", [False, True])
def test_a_weight_is_turned_into_bfloat16_once(adapters: bool, own_copy: bool) -> None:
    model = use_precision(adapted(llama()) if adapters else llama(), "bfloat16")
    sampler = NativeEngine(
        model, eos_token_ids=[], pad_token_id=EOS, max_batch_size=64, own_copy=own_copy
    )
    trainable = [p.requires_grad for p in model.parameters()]
    layer: Any = sampler._model.model.layers[0].mlp.up_proj
    with Casts(layer.base_layer.weight if adapters else layer.weight) as casts:
        sampler.generate(PROMPTS, SamplingConfig(max_completion_tokens=8), num_samples=2, seed=0)
    assert casts.count == 1
    assert [p.requires_grad for p in model.parameters()] == trainable
    # Training goes on: nothing of the sampling is left in its graph or its weights.
    model.train()(input_ids=torch.tensor([PROMPTS[2]])).logits.sum().backward()
    assert [p.grad is not None for p in model.parameters()] == trainable


def test_training_mode_comes_back_and_dropout_is_off() -> None:
    model = llama(attention_dropout=0.5)
    sampling = SamplingConfig(temperature=0, max_completion_tokens=6)
    expected = greedy(model, PROMPTS[0], 6)
    model.train()
    (rollout,) = engine(model).generate(PROMPTS[:1], sampling, num_samples=1, seed=0)
    assert rollout.completion_ids == expected
    assert model.training
    assert model.config._attn_implementation == "sdpa"
    # The module stays usable for training after sampling from it.
    loss = model(input_ids=torch.tensor([PROMPTS[2]]), labels=torch.tensor([PROMPTS[2]])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_training_mode_comes_back_after_an_error() -> None:
    model = llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(math.nan)
    model.train()
    with pytest.raises(UserError, match="diverged"):
        engine(model).generate(
            PROMPTS, SamplingConfig(max_completion_tokens=4), num_samples=2, seed=0
        )
    assert model.training


def test_bfloat16_logprobs_are_near_those_of_a_full_forward() -> None:
    model = llama(initializer_range=0.1).to(torch.bfloat16)
    sampling = SamplingConfig(max_completion_tokens=12)
    for rollout in engine(model).generate(PROMPTS, sampling, num_samples=3, seed=1):
        logits = logits_of(model, rollout.prompt_ids + rollout.completion_ids)
        expected = logits[len(rollout.prompt_ids) - 1 : -1].log_softmax(-1)
        chosen = expected.gather(1, torch.tensor(rollout.completion_ids)[:, None]).squeeze(1)
        assert rollout.rollout_logprobs == pytest.approx(chosen.tolist(), abs=0.05)


def test_nothing_to_sample_gives_nothing(model: LlamaForCausalLM) -> None:
    sampling = SamplingConfig(max_completion_tokens=4)
    assert engine(model).generate([], sampling, num_samples=4, seed=0) == []


def test_prompts_that_cannot_be_sampled_are_named(model: LlamaForCausalLM) -> None:
    sampling = SamplingConfig(max_completion_tokens=60)
    with pytest.raises(UserError, match=r"prompt 1 has 5 tokens.*context of 64.*max_completion"):
        engine(model).generate([[3] * 4, [3] * 5], sampling, num_samples=1, seed=0)
    with pytest.raises(UserError, match="prompt 0 has no tokens"):
        engine(model).generate([[]], sampling, num_samples=1, seed=0)


def test_other_weights_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(AssertionError, match="the module it was made with"):
        engine(model).update_weights(llama(), 1)
