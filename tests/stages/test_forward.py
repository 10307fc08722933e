"""Packing, padding and micro-batches must not be seen in any number."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stages import forward
from stages.forward import Sequences, completion_logprobs, scores_at
from stages.models import load_with_head

Tiny = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def sequences(tokenizer: PreTrainedTokenizerBase) -> Sequences:
    prompts = ["4-1+7=", "12+3=", "1=", "9-9+1-1="]
    completions = ["4-1=3\n3+7=10\n#10", "12+3=15\n#15", "#1", ""]
    return Sequences(
        [tokenizer(text).input_ids for text in prompts],
        [[*tokenizer(text).input_ids, tokenizer.eos_token_id] for text in completions],
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
def test_completion_logprobs_equal_the_whole_forward(tiny: Tiny, temperature: float) -> None:
    model, tokenizer = tiny
    batch = sequences(tokenizer)
    width = max(len(ids) for ids in batch.completion_ids) + 3
    logprobs, _ = completion_logprobs(model, batch, width, temperature)
    for row, (prompt, completion) in enumerate(
        zip(batch.prompt_ids, batch.completion_ids, strict=True)
    ):
        expected = naive_logprobs(model, list(prompt), list(completion), temperature)
        assert logprobs[row, : len(completion)].tolist() == pytest.approx(expected, abs=2e-5)
        assert (logprobs[row, len(completion) :] == 0).all()


def test_scores_do_not_depend_on_the_batch(tiny: Tiny, tiny_folder: Path) -> None:
    _, tokenizer = tiny
    model = load_with_head(tiny_folder, "outcome", seed=3).eval()
    batch = sequences(tokenizer)
    together = scores_at(model, batch, [[n - 1] for n in batch.lengths()])
    for row in range(len(batch)):
        alone = batch.select([row])
        score = scores_at(model, alone, [[alone.lengths()[0] - 1]])
        torch.testing.assert_close(score[0], together[row], rtol=1e-4, atol=1e-5)


def test_pooling_reads_the_last_token_whatever_its_id(tiny: Tiny, tiny_folder: Path) -> None:
    """The model's own forward looks for the pad id; ours must not, even where pad = EOS."""
    _, tokenizer = tiny
    model = load_with_head(tiny_folder, "outcome", seed=3).eval()
    pad: int = tokenizer.pad_token_id
    ids: list[int] = tokenizer("12+3=15").input_ids
    ends_in_pad = Sequences([ids], [[pad, pad]])
    observed = scores_at(model, ends_in_pad, [[len(ids), len(ids) + 1]])[:, 0]
    hidden = model.base_model(torch.tensor([[*ids, pad, pad]])).last_hidden_state[0]
    torch.testing.assert_close(observed, forward.head_of(model)(hidden[-2:])[:, 0])
    assert observed[0] != observed[1]


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
