"""What a model says about tokens: log-probabilities, and scores at chosen positions.

The heads are applied by hand, at the positions that count and nowhere else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from schemas.base import UserError
from stages import heartbeat
from stages.attention import no_mask, use_packed_attention
from stages.core.logprobs import chunked_token_logprobs, weighted_logprob_sum
from stages.memory import tokens_at_once
from stages.models import head_of
from stages.packing import PackedBatch, like_prompts, micro_batches, pack
from stages.precision import compute_dtype, computing, held_copy, weights_held
from stages.shared_critic import Critic, SharedCritic

# Logits held at once, as elements of [chunk, vocabulary]: 128 MiB in fp32.
LOGIT_ELEMENTS = 2**25
_CHUNK_MULTIPLE = 64


@dataclass(frozen=True)
class Sequences:
    """Prompts with completions, as token ids."""

    prompt_ids: Sequence[Sequence[int]]
    completion_ids: Sequence[Sequence[int]]

    def __len__(self) -> int:
        return len(self.prompt_ids)

    def lengths(self) -> list[int]:
        """Tokens of prompt and completion."""
        return [len(p) + len(c) for p, c in zip(self.prompt_ids, self.completion_ids, strict=True)]

    def select(self, indices: Sequence[int]) -> Sequences:
        """Some of them, in the given order."""
        return Sequences(
            [self.prompt_ids[i] for i in indices],
            [self.completion_ids[i] for i in indices],
        )

    def pack(self, device: torch.device) -> PackedBatch:
        """One row for the model; like prompts are in it once."""
        return pack(self.prompt_ids, self.completion_ids, device=device)

    def micro_batches(self, max_tokens: int) -> Iterator[list[int]]:
        """Indices in micro-batches of at most max_tokens tokens, like prompts together."""
        return micro_batches(self.lengths(), max_tokens, self.prompt_ids)

    def best_micro_batches(self, asked: int | None, model: nn.Module) -> Iterator[list[int]]:
        """The same, of as many tokens as `tokens_at_once` says."""
        if asked is not None:
            return self.micro_batches(asked)
        groups = like_prompts(self.prompt_ids)
        shared = [len(self.prompt_ids[group[0]]) for group in groups if len(group) > 1]
        return self.micro_batches(tokens_at_once(None, model, fmean(shared) if shared else 0.0))


def hidden_states(model: Critic, batch: PackedBatch) -> Tensor:
    """Last hidden states of every token, [_T, _H].

    Raises UserError if the model does not let its attention be chosen.
    """
    backbone = cast(PreTrainedModel, model.base_model)
    use_packed_attention(backbone)
    calls = batch.layout.num_calls
    with computing(model):
        output = backbone(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            attention_mask=no_mask(batch.input_ids.device),
            layout=batch.layout,
            use_cache=False,
        )
    if batch.layout.num_calls == calls:
        raise UserError(
            f"{type(backbone).__name__} does not hand options on to its attention, so sequences "
            "cannot share a row; use another model of transformers"
        )
    hidden: Tensor = output.last_hidden_state
    return hidden[0]


def logprobs_at(
    model: PreTrainedModel,
    hidden: Tensor,
    positions: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of targets [_N] predicted at flat positions [_N], and entropies [_N]."""
    head = model.get_output_embeddings()
    dtype = compute_dtype(model)
    return chunked_token_logprobs(
        hidden.index_select(0, positions).to(dtype),
        head.weight,
        targets,
        temperature=temperature,
        chunk_size=_chunk_size(head.weight),
        bias=getattr(head, "bias", None),
        copy=held_copy(model, head.weight, dtype),
    )


def weighted_logprobs_at(
    model: PreTrainedModel,
    hidden: Tensor,
    positions: Tensor,
    targets: Tensor,
    token_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of token_weights [_N] times `logprobs_at`, which alone is differentiable; see
    `weighted_logprob_sum`."""
    head = model.get_output_embeddings()
    dtype = compute_dtype(model)
    return weighted_logprob_sum(
        hidden.index_select(0, positions).to(dtype),
        head.weight,
        targets,
        token_weights,
        chunk_size=_chunk_size(head.weight),
        bias=getattr(head, "bias", None),
        copy=held_copy(model, head.weight, dtype),
    )


def _chunk_size(weight: Tensor) -> int:
    """Tokens whose logits are held at once; many are a multiple of 64, as products like them."""
    size = max(LOGIT_ELEMENTS // weight.shape[0], 1)
    return size - size % _CHUNK_MULTIPLE if size > _CHUNK_MULTIPLE else size


def completion_logprobs(
    model: PreTrainedModel, sequences: Sequences, width: int, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of completion tokens, [_B, width] each, 0 as filling."""
    logprobs, entropy, _ = completion_outputs(model, None, sequences, width, temperature)
    return logprobs, entropy


def completion_outputs(
    model: PreTrainedModel,
    critic: SharedCritic | None,
    sequences: Sequences,
    width: int,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`completion_logprobs`, and the values of a critic on the same backbone from the same pass."""
    batch = sequences.pack(model.device)
    rows, columns, positions, targets = _completion_index(sequences, batch)
    hidden = hidden_states(model, batch)

    def placed(values: Tensor) -> Tensor:
        return values.new_zeros(len(sequences), width).index_put((rows, columns), values)

    logprobs, entropy = logprobs_at(model, hidden, positions, targets, temperature)
    values: Tensor | None = None
    if critic is not None:
        values = placed(critic.score(hidden.index_select(0, positions))[:, 0].float())
    return placed(logprobs), placed(entropy), values


def completion_values(
    model: Critic, sequences: Sequences, width: int, *, head_only: bool = False
) -> Tensor:
    """A critic's value of the state before each completion token, [_B, width], 0 as filling.

    head_only: no gradient reaches the backbone.
    """
    batch = sequences.pack(model.device)
    rows, columns, positions, _ = _completion_index(sequences, batch)
    with torch.set_grad_enabled(torch.is_grad_enabled() and not head_only):
        hidden = hidden_states(model, batch).index_select(0, positions)
    values: Tensor = head_of(model)(hidden)[:, 0].float()
    return values.new_zeros(len(sequences), width).index_put((rows, columns), values)


def scores_at(model: Critic, sequences: Sequences, positions: Sequence[Sequence[int]]) -> Tensor:
    """The head's output at given positions of each sequence, [sum of positions, num_labels].

    Positions count from the first prompt token.
    """
    batch = sequences.pack(model.device)
    flat = [batch.position(row, index) for row, own in enumerate(positions) for index in own]
    index = torch.tensor(flat, dtype=torch.long, device=model.device)
    scores: Tensor = head_of(model)(hidden_states(model, batch).index_select(0, index)).float()
    return scores


@torch.inference_mode()
def all_completion_logprobs(
    model: PreTrainedModel,
    sequences: Sequences,
    width: int,
    max_tokens: int | None,
    temperature: float,
) -> Tensor:
    """`completion_logprobs` without gradient, in micro-batches: see `tokens_at_once`."""
    out = torch.zeros(len(sequences), width, device=model.device)
    with weights_held(model):
        for indices in sequences.best_micro_batches(max_tokens, model):
            heartbeat.beat(f"computing log-probabilities of {len(sequences)} completions")
            logprobs, _ = completion_logprobs(model, sequences.select(indices), width, temperature)
            out[indices] = logprobs.float()
    return out.clone()


@torch.inference_mode()
def all_completion_values(
    model: Critic, sequences: Sequences, width: int, max_tokens: int
) -> tuple[Tensor, Tensor]:
    """Values before each token [_B, width], and after the last one [_B], without gradient."""
    values = torch.zeros(len(sequences), width, device=model.device)
    after = torch.zeros(len(sequences), device=model.device)
    with weights_held(model):
        for indices in sequences.micro_batches(max_tokens):
            heartbeat.beat(f"computing values of {len(sequences)} completions")
            for index, own in zip(indices, _values(model, sequences.select(indices)), strict=True):
                values[index, : len(own) - 1] = own[:-1]
                after[index] = own[-1]
    return values.clone(), after.clone()


def _values(model: Critic, sequences: Sequences) -> tuple[Tensor, ...]:
    """A critic's values of each sequence, from the last token of its prompt to its own last."""
    positions = [
        range(len(prompt) - 1, len(prompt) + len(completion))
        for prompt, completion in zip(sequences.prompt_ids, sequences.completion_ids, strict=True)
    ]
    found = scores_at(model, sequences, positions)[:, 0]
    return torch.split(found, [len(own) for own in positions])


def _completion_index(
    sequences: Sequences, batch: PackedBatch
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(row, column) of each completion token, where it is predicted, and its id; flat, [_N]."""
    rows: list[int] = []
    columns: list[int] = []
    positions: list[int] = []
    targets: list[int] = []
    for b, (prompt, completion) in enumerate(
        zip(sequences.prompt_ids, sequences.completion_ids, strict=True)
    ):
        assert prompt, "a completion is predicted from its prompt: it cannot be empty"
        rows += [b] * len(completion)
        columns += range(len(completion))
        positions += [
            batch.position(b, index)
            for index in range(len(prompt) - 1, len(prompt) + len(completion) - 1)
        ]
        targets += completion
    device = batch.input_ids.device
    rows_, columns_, positions_, targets_ = (
        torch.tensor(x, dtype=torch.long, device=device)
        for x in (rows, columns, positions, targets)
    )
    return rows_, columns_, positions_, targets_
