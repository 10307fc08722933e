"""What a `FusedDecoder` knows of a batch: prompts once, and the tokens of each completion.

Shapes: `_P` prompts of at most `_L` tokens, `_R` rows, `_S` rows of a prompt at most, `_K` key
heads, `_G` query heads of each, `_D` dimension of a head, `_N` tokens drawn so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stages.core import kernels
from stages.exact_attention import exact_attention
from stages.packing import pack
from stages.rollout.decoder_step import DecoderStep, fits
from stages.rollout.fused_decoder import FusedDecoder

# A full cache gets a quarter more room, and this many tokens at least: see `stages.rollout.cache`.
_MIN_SPARE = 16
# Share of the largest logit. Rounding makes about a thousandth of that, other arithmetic, such as a
# factor of 0.9 somewhere, ten to a hundred times as much.
_TOLERANCE = 1e-3


@dataclass
class _States:
    """Keys [rows * _K, _D, tokens] and values [rows * _K, tokens, _D] of one layer."""

    keys: Tensor
    values: Tensor

    def select(self, indices: Tensor, num_filled: int) -> _States:
        """These rows of each key head, and their first tokens."""
        return _States(
            self.keys[:, :, :num_filled].index_select(0, indices),
            self.values[:, :num_filled].index_select(0, indices),
        )

    def grow(self, num_filled: int) -> None:
        """Make room behind the first tokens."""
        room = num_filled + max(num_filled // 4, _MIN_SPARE)
        rows, dim, _ = self.keys.shape
        keys = self.keys.new_empty(rows, dim, room)
        values = self.values.new_empty(rows, room, dim)
        keys[:, :, :num_filled] = self.keys[:, :, :num_filled]
        values[:, :num_filled] = self.values[:, :num_filled]
        self.keys, self.values = keys, values


class FusedContext:
    """As `stages.rollout.decoding.Context`, whose methods it has."""

    def __init__(
        self, decoder: FusedDecoder, prompts: Sequence[Sequence[int]], num_new_tokens: int
    ) -> None:
        """Run the decoder on the prompts, once, each a row of the batch until `select`."""
        self._decoder = decoder
        self._step = DecoderStep(decoder) if fits(decoder) else None
        self._lengths = torch.tensor([len(prompt) for prompt in prompts], device=decoder.device)
        self._turns = decoder.turns(int(self._lengths.max()) + num_new_tokens)
        batch = pack([[] for _ in prompts], prompts, device=decoder.device)
        starts = torch.tensor(batch.completion_starts, device=decoder.device)
        columns = torch.arange(int(self._lengths.max()), device=decoder.device)
        # Filled up with the first token, so that what is multiplied by 0 is a number.
        self._padding = columns >= self._lengths[:, None]
        tokens = starts[:, None] + columns.where(~self._padding, 0)
        self._prompts: list[_States] = []

        def attend(number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            self._prompts.append(
                _States(
                    k[tokens].permute(0, 2, 3, 1).flatten(0, 1).contiguous(),
                    v[tokens].transpose(1, 2).flatten(0, 1).contiguous(),
                )
            )
            scaling = decoder.layers[number].scaling
            return exact_attention(q, k, v, batch.layout, scaling).flatten(1)

        states = decoder.states(batch.input_ids[0], self._turns[batch.position_ids[0]], attend)
        self._own = [_States(one.keys[:, :, :0], one.values[:, :0]) for one in self._prompts]
        self._num_key_heads = decoder.layers[0].num_key_heads
        self._num_drawn = 0
        self._positions = self._lengths
        self._prompt_of_row = torch.arange(len(prompts), device=decoder.device)
        self.logits = decoder.logits(states[starts + self._lengths - 1])
        self._arrange()

    def select(self, rows: Tensor) -> None:
        """Keep these rows, in this order; a row may occur more than once."""
        self.logits = self.logits[rows]
        indices = self._of_heads(rows)
        self._own = [one.select(indices, self._num_drawn) for one in self._own]
        kept, self._prompt_of_row = torch.unique(self._prompt_of_row[rows], return_inverse=True)
        if len(kept) < len(self._lengths):
            self._lengths, self._padding = self._lengths[kept], self._padding[kept]
            longest = int(self._lengths.max())
            self._padding = self._padding[:, :longest]
            indices = self._of_heads(kept)
            self._prompts = [one.select(indices, longest) for one in self._prompts]
        self._arrange()

    def advance(self, tokens: Tensor) -> None:
        """Append one token to each row."""
        if self._num_drawn == self._own[0].keys.shape[2]:
            for own in self._own:
                own.grow(self._num_drawn)
        self._num_drawn += 1
        states = self._states(tokens, self._turns[self._positions])
        self._positions = self._positions + 1
        self.logits = self._decoder.logits(states)

    def _states(self, tokens: Tensor, turn: Tensor) -> Tensor:
        if self._step is None:
            return self._decoder.states(tokens, turn, self._attend)
        self._step.point_at(self._prompts, self._own)
        sizes = self._prompts[0].keys.shape[2], self._num_drawn, self._own[0].keys.shape[2]
        states = self._decoder.embedded(tokens)
        return self._step(states, turn, self._prompt_of_row, self._lengths, sizes)

    def _attend(self, number: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one token a row, to its prompt and to what the row has drawn."""
        prompts, own, end = self._prompts[number], self._own[number], self._num_drawn - 1
        own.keys[:, :, end].view_as(k).copy_(k)
        own.values[:, end].view_as(v).copy_(v)
        scale = self._decoder.layers[number].scaling
        if not kernels.serve(q, own.keys):
            return self._attend_by_products(q, prompts, own, scale).view(len(k), -1)
        attended = kernels.attend(
            q,
            scale,
            self._prompt_of_row,
            self._lengths,
            (prompts.keys, prompts.values),
            (own.keys, own.values),
            self._num_drawn,
        )
        return attended.flatten(1)

    def _attend_by_products(
        self, q: Tensor, prompts: _States, own: _States, scale: float
    ) -> Tensor:
        """The same; rows of a prompt share a product."""
        size, dim = self._num_drawn, q.shape[-1]
        num_rows, num_prompts, width = len(self._places), *prompts.values.shape[:2]
        q = q.reshape(num_rows, -1, dim)
        of_prompts = q.flatten(1).index_select(0, self._cells).view(num_prompts, -1, dim)
        unused = q.new_empty(1, 1, 1)
        seen = torch.baddbmm(unused, of_prompts, prompts.keys, beta=0, alpha=scale)
        scores = torch.baddbmm(unused, q, own.keys[:, :, :size], beta=0, alpha=scale)
        seen = (
            seen.view(len(self._cells), -1).index_select(0, self._places).view(num_rows, -1, width)
        )
        if self._hidden is not None:
            seen = seen.masked_fill(self._hidden, -torch.inf)
        found = torch.cat([seen, scores], dim=2).softmax(dim=-1, dtype=torch.float32)
        weights = found.to(prompts.values.dtype)
        mixed = torch.bmm(weights[..., width:], own.values[:, :size])
        of_prompts = (
            weights.flatten(1).index_select(0, self._cells).view(num_prompts, -1, width + size)
        )
        found = torch.bmm(of_prompts[..., :width], prompts.values)
        mixed += found.view(len(self._cells), -1).index_select(0, self._places).view_as(mixed)
        return mixed

    def _arrange(self) -> None:
        """Say where rows and prompts find each other.

        `_cells`, long [_P * _K * _S]: the row's head that stands in each place of a prompt's
        product (any where there is none); `_places`, long [_R * _K]: where a row's head stands.
        """
        num_rows, num_prompts = len(self._prompt_of_row), len(self._lengths)
        counts = torch.bincount(self._prompt_of_row, minlength=num_prompts)
        order = torch.argsort(self._prompt_of_row, stable=True)
        slots = torch.empty_like(order)
        slots[order] = torch.arange(num_rows, device=order.device) - (
            (counts.cumsum(0) - counts).repeat_interleave(counts)
        )
        size = int(counts.max())
        prompt_heads = self._of_heads(self._prompt_of_row)
        self._places = prompt_heads * size + slots.repeat_interleave(self._num_key_heads)
        self._cells = self._places.new_zeros(num_prompts * self._num_key_heads * size)
        self._cells[self._places] = torch.arange(len(self._places), device=order.device)
        self._positions = self._lengths[self._prompt_of_row] + self._num_drawn
        self._hidden: Tensor | None = None
        if bool(self._padding.any()):
            hidden = self._padding[self._prompt_of_row].repeat_interleave(self._num_key_heads, 0)
            self._hidden = hidden[:, None]

    def _of_heads(self, rows: Tensor) -> Tensor:
        """Indices of the key heads of rows."""
        heads = torch.arange(self._num_key_heads, device=rows.device)
        found: Tensor = (rows[:, None] * self._num_key_heads + heads).flatten()
        return found


@torch.inference_mode()
def computes_alike(model: PreTrainedModel) -> bool:
    """Whether a `FusedDecoder` of a model that `looks_fusable` computes what the model does.

    It is tried, in float32, on a few tokens.
    """
    embedding: Any = model.get_input_embeddings()
    vocab_size = len(embedding.weight)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (2, 6), generator=generator).tolist()
    prompts, drawn = [ids[0][:4], ids[1][:2]], torch.tensor([[*ids[0][4:]], [*ids[1][2:4]]])
    decoder = FusedDecoder(model, torch.float32)
    if 2 * decoder.turns(1).shape[1] != decoder.layers[0].dim:
        return False  # a part of each head alone rotates
    context = FusedContext(decoder, prompts, 2)
    found = [context.logits]
    for tokens in drawn.T:
        context.advance(tokens)
        found.append(context.logits)
    for row, prompt in enumerate(prompts):
        whole = torch.tensor([[*prompt, *drawn[row].tolist()]])
        expected: Tensor = model(input_ids=whole).logits[0, len(prompt) - 1 :]
        own = torch.stack([logits[row] for logits in found])
        if not bool((own - expected).abs().amax() <= _TOLERANCE * expected.abs().amax()):
            return False
    return True
