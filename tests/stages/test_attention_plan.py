"""The order in which attention is worked through: what stands where, and how much at once."""

from __future__ import annotations

import pytest
import torch

from stages import attention_plan
from stages.attention_plan import plan_of
from stages.packing import pack

CPU = torch.device("cpu")


def test_heads_of_tokens_stand_in_the_order_of_the_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_plan, "_CHUNK", 2)
    # Tokens 0 to 2 are the prompt, 3 is its first completion, 4 to 6 are its second.
    batch = pack([[7, 8, 9]] * 2, [[3], [1, 2, 3]], device=CPU)
    plan = plan_of(batch.layout, heads=2, key_heads=1)
    trunk, branches = plan.parts
    # Head 0 of token 1 is number 2. The longer completion comes first, the shorter one is filled
    # up with its own token, and has none among the second queries.
    trunk_queries, pair, single = [0, 2, 1, 3, 4, 5], [8, 10, 9, 11, 6, 6, 7, 7], [12, 13]
    assert plan.queries.tolist() == trunk_queries + pair + single
    assert plan.filled is not None and plan.filled.tolist() == [11, 13]
    assert plan.restore.tolist() == [0, 2, 1, 3, 4, 5, 10, 12, 6, 8, 7, 9, 14, 15]
    assert [(tile.rows, tile.queries, tile.num_seen, tile.chunk) for tile in trunk.tiles] == [
        (slice(0, 1), slice(0, 4), 2, 2),
        (slice(0, 1), slice(4, 6), 3, 1),
    ]
    assert [(tile.rows, tile.queries, tile.num_seen, tile.chunk) for tile in branches.tiles] == [
        (slice(0, 2), slice(6, 14), 5, 2),
        (slice(0, 1), slice(14, 16), 6, 1),
    ]
    assert trunk.keys.tolist() == [0, 1, 2]
    assert branches.keys.tolist() == [0, 1, 2, 4, 5, 6, 0, 1, 2, 3, 3, 3]
    assert plan.restore_keys.tolist() == [0, 1, 2, 12, 6, 7, 8]
    assert plan.restore_prefixes is not None
    assert plan.restore_prefixes.tolist() == [0, 1, 2, 3, 3, 3, 3]
    assert plan_of(batch.layout, heads=2, key_heads=1) is plan


def test_branches_of_a_prefix_are_added_up() -> None:
    batch = pack([[7, 8]] * 2, [[1], [2]], device=CPU)
    _, branches = plan_of(batch.layout, heads=2, key_heads=2).parts
    # Two branches of two key heads of three keys, in one number each.
    sums = torch.arange(12.0).view(4, 3, 1)
    assert branches.of_prefixes(sums).flatten().tolist() == [0 + 6, 1 + 7, 3 + 9, 4 + 10]


def test_a_short_prefix_is_hidden_where_it_is_filled_up() -> None:
    batch = pack([[7] * 4] * 2 + [[8] * 3] * 2, [[1], [2], [3], [4]], device=CPU)
    _, branches = plan_of(batch.layout, heads=2, key_heads=2).parts
    assert branches.hidden is not None and branches.hidden.shape == (8, 1, 4)
    assert branches.hidden[:, 0].sum(1).tolist() == [0] * 4 + [1] * 4
    assert branches.hidden[4:, 0, 3].all()


@pytest.mark.parametrize("limit", [1, 400, 10**6])
def test_a_tile_has_no_more_scores_than_its_limit(
    limit: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_plan, "_CHUNK", 4)
    monkeypatch.setattr(attention_plan, "_TILE", limit)
    lengths = (11, 10, 9, 5, 2)
    batch = pack([[]] * 5, [[1] * length for length in lengths], device=CPU)
    plan = plan_of(batch.layout, heads=2, key_heads=1)
    tiles = [tile for part in plan.parts for tile in part.tiles]
    for tile in tiles:
        num_rows = tile.rows.stop - tile.rows.start
        num_scores = (tile.queries.stop - tile.queries.start) * tile.num_seen
        assert num_scores <= limit or num_rows == 1
    # One after the other, without a gap.
    assert [tile.queries.start for tile in tiles[1:]] == [tile.queries.stop for tile in tiles[:-1]]
    real = torch.ones(len(plan.queries), dtype=torch.bool)
    if plan.filled is not None:
        real[plan.filled] = False
    assert sorted(plan.queries[real].tolist()) == list(range(2 * sum(lengths)))
