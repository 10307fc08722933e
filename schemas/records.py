"""The record layouts, and the digest that tells prompts apart."""

from __future__ import annotations

import hashlib
import math
import reprlib
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Discriminator,
    Field,
    StrictStr,
    Tag,
    field_validator,
    model_validator,
)

from schemas.base import Frozen
from schemas.data import Layout
from schemas.fingerprint import canonical_json

Role = Literal["system", "user", "assistant", "tool"]

_MAX_DEPTH = 50
"""How deeply metadata may be nested."""


def _not_blank(value: str) -> str:
    if not value.strip():
        raise ValueError("is empty")
    return _encodable(value)


def _encodable(value: str, where: str = "") -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        fault = "is not valid Unicode text (a lone surrogate); mend the text"
        raise ValueError(f"{where!r} {fault}" if where else fault) from None
    return value


def _label(value: object) -> object:
    """Take 0 and 1 for labels, and nothing else that Python would call true or false."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int) and value in (0, 1):
        return bool(value)
    raise ValueError(f"must be true or false, not {reprlib.repr(value)}")


def _shape(value: object) -> str | None:
    if isinstance(value, str):
        return "text"
    return "messages" if isinstance(value, list | tuple) else None


Text = Annotated[StrictStr, AfterValidator(_not_blank)]
"""Text with at least one character that is not white space."""

Label = Annotated[bool, BeforeValidator(_label)]


class Message(Frozen):
    """One turn of a conversation."""

    role: Role
    """Who speaks."""
    content: Text
    """What is said."""

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Columnar files fill fields that only other messages have with null."""
        if not isinstance(value, Mapping):
            return value
        return {k: v for k, v in value.items() if v is not None or k in cls.model_fields}


def _start_of_conversation(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Check what holds for a prompt and for a whole conversation alike."""
    for index, message in enumerate(messages):
        if message.role == "system" and index:
            raise ValueError(f"has a system message at position {index}; it may only be the first")
    if not any(message.role == "user" for message in messages):
        raise ValueError("needs a user message")
    return messages


def _prompt_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    _start_of_conversation(messages)
    if messages[-1].role not in ("user", "tool"):
        raise ValueError(
            f"ends with a message of the {messages[-1].role}; "
            "the last message of a prompt must be the user's (or a tool's)"
        )
    return messages


def _completion_messages(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    for message in messages:
        if message.role in ("system", "user"):
            raise ValueError(
                f"has a {message.role} message; a completion holds the assistant's messages "
                "(and a tool's between them)"
            )
    if messages[0].role != "assistant" or messages[-1].role != "assistant":
        raise ValueError("must begin and end with a message of the assistant")
    return messages


Prompt = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[
        tuple[Message, ...],
        Field(min_length=1),
        AfterValidator(_prompt_messages),
        Tag("messages"),
    ],
    Discriminator(_shape),
]
"""Text, or messages that end with the user's (or a tool's)."""

Completion = Annotated[
    Annotated[Text, Tag("text")]
    | Annotated[
        tuple[Message, ...],
        Field(min_length=1),
        AfterValidator(_completion_messages),
        Tag("messages"),
    ],
    Discriminator(_shape),
]
"""Text, or messages of the assistant."""


def _same_shape(**fields: object) -> None:
    """Refuse a record in which one field is text and another a list of messages."""
    shapes = {name: _shape(value) for name, value in fields.items()}
    if len(set(shapes.values())) > 1:
        found = ", ".join(
            f"{name} is {'text' if shape == 'text' else 'a list of messages'}"
            for name, shape in shapes.items()
        )
        raise ValueError(f"{found}; within a record all must be text, or all lists of messages")


class MessagesRecord(Frozen):
    """A conversation; the assistant's turns are learned."""

    messages: tuple[Message, ...] = Field(min_length=2)
    """Turns; the last one is the assistant's."""

    @field_validator("messages")
    @classmethod
    def _check(cls, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        _start_of_conversation(messages)
        if messages[-1].role != "assistant":
            raise ValueError(
                f"ends with a message of the {messages[-1].role}; "
                "the last message must be the assistant's, since that is what is learned"
            )
        first = next(message.role for message in messages if message.role != "system")
        if first != "user":
            raise ValueError(f"begins with a message of the {first}; it must begin with the user's")
        return messages


class PromptCompletionRecord(Frozen):
    """A prompt and the completion that is learned."""

    prompt: Prompt
    completion: Completion

    @model_validator(mode="after")
    def _check(self) -> Self:
        _same_shape(prompt=self.prompt, completion=self.completion)
        return self


class PreferenceRecord(Frozen):
    """A prompt with a better and a worse completion."""

    prompt: Prompt
    chosen: Completion
    rejected: Completion

    @model_validator(mode="after")
    def _check(self) -> Self:
        _same_shape(prompt=self.prompt, chosen=self.chosen, rejected=self.rejected)
        if self.chosen == self.rejected:
            raise ValueError("chosen and rejected are the same; a pair needs two completions")
        return self


class StepsRecord(Frozen):
    """A prompt, the steps of one solution, and for each step whether it is right."""

    prompt: Prompt
    """Text, or messages; the steps are text either way."""
    completions: tuple[Text, ...] = Field(min_length=1)
    """Steps in order, without separators."""
    labels: tuple[Label, ...] = Field(min_length=1)
    """One label a step."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if len(self.labels) != len(self.completions):
            raise ValueError(
                f"labels has {len(self.labels)} entries and completions {len(self.completions)}; "
                "each step needs one label"
            )
        return self


class VerifiableRecord(Frozen):
    """A prompt and the answer that a verifier checks a completion against."""

    prompt: Prompt
    answer: Text
    metadata: dict[str, Any] = Field(default_factory=dict)
    """Other columns of the source, for verifiers that want them."""

    @field_validator("metadata")
    @classmethod
    def _check(cls, metadata: dict[str, Any]) -> dict[str, Any]:
        return {_key(key): _plain(value, key) for key, value in metadata.items()}


Record = MessagesRecord | PromptCompletionRecord | PreferenceRecord | StepsRecord | VerifiableRecord

RECORD_TYPES: dict[Layout, type[Record]] = {
    "messages": MessagesRecord,
    "prompt_completion": PromptCompletionRecord,
    "preference": PreferenceRecord,
    "steps": StepsRecord,
    "verifiable": VerifiableRecord,
}
"""The model of each layout."""

LAYOUT_FIELDS: dict[Layout, tuple[str, ...]] = {
    "messages": ("messages",),
    "prompt_completion": ("prompt", "completion"),
    "preference": ("prompt", "chosen", "rejected"),
    "steps": ("prompt", "completions", "labels"),
    "verifiable": ("prompt", "answer"),
}
"""The fields that a record of each layout must have."""


def dump_record(record: Record) -> dict[str, Any]:
    """A record as a JSON object; metadata only where there is some."""
    value = record.model_dump(mode="json")
    if not value.get("metadata", True):
        del value["metadata"]
    return value


def record_prompt(record: Mapping[str, Any]) -> str | Sequence[Mapping[str, Any]]:
    """The prompt of a record: of a conversation, the turns before the assistant's first."""
    if "messages" not in record:
        prompt: str | Sequence[Mapping[str, Any]] = record["prompt"]
        return prompt
    turns: Sequence[Mapping[str, Any]] = record["messages"]
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            return turns[:index]
    return turns


def prompt_digest(prompt: str | Sequence[Message | Mapping[str, Any]]) -> str:
    """The sha256, in hexadecimal, of a prompt's text, stripped and in Unicode's NFC form.

    A single user message counts as its text, and system messages do not count, so that a question
    has one digest whatever it is wrapped in. Other conversations count as their canonical JSON.
    """
    return hashlib.sha256(_canonical_text(prompt).encode()).hexdigest()


def digest_position(digest: str) -> float:
    """Map a digest to [0, 1), evenly and alike on every machine."""
    # A float holds 53 bits exactly; rounding 64 of them could give 1.
    return (int(digest[:16], 16) >> 11) / 2**53


def _canonical_text(prompt: str | Sequence[Message | Mapping[str, Any]]) -> str:
    if isinstance(prompt, str):
        return _normal(prompt)
    said = [(role, _normal(content)) for role, content in map(_turn, prompt) if role != "system"]
    if len(said) == 1 and said[0][0] == "user":
        return said[0][1]
    return canonical_json([{"role": role, "content": content} for role, content in said])


def _turn(message: Message | Mapping[str, Any]) -> tuple[str, str]:
    if isinstance(message, Message):
        return message.role, message.content
    return message["role"], message["content"]


def _normal(text: str) -> str:
    return unicodedata.normalize("NFC", text.strip())


def _key(key: object) -> str:
    return _encodable(str(key), str(key))


def _plain(value: Any, where: str, depth: int = 0) -> Any:
    """The value as JSON holds it; anything that JSON does not hold is refused."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"{where[:40]!r} is nested more than {_MAX_DEPTH} levels deep")
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, str):
        return _encodable(value, where)
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, Mapping):
        return {_key(k): _plain(v, f"{where}.{k}", depth + 1) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]", depth + 1) for i, v in enumerate(value)]
    shown = repr(value) if isinstance(value, float) else f"a {type(value).__name__}"
    raise ValueError(f"{where!r} is {shown}, which JSON does not hold; drop it with a transform")
