"""What every engine asks of its prompts."""

from __future__ import annotations

from collections.abc import Sequence

from schemas.base import UserError
from schemas.rl import SamplingConfig


def check_lengths(
    prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, context: int | None
) -> None:
    """Raise UserError for a prompt without tokens, or one whose completion may not fit."""
    for index, prompt in enumerate(prompt_ids):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens: give it some text, or drop the record")
        total = len(prompt) + sampling.max_completion_tokens
        if context is not None and total > context:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, and with max_completion_tokens "
                f"{sampling.max_completion_tokens} goes past the context of {context}: "
                "shorten the prompt or lower sampling.max_completion_tokens"
            )
