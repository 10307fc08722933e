"""What every engine asks of its prompts."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from schemas.base import UserError
from schemas.rl import SamplingConfig


def check_lengths(
    prompt_ids: Sequence[Sequence[int]], sampling: SamplingConfig, config: PreTrainedConfig
) -> None:
    """Raise UserError for a prompt without tokens, or one whose completion may not fit."""
    limit = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    for index, prompt in enumerate(prompt_ids):
        if not prompt:
            raise UserError(f"prompt {index} has no tokens: give it some text, or drop the record")
        total = len(prompt) + sampling.max_completion_tokens
        if limit is not None and total > limit:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, and with max_completion_tokens "
                f"{sampling.max_completion_tokens} goes past the model's context of {limit}: "
                "shorten the prompt or lower sampling.max_completion_tokens"
            )
