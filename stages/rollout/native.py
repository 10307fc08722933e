"""Batched key-value-cache sampling in torch, for any causal language model of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from schemas.rl import SamplingConfig
from stages import heartbeat
from stages.precision import compute_dtype, computing
from stages.rollout.attention import decode_attention
from stages.rollout.checks import check_lengths
from stages.rollout.decoding import Completions, Context
from stages.rollout.fused_context import FusedContext, computes_alike
from stages.rollout.fused_decoder import FusedDecoder, looks_fusable
from stages.rollout.stop_strings import StopStrings
from stages.rollout.types import Rollout

Row = tuple[int, int]
"""Prompt and sample."""
NewContext = Callable[[Sequence[Sequence[int]]], Context | FusedContext]
"""From the prompts of a batch, in token ids."""


class NativeEngine:
    """Samples from the trainer's own module, so that new weights need no copy.

    Prompts of a batch go through the model once each, and their completions share the result.
    Every completion has its own random stream, so that it does not depend on the other rows of
    its batch (only the last bits of its logits do: matrix kernels vary with the shape).

    On a processor, models made as Llama is go through a decoder of our own, if its logits are seen
    to be theirs; all others go through transformers.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        eos_token_ids: Sequence[int],
        pad_token_id: int,
        max_batch_size: int,
        tokenizer: PreTrainedTokenizerBase | None = None,
        own_copy: bool = False,
    ) -> None:
        """tokenizer: for stop strings. own_copy: sample from a copy, which stays as it is between
        one `update_weights` and the next, so that the model may be trained meanwhile.
        """
        self._source = model
        self._model = _copied(model) if own_copy else model
        self._eos_token_ids = sorted(eos_token_ids)
        self._tokenizer = tokenizer
        self._pad_token_id = pad_token_id
        self._max_batch_size = max_batch_size
        text = model.config.get_text_config(decoder=True)
        self._context: int | None = getattr(text, "max_position_embeddings", None)
        self._version = 0
        self._computes_alike: bool | None = None

    def generate(
        self,
        prompt_ids: Sequence[Sequence[int]],
        sampling: SamplingConfig,
        *,
        num_samples: int,
        seed: int,
    ) -> list[Rollout]:
        """Draw `num_samples` completions of every prompt, those of the first prompt first."""
        check_lengths(prompt_ids, sampling, self._context)
        # Prompts of like length share a batch, and padding stays small.
        order = sorted(range(len(prompt_ids)), key=lambda index: len(prompt_ids[index]))
        rows = [(prompt, number) for prompt in order for number in range(num_samples)]
        found: dict[Row, Rollout] = {}
        model = self._model
        with _evaluating(model), self._contexts(sampling.max_completion_tokens) as new_context:
            for start in range(0, len(rows), self._max_batch_size):
                batch = rows[start : start + self._max_batch_size]
                found.update(self._decode(prompt_ids, batch, sampling, seed, new_context))
        return [found[row] for row in sorted(rows)]

    def update_weights(self, policy: PreTrainedModel, version: int) -> None:
        """Take the version; unless the engine has a copy, the weights are new already."""
        assert policy is self._source, "the native engine samples from the module it was made with"
        if self._model is not policy:
            with torch.no_grad():
                for own, new in zip(self._model.parameters(), policy.parameters(), strict=True):
                    if new.requires_grad:
                        own.copy_(new)
        self._version = version

    def report(self) -> dict[str, float]:
        """Nothing: the engine is part of the stage and falls with it."""
        return {}

    def close(self) -> None:
        """Let go of the model."""
        del self._model, self._source

    @contextmanager
    def _contexts(self, num_new_tokens: int) -> Iterator[NewContext]:
        """What makes a context of a batch's prompts, by the weights as they are now."""
        model = self._model
        fused = looks_fusable(model)
        if fused and self._computes_alike is None:
            self._computes_alike = computes_alike(model)
        if fused and self._computes_alike:
            with torch.inference_mode():
                decoder = FusedDecoder(model, compute_dtype(model))
                yield lambda prompts: FusedContext(decoder, prompts, num_new_tokens)
            return
        with decode_attention(model), computing(model), _without_gradient(model):
            yield lambda prompts: Context(model, prompts, num_new_tokens, self._pad_token_id)

    def _decode(
        self,
        prompt_ids: Sequence[Sequence[int]],
        batch: Sequence[Row],
        sampling: SamplingConfig,
        seed: int,
        new_context: NewContext,
    ) -> Iterator[tuple[Row, Rollout]]:
        """Sample the rows of one batch to their ends."""
        prompts = list(dict.fromkeys(prompt for prompt, _ in batch))
        context = new_context([prompt_ids[prompt] for prompt in prompts])
        completions = Completions(
            batch,
            sampling,
            seed,
            self._model.device,
            self._stop_strings([prompt_ids[prompt] for prompt, _ in batch], sampling),
        )
        ends = torch.tensor(
            [*self._eos_token_ids, *sampling.stop_token_ids], device=self._model.device
        )
        place = {prompt: index for index, prompt in enumerate(prompts)}
        context.select(
            torch.tensor([place[prompt] for prompt, _ in batch], device=self._model.device)
        )
        while True:
            heartbeat.beat(f"sampling {len(batch)} completions of {len(prompts)} prompts")
            tokens = completions.draw(context.logits, ends)
            if completions.done:
                break
            keep = completions.compact()
            if keep is not None:
                context.select(keep)
                tokens = tokens[keep]
            context.advance(tokens)
        for row, (ids, logprobs, stopped) in zip(batch, completions.finish(), strict=True):
            yield (
                row,
                Rollout(
                    prompt_ids=list(prompt_ids[row[0]]),
                    completion_ids=ids,
                    rollout_logprobs=logprobs,
                    finish_reason="stop" if stopped else "length",
                    policy_version=self._version,
                    prompt_index=row[0],
                ),
            )

    def _stop_strings(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingConfig
    ) -> StopStrings | None:
        if not sampling.stop:
            return None
        assert self._tokenizer is not None, "stop strings need a tokenizer"
        return StopStrings(self._tokenizer, sampling.stop, prompts)


def _copied(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that shares the memory of frozen weights: below adapters, they never change."""
    shared = {
        id(frozen): nn.Parameter(frozen.detach(), requires_grad=False)
        for frozen in model.parameters()
        if not frozen.requires_grad
    }
    return copy.deepcopy(model, shared).requires_grad_(False)


@contextmanager
def _without_gradient(model: PreTrainedModel) -> Iterator[None]:
    """No graph is recorded, and each weight is turned into bfloat16 once, not once a token.

    Autocast keeps what it has made of a weight only outside of inference mode, and only where the
    weight asks for a gradient: frozen ones do meanwhile.
    """
    if compute_dtype(model) == next(model.parameters()).dtype:
        with torch.inference_mode():
            yield
        return
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    try:
        with torch.no_grad():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Dropout off while sampling; the module is the trainer's, so its mode comes back."""
    training = model.training
    model.train(False)
    try:
        yield
    finally:
        model.train(training)
