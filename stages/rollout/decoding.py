"""The two halves of a decoding loop: what the model knows, and what has been drawn."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from schemas.base import UserError
from schemas.rl import SamplingConfig
from stages.rollout.cache import make_cache
from stages.rollout.sampling import sample
from stages.rollout.stop_strings import StopStrings
from stages.rollout.streams import uniforms

# Finished rows are dropped once they are this share of the batch: below it, copying the cache
# of the others costs more than carrying them along.
_COMPACT_ABOVE = 0.15


class Context:
    """Cache, mask and positions of a batch, and the logits of its next tokens.

    Mask and positions are given to the model as they are: a pad id may equal the end id, so
    nothing may be guessed from ids.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        num_new_tokens: int,
        pad_token_id: int,
    ) -> None:
        """Left-pad the prompts and run the model on them, once."""
        self._filled = max(map(len, prompts))
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
        padded = [[pad_token_id] * (self._filled - len(prompt)) + [*prompt] for prompt in prompts]
        ids = torch.tensor(padded, device=model.device)
        columns = torch.arange(self._filled + num_new_tokens, device=model.device)
        self._mask = columns >= (self._filled - lengths)[:, None]
        self._next_position = lengths
        self._model = model
        self._cache = make_cache(model)
        positions = (columns[: self._filled] - (self._filled - lengths)[:, None]).clamp(min=0)
        self.logits = self._forward(ids, positions)

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        self._cache.batch_select_indices(rows)
        self._mask = self._mask[rows]
        self._next_position = self._next_position[rows]
        self.logits = self.logits[rows]

    def advance(self, tokens: Tensor) -> None:
        """Append one token to each row."""
        self._filled += 1
        self.logits = self._forward(tokens[:, None], self._next_position[:, None])
        self._next_position = self._next_position + 1

    def _forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        output = self._model(
            input_ids=ids,
            attention_mask=self._mask[:, : self._filled],
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: Tensor = output.logits[:, -1]
        return logits


class Completions:
    """Tokens drawn so far. Rows that have ended leave the batch when enough of them have."""

    def __init__(
        self,
        rows: Sequence[tuple[int, int]],
        sampling: SamplingConfig,
        seed: int,
        device: torch.device,
        stop_strings: StopStrings | None = None,
    ) -> None:
        """Rows of (prompt, sample), and whoever finds the stop strings in them, row by row."""
        pairs = np.array(rows, dtype=np.int64)
        self._limit = sampling.max_completion_tokens
        numbers = uniforms(seed, pairs[:, 0], pairs[:, 1], self._limit)
        self._uniform = torch.from_numpy(numbers.T.copy()).to(device)
        self._sampling = sampling
        shape = (self._limit, len(rows))
        self._tokens = torch.zeros(shape, dtype=torch.long, device=self._uniform.device)
        self._logprobs = torch.zeros(shape, dtype=torch.float32, device=self._uniform.device)
        # 0 stands for a row that has not ended.
        self._lengths = torch.zeros_like(self._tokens[0])
        self._row = torch.arange(len(rows), device=self._uniform.device)
        self._alive = torch.ones_like(self._row, dtype=torch.bool)
        self._step = 0
        self._num_alive = len(rows)
        self._stop_strings = stop_strings

    @property
    def done(self) -> bool:
        """Whether every row has ended or is at the limit."""
        return self._num_alive == 0 or self._step == self._limit

    def draw(self, logits: Tensor, eos_token_ids: Tensor) -> Tensor:
        """Draw the next token of each row of the batch."""
        tokens, logprobs = sample(logits, self._uniform[self._step][self._row], self._sampling)
        self._tokens[self._step][self._row] = tokens
        self._logprobs[self._step][self._row] = logprobs
        self._step += 1
        ends = (tokens[:, None] == eos_token_ids).any(dim=1) & self._alive
        if self._stop_strings is not None:
            ends |= self._found(self._stop_strings, tokens, self._alive & ~ends)
        self._lengths[self._row[ends]] = self._step
        self._alive &= ~ends
        self._num_alive = int(self._alive.sum())
        return tokens

    def _found(self, stop_strings: StopStrings, tokens: Tensor, alive: Tensor) -> Tensor:
        """Rows of the batch [_B] in which a stop string ends with the token."""
        rows = zip(self._row.tolist(), tokens.tolist(), alive.tolist(), strict=True)
        found = [lives and stop_strings.ends(row, token) for row, token, lives in rows]
        return torch.tensor(found, dtype=torch.bool, device=alive.device)

    def compact(self) -> Tensor | None:
        """Indices of the rows that remain in the batch, or None where all do."""
        num_rows = len(self._row)
        if num_rows - self._num_alive <= _COMPACT_ABOVE * num_rows:
            return None
        keep = self._alive.nonzero().squeeze(1)
        self._row, self._alive = self._row[keep], self._alive[keep]
        return keep

    def finish(self) -> list[tuple[list[int], list[float], bool]]:
        """Token ids, log-probabilities and whether an end token came, of each row.

        Raises UserError if the model's logits were not numbers.
        """
        if not bool(self._logprobs[: self._step].isfinite().all()):
            raise UserError(
                "the policy's logits are not finite, so nothing can be sampled from it: training "
                "has diverged; lower the learning rate, or start from an earlier checkpoint"
            )
        lengths: list[int] = self._lengths.tolist()
        tokens: list[list[int]] = self._tokens.T.tolist()
        logprobs: list[list[float]] = self._logprobs.T.tolist()
        return [
            (ids[: length or None], values[: length or None], length > 0)
            for ids, values, length in zip(tokens, logprobs, lengths, strict=True)
        ]
