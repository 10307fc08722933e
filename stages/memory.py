"""What goes through the model at once, and less of it where memory does not suffice."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from infra.files import write_atomic
from schemas.base import UserError
from stages.lean_layers import decoder_layers

logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

# Below this a micro-batch is so small that the model itself must be what does not fit.
_LEAST = 16

_MOST = 16384
# On processors: elements of the widest states of a layer, 4.7 MB in float32, which a core's share
# of the cache holds. More tokens made no model more than 3% faster, from 0.1 to 135 million
# parameters, and took up to three times the memory beside the model's state
# (tests.benchmarks.step).
_CACHED_ELEMENTS = 9 * 2**17
# Below, what each micro-batch costs whatever its size, going through all gradients once, shows.
_FEWEST = 768
_ENOUGH = 8192
_PROMPTS = 8


def tokens_at_once(asked: int | None, model: nn.Module, shared_prompt: float = 0.0) -> int:
    """Tokens of a micro-batch: those asked for, or as many as serve the model best.

    That is what keeps a GPU busy; on a processor, what the cache holds of a layer. The numbers are
    of model, data and kind of device alone: every machine of a kind splits alike.

    shared_prompt: tokens of a prompt that several sequences share, on average. Each micro-batch
    computes its own copy, so it is to be an eighth at most.
    """
    if asked is not None:
        return asked
    if next(model.parameters()).device.type != "cpu":
        return _MOST
    weights = [weight for weight in decoder_layers(model).parameters() if weight.ndim > 1]
    widest = max((max(weight.shape[-2:]) for weight in weights), default=1)
    serves = min(max(_CACHED_ELEMENTS // widest, _FEWEST), _ENOUGH)
    return min(max(serves, round(_PROMPTS * shared_prompt)), _MOST)


class TokenBudget:
    """Tokens of a micro-batch. An out-of-memory error halves it, and the pass is done again.

    The result of a pass does not depend on how it is split, but for rounding; so that a resumed
    stage splits as the first attempt did, the budget belongs into its checkpoints.
    """

    def __init__(self, tokens: int, section: str) -> None:
        self.tokens = tokens
        self._section = section

    def fit(self, bytes_a_token: float, free: float, kept_in: Path) -> None:
        """Lower the budget to what `free` bytes hold, at bytes_a_token.

        The kernel kills a process on the CPU without an error that could be answered, so this is
        found out before. What is free is another number in each attempt: the budget of the first
        one is kept in a file, and later ones read it.
        """
        if kept_in.exists():
            self.tokens = int(json.loads(kept_in.read_text(encoding="utf-8"))["tokens"])
            return
        fitting = max(int(free / bytes_a_token), _LEAST)
        if fitting < self.tokens:
            logger.warning(
                "%s.micro_batch_tokens: memory holds %d tokens at once, not %d (%.2f MB each, "
                "%.2f GB left for them): going on with that; %s.gradient_checkpointing takes less",
                self._section,
                fitting,
                self.tokens,
                bytes_a_token / 1e6,
                free / 1e9,
                self._section,
            )
            self.tokens = fitting
        kept_in.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(kept_in, json.dumps({"tokens": self.tokens}) + "\n")

    def run(self, work: Callable[[int], _Result], clear: Callable[[], None]) -> _Result:
        """`work(tokens)`, again with half of them for as long as memory runs out.

        clear: takes back what an unfinished attempt has left, gradients above all.
        Raises UserError where the smallest micro-batch does not fit.
        """
        while True:
            try:
                return work(self.tokens)
            except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
                if not out_of_memory(error):
                    raise
                problem = str(error).splitlines()[0][:200]
            # Outside of the handler: its traceback holds the tensors of the attempt.
            clear()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self._halve(problem)

    def _halve(self, problem: str) -> None:
        if self.tokens <= _LEAST:
            raise UserError(
                f"out of memory with {self.tokens} tokens at once ({problem}): set "
                f"{self._section}.gradient_checkpointing to true, or use a smaller model, shorter "
                "sequences, or a device with more memory"
            )
        self.tokens //= 2
        logger.warning(
            "out of memory (%s): going on with %d tokens at once; set %s.micro_batch_tokens to "
            "that to begin with it",
            problem,
            self.tokens,
            self._section,
        )


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out; torch's allocator on the CPU has no own class."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text and "allocate memory" in text
