from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerBase

from schemas.base import UserError
from stages.character_tokenizer import build_character_tokenizer
from stages.tokenization import (
    StepFinder,
    completion_text,
    encode_messages,
    encode_pair,
    encode_prompt,
    labelled_step_ends,
)
from tests.stages.conftest import CHAT_TEMPLATE, tiny_config


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    built = tiny_config().built
    assert built is not None
    return build_character_tokenizer(built)


@pytest.fixture(scope="module")
def chat() -> PreTrainedTokenizerBase:
    built = tiny_config(chat_template=CHAT_TEMPLATE).built
    assert built is not None
    return build_character_tokenizer(built)


def text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return tokenizer.decode(ids).replace("<end>", "$")


def test_plain_pair(tokenizer: PreTrainedTokenizerBase) -> None:
    prompt, completion = encode_pair(tokenizer, "1+2=", "#3")
    assert (text(tokenizer, prompt), text(tokenizer, completion)) == ("1+2=", "#3$")
    assert completion_text(tokenizer, completion) == "#3"


def test_conversation_goes_through_the_template(chat: PreTrainedTokenizerBase) -> None:
    user = [{"role": "user", "content": "1+2="}]
    assert text(chat, encode_prompt(chat, user)) == "+1+2=-"
    prompt, completion = encode_pair(chat, user, [{"role": "assistant", "content": "#3"}])
    assert (text(chat, prompt), text(chat, completion)) == ("+1+2=-", "#3$")


def test_only_assistant_turns_are_trained_on(chat: PreTrainedTokenizerBase) -> None:
    ids, trainable = encode_messages(
        chat,
        [
            {"role": "user", "content": "1"},
            {"role": "assistant", "content": "2"},
            {"role": "user", "content": "3"},
            {"role": "assistant", "content": "45"},
        ],
    )
    assert text(chat, ids) == "+1-2$+3-45$"
    assert "".join("x" if t else "." for t in trainable) == "...xx...xxx"


def test_conversation_without_template_is_refused(tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UserError, match="no chat template"):
        encode_prompt(tokenizer, [{"role": "user", "content": "1"}])


@pytest.mark.parametrize(
    ("completion", "ends"),
    [
        ("4-1=3\n3+7=10\n#10$", [5, 12, 15]),  # separators at 5 and 12; last text token at 15
        ("4-1=3\n3+7=10\n#10", [5, 12, 15]),  # cut: no end token
        ("#10$", [2]),
        ("$", []),
        ("", []),
        ("\n#1$", [2]),  # a leading blank line is no step
        ("1\n\n2$", [2, 3]),  # a blank line belongs to the step before it
        ("1\n$", [1]),  # separator at the very end
    ],
)
def test_step_ends(tokenizer: PreTrainedTokenizerBase, completion: str, ends: list[int]) -> None:
    ids = [
        tokenizer.eos_token_id if character == "$" else tokenizer(character).input_ids[0]
        for character in completion
    ]
    assert StepFinder(tokenizer, "\n")(ids) == ends


def test_labelled_steps_end_where_sampled_ones_do(tokenizer: PreTrainedTokenizerBase) -> None:
    steps = ["4-1=3", "3+7=10", "#10"]
    prompt, completion, ends = labelled_step_ends(tokenizer, "4-1+7=", steps, "\n")
    assert text(tokenizer, prompt + completion) == "4-1+7=4-1=3\n3+7=10\n#10$"
    assert ends == StepFinder(tokenizer, "\n")(completion) == [5, 12, 15]


def test_a_separator_inside_a_step_does_not_split_it(tokenizer: PreTrainedTokenizerBase) -> None:
    _, _, ends = labelled_step_ends(tokenizer, "1=", ["1\n2", "3"], "\n")
    assert ends == [3, 4]
