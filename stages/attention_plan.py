"""In which order attention over a packed row is worked through; the same for every layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from stages.packing import Block, Layout

# Queries that go through at once: keys behind the last of them are never touched.
_CHUNK = 64
# Scores held at once. More than fits the processor's cache costs time, and fewer too.
_TILE = 2**20


@dataclass(frozen=True)
class Tile:
    """Queries of some rows of a part, and all that they see: `_R` products of `_M` queries by `_S`
    keys, one for each row and key head.

    `_M` is the chunk times the heads of a key head; `_S` are the prefix and the row's own tokens up
    to the chunk's last.
    """

    rows: slice
    queries: slice
    num_seen: int
    chunk: int

    def of(self, states: Tensor) -> Tensor:
        """[_R, _M, dim] of what lies in the order of the tiles, [all queries, dim]."""
        return states[self.queries].view(self.rows.stop - self.rows.start, -1, states.shape[-1])

    def columns(self, states: Tensor) -> Tensor:
        """[_R, _S, dim] of a part's keys or values."""
        return states[self.rows, : self.num_seen]

    def seen(self, states: Tensor) -> Tensor:
        """`columns` in one piece: torch's batched product copies others, transposed ones slowly."""
        return self.columns(states).contiguous()


@dataclass(frozen=True)
class Part:
    """What a block attends to: `_N` rows of `_W` keys, the prefix first, for each of `_K` heads.

    keys, long [_N * _K * _W]: which key head of which token, both counted through. prefixes, long
    [_N]: which of the block's prefixes, of num_prefix tokens, a row has; None where there is none.
    hidden, bool [_N * _K, 1, num_prefix]: where a short prefix is filled up.
    """

    keys: Tensor
    shape: tuple[int, int, int]
    prefixes: Tensor | None
    num_prefix: int
    hidden: Tensor | None
    tiles: tuple[Tile, ...]

    def gathered(self, states: Tensor) -> Tensor:
        """[_N * _K, _W, dim] out of keys or values [_T, _K, dim]."""
        num_rows, key_heads, width = self.shape
        return picked(states, self.keys).view(num_rows * key_heads, width, -1)

    def of_prefixes(self, sums: Tensor) -> Tensor:
        """Over the rows of each prefix: [prefixes * _K * num_prefix, dim]."""
        assert self.prefixes is not None
        dim = sums.shape[-1]
        of_rows = sums.view(*self.shape, dim)[:, :, : self.num_prefix]
        total = sums.new_zeros(int(self.prefixes.max()) + 1, *of_rows.shape[1:])
        return total.index_add_(0, self.prefixes, of_rows).view(-1, dim)


@dataclass(frozen=True)
class Plan:
    """Tiles, and where their queries come from and go to.

    queries, long [all queries]: which head of which token, both counted through; the tiles' one
    after the other. filled, long: those of them that fill up a short row. restore, long
    [_T * heads], restore_keys and restore_prefixes, long [_T * _K]: where the heads of each token
    stand among the queries, the parts' keys, and the prefixes' (one past their end if in none;
    None where there are no prefixes). Tokens that fill up the packed row stand at 0.
    """

    queries: Tensor
    filled: Tensor | None
    restore: Tensor
    restore_keys: Tensor
    restore_prefixes: Tensor | None
    parts: tuple[Part, ...]
    chunk: int
    """Most of a tile."""
    num_filling: int


def picked(states: Tensor, index: Tensor) -> Tensor:
    """Rows [len(index), dim] out of [_T, heads, dim], whose heads are counted through."""
    return states.reshape(-1, states.shape[-1]).index_select(0, index)


def plan_of(layout: Layout, heads: int, key_heads: int) -> Plan:
    """Made for the first layer, and kept with the layout for the others."""
    found: Plan | None = layout.plans.get((heads, key_heads))
    if found is None:
        found = layout.plans[heads, key_heads] = _plan(layout, heads, key_heads)
    return found


def _plan(layout: Layout, heads: int, key_heads: int) -> Plan:
    rows = [_Rows.of(block) for block in layout.blocks]
    parts: list[Part] = []
    queries: list[Tensor] = []
    padding: list[Tensor] = []
    num_queries = 0
    for block, some in zip(layout.blocks, rows, strict=True):
        tokens, filled = _of_heads(some.tokens, heads), some.padding.unsqueeze(1)
        pieces = list(some.pieces(heads))
        for chosen, columns in pieces:
            queries.append(tokens[chosen, :, columns].flatten())
            padding.append(filled[chosen, :, columns].expand(-1, heads, -1).flatten())
        tiles = tuple(_tiles(pieces, some.num_prefix, heads, key_heads, num_queries))
        num_queries = tiles[-1].queries.stop
        parts.append(_part(block, some, key_heads, tiles))
    order, is_filled = torch.cat(queries), torch.cat(padding)
    filled = is_filled.nonzero().flatten()
    num_tokens = len(layout.restore)
    return Plan(
        order,
        filled if len(filled) else None,
        _places(order, ~is_filled, num_tokens * heads, 0),
        _places_of_keys(rows, parts, num_tokens * key_heads),
        _places_of_prefixes(layout.blocks, num_tokens, key_heads),
        tuple(parts),
        max(tile.chunk for part in parts for tile in part.tiles),
        layout.num_filling,
    )


@dataclass(frozen=True)
class _Rows:
    """Rows of a block, the longest first: tokens long [_N, _L], padding bool [_N, _L], and how many
    tokens of each are real. order, long [_N], says which rows of the block they are."""

    tokens: Tensor
    padding: Tensor
    order: Tensor
    lengths: list[int]
    num_prefix: int

    @classmethod
    def of(cls, block: Block) -> _Rows:
        padding = _padding(block.tokens, block.padding)
        lengths, order = (~padding).sum(1).sort(descending=True, stable=True)
        num_prefix = 0 if block.prefix is None else block.prefix.shape[1]
        return cls(block.tokens[order], padding[order], order, lengths.tolist(), num_prefix)

    def pieces(self, heads: int) -> Iterator[tuple[slice, slice]]:
        """Rows and columns of at most `_TILE` scores, unless one chunk of one row has more.

        A row that has no token in a chunk is not among them.
        """
        num_rows = len(self.lengths)
        for start in range(0, self.lengths[0], _CHUNK):
            stop = min(start + _CHUNK, self.lengths[0])
            while self.lengths[num_rows - 1] <= start:
                num_rows -= 1
            step = max(_TILE // (heads * (stop - start) * (self.num_prefix + stop)), 1)
            for first in range(0, num_rows, step):
                yield slice(first, min(first + step, num_rows)), slice(start, stop)


def _tiles(
    pieces: Sequence[tuple[slice, slice]],
    num_prefix: int,
    heads: int,
    key_heads: int,
    first_query: int,
) -> Iterator[Tile]:
    for rows, columns in pieces:
        chunk = columns.stop - columns.start
        last = first_query + (rows.stop - rows.start) * heads * chunk
        yield Tile(
            slice(rows.start * key_heads, rows.stop * key_heads),
            slice(first_query, last),
            num_prefix + columns.stop,
            chunk,
        )
        first_query = last


def _part(block: Block, rows: _Rows, key_heads: int, tiles: tuple[Tile, ...]) -> Part:
    tokens, prefixes, hidden = rows.tokens, None, None
    if block.prefix is not None:
        prefixes = rows.order // (len(rows.order) // len(block.prefix))
        tokens = torch.cat([block.prefix[prefixes], tokens], dim=1)
        if block.prefix_padding is not None:
            padding = block.prefix_padding[prefixes]
            hidden = padding.repeat_interleave(key_heads, dim=0).unsqueeze(1)
    keys = _of_heads(tokens, key_heads)
    num_rows, _, width = keys.shape
    shape = (num_rows, key_heads, width)
    return Part(keys.flatten(), shape, prefixes, rows.num_prefix, hidden, tiles)


def _of_heads(tokens: Tensor, heads: int) -> Tensor:
    """Heads of tokens [rows, columns], counted through: [rows, heads, columns]."""
    return tokens.unsqueeze(1) * heads + torch.arange(heads, device=tokens.device).unsqueeze(1)


def _padding(tokens: Tensor, padding: Tensor | None) -> Tensor:
    return torch.zeros_like(tokens, dtype=torch.bool) if padding is None else padding


def _places_of_keys(rows: Sequence[_Rows], parts: Sequence[Part], size: int) -> Tensor:
    """Of each token's key heads among all parts' keys, where it is not in a prefix."""
    counted: list[Tensor] = []
    for some, part in zip(rows, parts, strict=True):
        own = functional.pad(~some.padding, (part.num_prefix, 0))
        counted.append(own.unsqueeze(1).expand(-1, part.shape[1], -1).flatten())
    return _places(torch.cat([part.keys for part in parts]), torch.cat(counted), size, 0)


def _places_of_prefixes(blocks: Sequence[Block], num_tokens: int, key_heads: int) -> Tensor | None:
    """Of each token's key heads among the prefixes of all blocks, one past their end if in none."""
    index: list[Tensor] = []
    counted: list[Tensor] = []
    for block in blocks:
        if block.prefix is not None:
            index.append(_of_heads(block.prefix, key_heads).flatten())
            real = ~_padding(block.prefix, block.prefix_padding)
            counted.append(real.unsqueeze(1).expand(-1, key_heads, -1).flatten())
    if not index:
        return None
    places = torch.cat(index)
    return _places(places, torch.cat(counted), num_tokens * key_heads, len(places))


def _places(index: Tensor, counted: Tensor, size: int, missing: int) -> Tensor:
    """Where in index each of `size` numbers stands, where it is counted; missing if nowhere."""
    found = torch.full((size,), missing, dtype=torch.long, device=index.device)
    found[index[counted]] = counted.nonzero().flatten()
    return found
