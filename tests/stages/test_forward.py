"""Packing, padding and micro-batches must not be seen in any number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages import forward
from stages.forward import Sequences, completion_logprobs, scores_at
from stages.models import load_with_head
from stages.packing import micro_batches, pack

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def sequences(tokenizer: PreTrainedTokenizerBase, pad: int | None = None) -> Sequences:
    prompts = ["4-1+7=", "12+3=", "1=", "9-9+1-1="]
    completions = ["4-1=3\n3+7=10\n#10", "12+3=15\n#15", "#1", ""]
    return Sequences(
        [tokenizer(text).input_ids for text in prompts],
        [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in completions],
        tokenizer.pad_token_id if pad is None else pad,
    )


def naive_logprobs(
    model: PreTrainedModel, prompt: list[int], completion: list[int], temperature: float
) -> list[float]:
    """One sequence at a time, the whole model, the whole vocabulary, in float64."""
    logits = model(torch.tensor([prompt + completion])).logits[0].double() / temperature
    table = logits.log_softmax(-1)
    first = len(prompt) - 1
    return [table[first + i, token].item() for i, token in enumerate(completion)]


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_completion_logprobs_equal_the_whole_forward(
    tiny: Tiny, temperature: float, pad_is_eos: bool
) -> None:
    model, tokenizer = tiny
    batch = sequences(tokenizer, tokenizer.eos_token_id if pad_is_eos else None)
    width = max(len(ids) for ids in batch.completion_ids) + 3
    logprobs, _ = completion_logprobs(model, batch, width, temperature)
    for row, (prompt, completion) in enumerate(
        zip(batch.prompt_ids, batch.completion_ids, strict=True)
    ):
        expected = naive_logprobs(model, list(prompt), list(completion), temperature)
        assert logprobs[row, : len(completion)].tolist() == pytest.approx(expected, abs=2e-5)
        assert (logprobs[row, len(completion) :] == 0).all()


def test_packed_rows_equal_single_rows_in_values_and_gradients(tiny: Tiny) -> None:
    model, tokenizer = tiny
    ids = [
        [*p, *c]
        for p, c in zip(
            sequences(tokenizer).prompt_ids, sequences(tokenizer).completion_ids, strict=True
        )
    ]
    results = []
    for row_length in (None, 40, 200):
        model.zero_grad()
        batch = pack(ids, pad_token_id=0, device=model.device, row_length=row_length)
        hidden = forward.hidden_states(model, batch)
        firsts = torch.tensor([s + len(x) - 1 for s, x in zip(batch.starts, ids, strict=True)])
        last = hidden[firsts]
        last.square().sum().backward()
        grad = model.base_model.layers[0].self_attn.q_proj.weight.grad
        results.append((last.detach().clone(), grad.clone()))
    for last, grad in results[1:]:
        torch.testing.assert_close(last, results[0][0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(grad, results[0][1], rtol=1e-3, atol=1e-4)
    model.zero_grad()


def test_packing_fills_rows_first_fit_decreasing() -> None:
    # Lengths 5, 3, 2, 4 into rows of 7: 5+2 and 4+3.
    batch = pack(
        [[1] * 5, [2] * 3, [3] * 2, [4] * 4],
        pad_token_id=0,
        device=torch.device("cpu"),
        row_length=7,
    )
    assert batch.input_ids.tolist() == [[1, 1, 1, 1, 1, 3, 3], [4, 4, 4, 4, 2, 2, 2]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 0, 1], [0, 1, 2, 3, 0, 1, 2]]
    assert batch.segment_ids.tolist() == [[1, 1, 1, 1, 1, 2, 2], [1, 1, 1, 1, 2, 2, 2]]
    assert batch.starts == [0, 11, 5, 7]
    mask = batch.attention_mask()
    assert mask is not None
    # The second sequence of row 0 sees itself and nothing before it.
    assert mask[0, 0, 5].tolist() == [False] * 5 + [True, False]
    assert mask[0, 0, 6].tolist() == [False] * 5 + [True, True]


def test_micro_batches_stay_within_the_budget_and_lose_nothing() -> None:
    # Longest first: 9 alone fills 10; 4 and 4 take 8; 2, 1 take 4.
    assert list(micro_batches([4, 9, 1, 4, 2], 10)) == [[1], [0, 3], [4, 2]]
    # Longer than the budget: a micro-batch of its own.
    assert list(micro_batches([20, 3], 10)) == [[0], [1]]


def test_scores_do_not_depend_on_the_batch(tiny: Tiny, tiny_folder: Path) -> None:
    _, tokenizer = tiny
    model = load_with_head(tiny_folder, "outcome", seed=3).eval()
    batch = sequences(tokenizer)
    together = scores_at(model, batch, [[n - 1] for n in batch.lengths()])
    for row in range(len(batch)):
        alone = batch.select([row])
        score = scores_at(model, alone, [[alone.lengths()[0] - 1]])
        torch.testing.assert_close(score[0], together[row], rtol=1e-4, atol=1e-5)


def test_pooling_ignores_the_pad_id(tiny: Tiny, tiny_folder: Path) -> None:
    """The model's own forward looks for the pad id; ours must not, even where pad = EOS."""
    _, tokenizer = tiny
    model = load_with_head(tiny_folder, "outcome", seed=3).eval()
    scores = [
        scores_at(model, batch, [[n - 1] for n in batch.lengths()])
        for batch in (sequences(tokenizer), sequences(tokenizer, tokenizer.eos_token_id))
    ]
    torch.testing.assert_close(scores[0], scores[1])


def test_a_fresh_critic_says_nothing(tiny: Tiny, tiny_folder: Path) -> None:
    _, tokenizer = tiny
    critic = load_with_head(tiny_folder, "value", seed=0).eval()
    values = forward.completion_values(critic, sequences(tokenizer), 24)
    assert (values == 0).all()


def test_values_of_states_come_from_one_pass(tiny: Tiny, tiny_folder: Path) -> None:
    _, tokenizer = tiny
    critic = load_with_head(tiny_folder, "value", seed=0).eval()
    torch.nn.init.normal_(forward.head_of(critic).weight)
    batch = sequences(tokenizer)
    width = max(len(ids) for ids in batch.completion_ids) + 2
    values, after = forward.all_completion_values(critic, batch, width, max_tokens=40)
    expected = forward.completion_values(critic, batch, width)
    torch.testing.assert_close(values, expected, rtol=1e-4, atol=1e-5)
    last = scores_at(critic, batch, [[n - 1] for n in batch.lengths()])[:, 0]
    torch.testing.assert_close(after, last, rtol=1e-4, atol=1e-5)
