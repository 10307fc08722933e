"""Texts that end a completion, found while it is drawn."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from schemas.base import UserError


class StopStrings:
    """Follows the text of each row, special tokens left out, as vLLM does for the same setting.

    The text grows as a stream: a character of several tokens appears with the last of them, and
    the first token of a completion is read behind its prompt.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        stop: Sequence[str],
        prompts: Sequence[Sequence[int]],
    ) -> None:
        """One row for each prompt. Raises UserError for a tokenizer that cannot stream."""
        if not isinstance(tokenizer, PreTrainedTokenizerFast):
            raise UserError(
                f"sampling.stop needs a fast tokenizer, and {type(tokenizer).__name__} is none: "
                "use sampling.stop_token_ids"
            )
        self._tokenizer: Tokenizer = tokenizer.backend_tokenizer
        self._stop = list(stop)
        self._overlap = max(map(len, stop)) - 1
        self._streams = [DecodeStream(ids=list(ids), skip_special_tokens=True) for ids in prompts]
        self._tails = [""] * len(prompts)

    def ends(self, row: int, token: int) -> bool:
        """Append a token to a row; whether a stop string ends in what it adds."""
        added = self._step(row, token)
        if not added:
            return False
        text = self._tails[row] + added
        self._tails[row] = text[-self._overlap :] if self._overlap else ""
        return any(stop in text for stop in self._stop)

    def _step(self, row: int, token: int) -> str | None:
        try:
            return self._streams[row].step(self._tokenizer, token)
        except Exception as error:
            # Raised where the text so far changes with a token that comes after it; vLLM starts
            # the stream anew, too.
            if "Invalid prefix encountered" not in str(error):
                raise
            self._streams[row] = DecodeStream(skip_special_tokens=True)
            return self._streams[row].step(self._tokenizer, token)
