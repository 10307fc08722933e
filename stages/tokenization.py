"""From records to token ids, once: nothing is ever tokenised a second time."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from schemas.base import UserError
from stages import heartbeat

Messages = Sequence[dict[str, Any]]
Prompt = str | Messages


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Token ids of a prompt: as it is for text, through the chat template for messages."""
    heartbeat.beat("encoding records")
    if isinstance(prompt, str):
        ids: list[int] = tokenizer(prompt).input_ids
        return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids
    return _apply_template(tokenizer, prompt, add_generation_prompt=True)


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Prompt
) -> tuple[list[int], list[int]]:
    """Token ids of a prompt and of its completion, the end token included."""
    prompt_ids = encode_prompt(tokenizer, prompt)
    if isinstance(prompt, str):
        assert isinstance(completion, str)
        ids = tokenizer(completion, add_special_tokens=False).input_ids
        return prompt_ids, [*ids, tokenizer.eos_token_id]
    assert not isinstance(completion, str)
    whole = _apply_template(tokenizer, [*prompt, *completion])
    if whole[: len(prompt_ids)] != prompt_ids:
        raise UserError(
            "the chat template does not put the completion behind the prompt "
            "(the prompt's tokens are no prefix of the conversation's); use another template"
        )
    return prompt_ids, _end_at_eos(tokenizer, whole[len(prompt_ids) :])


def encode_messages(
    tokenizer: PreTrainedTokenizerBase, messages: Messages
) -> tuple[list[int], list[bool]]:
    """Token ids of a conversation, and which of them the assistant wrote (its end token too)."""
    input_ids: list[int] = []
    trainable: list[bool] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt_ids, turn = encode_pair(tokenizer, messages[:index], [message])
        if prompt_ids[: len(input_ids)] != input_ids:
            raise UserError(
                "the chat template changes earlier turns when a new one is added; "
                "split the conversation into one record for each assistant turn"
            )
        trainable += [False] * (len(prompt_ids) - len(input_ids)) + [True] * len(turn)
        input_ids = prompt_ids + turn
    return input_ids, trainable


def completion_text(tokenizer: PreTrainedTokenizerBase, completion_ids: Sequence[int]) -> str:
    """What a completion says, special tokens left out."""
    return decode(tokenizer, completion_ids, skip_special_tokens=True)


def steps_completion(prompt: Prompt, steps: Sequence[str], separator: str) -> Prompt:
    """The completion that a list of steps stands for, plain or as one assistant message."""
    text = separator.join(steps)
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


class StepFinder:
    """Finds the last token of each step of a sampled completion.

    A step ends with the token in which the separator ends; the last step ends with the last token
    that is not special. Steps of white space alone belong to the step before them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, separator: str) -> None:
        self._tokenizer = tokenizer
        self._separator = separator
        self._special = set(tokenizer.all_special_ids)
        self._pieces: dict[int, str] = {}

    def __call__(self, completion_ids: Sequence[int]) -> list[int]:
        """Positions within the completion, ascending; empty for a completion without text."""
        ends: list[int] = []
        text, length = "", 0
        for position, token in enumerate(completion_ids):
            if token in self._special:
                continue
            length = position + 1
            text += self._piece(token)
            if self._separator in text:
                head, _, text = text.rpartition(self._separator)
                self._close(ends, head, position)
        if text.strip():
            self._close(ends, text, length - 1)
        return ends

    @staticmethod
    def _close(ends: list[int], step: str, position: int) -> None:
        if step.strip():
            ends.append(position)
        elif ends:
            ends[-1] = position

    def _piece(self, token: int) -> str:
        piece = self._pieces.get(token)
        if piece is None:
            piece = self._pieces[token] = decode(self._tokenizer, [token])
        return piece


def labelled_step_ends(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Prompt,
    steps: Sequence[str],
    separator: str,
) -> tuple[list[int], list[int], list[int]]:
    """(prompt_ids, completion_ids, step_ends) of a labelled record; one end for each step.

    The ends come from character offsets, so a separator inside a step does not split it.
    Raises UserError where two steps end in the same token.
    """
    prompt_ids, completion_ids = encode_pair(
        tokenizer, prompt, steps_completion(prompt, steps, separator)
    )
    text = separator.join(steps)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    count = len(encoded.input_ids)
    if completion_ids[:count] != encoded.input_ids:
        raise UserError(
            "the chat template changes the completion's tokens, so step ends cannot be placed; "
            "use a template that writes the assistant's content as it is"
        )
    lasts = [end for _, end in encoded.offset_mapping]
    ends, cursor = [], 0
    for index, step in enumerate(steps):
        cursor += len(step) + (len(separator) if index < len(steps) - 1 else 0)
        ends.append(bisect_left(lasts, cursor))
    if len(set(ends)) != len(ends):
        raise UserError("two steps end in the same token; join them, or use a longer separator")
    return prompt_ids, completion_ids, ends


def _apply_template(
    tokenizer: PreTrainedTokenizerBase, messages: Messages, add_generation_prompt: bool = False
) -> list[int]:
    if not tokenizer.chat_template:
        raise UserError(
            "the records are conversations, but the model's tokenizer has no chat template: "
            "set one in tokenizer_config.json (or model.built.chat_template), "
            "or use the plain prompt/completion layout"
        )
    encoded: Any = tokenizer.apply_chat_template(
        list(messages),
        tokenize=True,
        add_generation_prompt=add_generation_prompt,
        return_dict=True,
    )
    ids: list[int] = encoded["input_ids"]
    return ids


def decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: bool) -> str:
    """What token ids say, special tokens included unless `skip_special_tokens` is set."""
    text = tokenizer.decode(list(ids), **options)
    assert isinstance(text, str)
    return text


def _end_at_eos(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> list[int]:
    """A template may write a newline after the end token; sampling stops at the token."""
    if tokenizer.eos_token_id in ids:
        last = len(ids) - 1 - ids[::-1].index(tokenizer.eos_token_id)
        return ids[: last + 1]
    return [*ids, tokenizer.eos_token_id]
