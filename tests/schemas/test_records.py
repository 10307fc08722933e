"""Record layouts and prompt digests."""

from __future__ import annotations

import hashlib
import unicodedata
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from schemas.records import (
    LAYOUT_FIELDS,
    RECORD_TYPES,
    Message,
    MessagesRecord,
    PreferenceRecord,
    PromptCompletionRecord,
    StepsRecord,
    VerifiableRecord,
    digest_position,
    dump_record,
    prompt_digest,
    record_prompt,
)

USER = {"role": "user", "content": "What is 1+1?"}
SYSTEM = {"role": "system", "content": "Be brief."}
TWO = {"role": "assistant", "content": "2"}
THREE = {"role": "assistant", "content": "3"}
TOOL = {"role": "tool", "content": "1+1=2"}


def _fault(model: type, fields: dict[str, Any]) -> str:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(fields)  # type: ignore[attr-defined]
    return str(caught.value)


def test_every_layout_has_its_model_and_fields() -> None:
    assert RECORD_TYPES.keys() == LAYOUT_FIELDS.keys()
    for layout, fields in LAYOUT_FIELDS.items():
        required = {n for n, f in RECORD_TYPES[layout].model_fields.items() if f.is_required()}
        assert required == set(fields)


@pytest.mark.parametrize(
    ("layout", "fields"),
    [
        ("messages", {"messages": [SYSTEM, USER, TWO, USER, THREE]}),
        ("messages", {"messages": [USER, TWO, TOOL, THREE]}),
        ("prompt_completion", {"prompt": "1+1=", "completion": "2"}),
        ("prompt_completion", {"prompt": [SYSTEM, USER], "completion": [TWO]}),
        ("preference", {"prompt": "1+1=", "chosen": "2", "rejected": "3"}),
        ("preference", {"prompt": [USER], "chosen": [TWO, TOOL, TWO], "rejected": [THREE]}),
        ("steps", {"prompt": "1+1=", "completions": ["a", "b"], "labels": [True, False]}),
        ("steps", {"prompt": [USER], "completions": ["a"], "labels": [False]}),
        ("verifiable", {"prompt": "1+1=", "answer": "2"}),
        ("verifiable", {"prompt": [USER], "answer": "2", "metadata": {"a": [1, {"b": None}]}}),
    ],
)
def test_a_good_record_comes_back_as_it_was(layout: Any, fields: dict[str, Any]) -> None:
    assert dump_record(RECORD_TYPES[layout].model_validate(fields)) == fields


def test_text_is_kept_to_the_letter() -> None:
    fields = {"prompt": "  e\u0301\n", "completion": " \tx\r\n"}
    assert dump_record(PromptCompletionRecord.model_validate(fields)) == fields


@pytest.mark.parametrize(
    ("model", "fields", "expected"),
    [
        (PromptCompletionRecord, {"prompt": " \n", "completion": "2"}, "is empty"),
        (PromptCompletionRecord, {"prompt": "1", "completion": ""}, "is empty"),
        (PromptCompletionRecord, {"prompt": [], "completion": [TWO]}, "at least 1"),
        (PromptCompletionRecord, {"prompt": 1, "completion": "2"}, "Unable to extract tag"),
        (PromptCompletionRecord, {"prompt": b"1", "completion": "2"}, "Unable to extract tag"),
        (PromptCompletionRecord, {"prompt": "1", "completion": [TWO]}, "within a record all must"),
        (PromptCompletionRecord, {"prompt": [USER], "completion": "2"}, "within a record all must"),
        (PromptCompletionRecord, {"prompt": [TWO], "completion": [TWO]}, "needs a user message"),
        (PromptCompletionRecord, {"prompt": [USER, TWO], "completion": [TWO]}, "ends with"),
        (PromptCompletionRecord, {"prompt": [USER, SYSTEM], "completion": [TWO]}, "position 1"),
        (PromptCompletionRecord, {"prompt": [USER], "completion": [USER]}, "has a user message"),
        (PromptCompletionRecord, {"prompt": [USER], "completion": [TWO, TOOL]}, "begin and end"),
        (PreferenceRecord, {"prompt": "1", "chosen": "2", "rejected": "2"}, "are the same"),
        (
            PreferenceRecord,
            {"prompt": [USER], "chosen": [TWO], "rejected": "2"},
            "rejected is text",
        ),
        (StepsRecord, {"prompt": "1", "completions": [], "labels": []}, "at least 1"),
        (StepsRecord, {"prompt": "1", "completions": ["a"], "labels": [True, True]}, "2 entries"),
        (StepsRecord, {"prompt": "1", "completions": ["a"], "labels": ["true"]}, "true or false"),
        (StepsRecord, {"prompt": "1", "completions": ["a"], "labels": [2]}, "true or false"),
        (StepsRecord, {"prompt": "1", "completions": ["a", " "], "labels": [1, 0]}, "is empty"),
        (VerifiableRecord, {"prompt": "1", "answer": 2}, "valid string"),
        (VerifiableRecord, {"prompt": "1", "answer": "2", "metadata": {"x": {1}}}, "JSON"),
        (VerifiableRecord, {"prompt": "1", "answer": "2", "metadata": {"x": 1e999}}, "'x' is inf"),
        (VerifiableRecord, {"prompt": "1", "answer": "2", "metadata": {"x": "\ud800"}}, "Unicode"),
        (MessagesRecord, {"messages": [USER]}, "at least 2"),
        (MessagesRecord, {"messages": [USER, TWO, USER]}, "ends with a message of the user"),
        (MessagesRecord, {"messages": [TWO, USER, TWO]}, "begins with a message of the assistant"),
        (MessagesRecord, {"messages": [SYSTEM, TWO]}, "needs a user message"),
        (MessagesRecord, {"messages": [USER, {"role": "bot", "content": "x"}]}, "'tool'"),
        (MessagesRecord, {"messages": [USER, {"role": "assistant", "content": ""}]}, "is empty"),
    ],
)
def test_a_bad_record_is_refused(model: type, fields: dict[str, Any], expected: str) -> None:
    assert expected in _fault(model, fields)


def test_labels_of_zero_and_one_are_taken() -> None:
    record = StepsRecord.model_validate(
        {"prompt": "1", "completions": ["a", "b"], "labels": [1, 0]}
    )
    assert record.labels == (True, False)


def test_null_fields_of_columnar_messages_are_dropped() -> None:
    message = Message.model_validate({**USER, "tool_calls": None})
    assert message.model_dump() == USER
    assert "tool_calls" in _fault(Message, {**USER, "tool_calls": ["x"]})


def test_the_prompt_of_a_conversation_ends_before_the_first_answer() -> None:
    assert record_prompt({"messages": [SYSTEM, USER, TWO, USER, THREE]}) == [SYSTEM, USER]
    assert record_prompt({"prompt": "1+1=", "completion": "2"}) == "1+1="


def test_the_digest_is_that_of_the_stripped_text() -> None:
    assert prompt_digest(" 1+1=\n") == hashlib.sha256(b"1+1=").hexdigest()
    assert prompt_digest("e\u0301") == prompt_digest("\u00e9")


def test_a_question_has_one_digest_whatever_it_is_wrapped_in() -> None:
    plain = prompt_digest(USER["content"])
    assert prompt_digest([USER]) == plain
    assert prompt_digest([SYSTEM, USER]) == plain
    assert prompt_digest([Message.model_validate(SYSTEM), Message.model_validate(USER)]) == plain
    assert prompt_digest([USER, TWO, USER]) != plain
    assert prompt_digest([{"content": " What is 1+1? ", "role": "user"}]) == plain


def test_positions_agree_with_the_arithmetic_task() -> None:
    from stages.tasks.arithmetic import digest_fraction

    for prompt in ("1+1=", "4-1+7=", "9+9+9="):
        assert digest_position(prompt_digest(prompt)) == digest_fraction(prompt)


def test_positions_lie_in_the_half_open_unit_interval() -> None:
    assert digest_position("0" * 64) == 0.0
    assert digest_position("f" * 64) < 1.0
    assert digest_position("8" + "0" * 63) == 0.5


@given(st.text())
def test_normal_forms_of_a_prompt_share_a_digest(text: str) -> None:
    forms = {prompt_digest(unicodedata.normalize(form, text)) for form in ("NFC", "NFD")}
    assert len(forms) == 1
