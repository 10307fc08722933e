"""One row without padding: what is laid where, who sees whom, and that no number shows it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from schemas.base import UserError
from stages import attention, attention_plan, packing
from stages.forward import Sequences, hidden_states
from stages.packing import micro_batches, pack

CPU = torch.device("cpu")


def test_a_shared_prompt_is_laid_down_once_and_its_branches_go_on_from_it() -> None:
    batch = pack([[7, 8, 9], [4], [7, 8, 9]], [[1, 2], [5, 6], [3]], device=CPU)
    # The prompt of rows 0 and 2, their completions, then row 1 in one piece.
    assert batch.input_ids.tolist() == [[7, 8, 9, 1, 2, 3, 4, 5, 6]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3, 0, 1, 2]]
    assert [batch.position(0, i) for i in range(5)] == [0, 1, 2, 3, 4]
    assert [batch.position(2, i) for i in range(4)] == [0, 1, 2, 5]
    assert [batch.position(1, i) for i in range(3)] == [6, 7, 8]
    trunks, branches = batch.layout.blocks
    assert trunks.tokens.tolist() == [[0, 1, 2], [6, 7, 8]] and trunks.padding is None
    assert branches.tokens.tolist() == [[3, 4], [5, 5]]
    assert branches.padding is not None and branches.padding.tolist() == [
        [False, False],
        [False, True],
    ]
    assert branches.prefix is not None and branches.prefix.tolist() == [[0, 1, 2]]
    # Trunk rows take places 0 to 5 of the outputs, branches 6 to 9.
    assert batch.layout.restore.tolist() == [0, 1, 2, 6, 7, 8, 3, 4, 5]
    assert batch.layout.longest == 5


def test_a_long_row_is_filled_up_with_tokens_that_are_nowhere() -> None:
    short = pack([[1]], [[2] * 254], device=CPU)
    assert short.input_ids.shape == (1, 255) and short.layout.num_filling == 0
    batch = pack([[7] * 3] * 2, [[8] * 150, [9] * 140], device=CPU)
    assert batch.input_ids.shape == batch.position_ids.shape == (1, 304)
    assert batch.layout.num_filling == 11
    assert batch.input_ids[0, 292:].tolist() == [9] + [7] * 11
    assert batch.position_ids[0, 292:].tolist() == [142] + [0] * 11
    assert batch.layout.restore.shape == (304,) and not batch.layout.restore[293:].any()
    for block in batch.layout.blocks:
        assert int(block.tokens.max()) < 293
    assert batch.layout.longest == 153


def test_micro_batches_stay_within_the_budget_and_lose_nothing() -> None:
    # Longest first: 9 alone (4 more would be 13); 4 + 4 + 2 = 10; 1.
    assert list(micro_batches([4, 9, 1, 4, 2], 10)) == [[1], [0, 3, 4], [2]]
    # Longer than the budget: a micro-batch of its own.
    assert list(micro_batches([20, 3], 10)) == [[0], [1]]


def test_micro_batches_count_a_shared_prompt_once_and_keep_its_rows_together() -> None:
    prompts = [[1] * 6, [2] * 6, [1] * 6, [2] * 6]
    # 6 + 2 + 2 = 10 tokens for each prompt, where counting the prompt twice would make 16.
    assert list(micro_batches([8, 8, 8, 8], 10, prompts)) == [[0, 2], [1, 3]]
    assert list(micro_batches([8, 8, 8, 8], 20, prompts)) == [[0, 2, 1, 3]]
    # Too many branches for the budget: the prompt is laid down twice.
    assert list(micro_batches([8, 8, 8], 10, [[1] * 6] * 3)) == [[0, 1], [2]]


def model_of(
    *, heads: int = 4, key_heads: int = 2, dtype: torch.dtype = torch.float64
) -> PreTrainedModel:
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=heads,
        num_key_value_heads=key_heads,
        max_position_embeddings=512,
        initializer_range=0.2,
    )
    model: PreTrainedModel = LlamaForCausalLM(config).to(dtype)
    return model


def drawn(seed: int) -> Sequences:
    """Groups of one to four completions, some of them empty, over prompts of many lengths."""
    random.seed(seed)
    prompts: list[list[int]] = []
    completions: list[list[int]] = []
    for _ in range(5):
        prompt = [random.randrange(31) for _ in range(random.choice([1, 3, 17, 90]))]
        for _ in range(random.randint(1, 4)):
            prompts.append(prompt)
            completions.append([random.randrange(31) for _ in range(random.choice([0, 1, 9, 75]))])
    order = list(range(len(prompts)))
    random.shuffle(order)
    return Sequences([prompts[i] for i in order], [completions[i] for i in order])


def one_by_one(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    """Hidden states of each sequence alone, by the model's own attention."""
    model.set_attn_implementation("eager")
    return [
        model.base_model(torch.tensor([[*p, *c]])).last_hidden_state[0]
        for p, c in zip(sequences.prompt_ids, sequences.completion_ids, strict=True)
    ]


def together(model: PreTrainedModel, sequences: Sequences) -> list[Tensor]:
    batch = sequences.pack(CPU)
    hidden = hidden_states(model, batch)
    return [
        hidden[[batch.position(row, index) for index in range(length)]]
        for row, length in enumerate(sequences.lengths())
    ]


def gradients(model: PreTrainedModel, states: Sequence[Tensor]) -> dict[str, Tensor]:
    """Gradient of a loss that weighs every state differently."""
    model.zero_grad()
    total = sum(
        (state * torch.linspace(-1, 2, state.numel()).view_as(state)).sum() for state in states
    )
    assert isinstance(total, Tensor)
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("fused", [False, True])
def test_a_packed_row_equals_single_sequences_in_values_and_gradients(
    seed: int, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Small tiles and chunks, so that every loop goes round more than once.
    monkeypatch.setattr(attention_plan, "_CHUNK", 16)
    monkeypatch.setattr(attention_plan, "_TILE", 5000)
    monkeypatch.setattr(packing, "_LONG_ROW", 1)  # filled up, all of them
    if fused:
        monkeypatch.setattr(attention, "exact_attention", attention.fused_attention)
    model = model_of(heads=4, key_heads=1 + seed % 2)
    sequences = drawn(seed)
    expected = one_by_one(model, sequences)
    expected_gradients = gradients(model, expected)
    observed = together(model, sequences)
    observed_gradients = gradients(model, observed)
    for left, right in zip(observed, expected, strict=True):
        # transformers normalises and rotates in float32, in other shapes: no more digits agree.
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)
    assert observed_gradients.keys() == expected_gradients.keys()
    for name, value in expected_gradients.items():
        scale = value.abs().max()
        assert (observed_gradients[name] - value).abs().max() / scale < 1e-5, name


def test_in_float32_the_difference_is_rounding() -> None:
    model = model_of(dtype=torch.float32)
    sequences = drawn(7)
    expected = gradients(model, one_by_one(model, sequences))
    observed = gradients(model, together(model, sequences))
    for name, value in expected.items():
        scale = value.abs().max()
        assert (observed[name] - value).abs().max() / scale < 1e-5, name


def test_a_branch_does_not_see_another() -> None:
    model = model_of()
    prompts = [[1, 2, 3]] * 2
    states = [
        together(model, Sequences(prompts, [[4, 5], other])) for other in ([6, 7], [8, 9, 10])
    ]
    torch.testing.assert_close(states[0][0], states[1][0], rtol=0, atol=1e-6)


def test_how_rows_are_bucketed_does_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of()
    found = []
    for share in (0.0, 0.5, 1.0):
        monkeypatch.setattr(packing, "_MIN_FILLED", share)
        found.append(torch.cat(together(model, drawn(3))))
    for left, right in itertools.pairwise(found):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-5)


def test_a_window_that_is_too_short_is_refused() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=31,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=4,
    )
    model = MistralForCausalLM(config)
    together(model, Sequences([[1, 2]], [[3, 4]]))  # as long as the window
    with pytest.raises(UserError, match="a window of 4 tokens, and a sequence has 5"):
        together(model, Sequences([[1, 2]], [[3, 4, 5]]))


def test_attention_dropout_is_refused() -> None:
    model = model_of()
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(UserError, match="attention_dropout must be 0"):
        together(model.train(), drawn(0))


def test_a_model_that_drops_options_is_refused() -> None:
    model = model_of()
    layer = model.base_model.layers[0]
    plain = layer.self_attn.forward
    for other in model.base_model.layers:
        other.self_attn.forward = lambda *args, layout=None, _call=plain, **kw: _call(*args, **kw)
    with pytest.raises(UserError, match="does not hand options on"):
        together(model, drawn(0))
