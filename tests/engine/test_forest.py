"""A packed forest says exactly what each row may see, in every one of its tables."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arr_fast.engine.forest import PackedForest, PoolRun, bucket_rows, pack_forest
from arr_fast.engine.tree import PrefixTree, build_tree
from tests.engine.test_tree import sequence

sequences = st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=14), min_size=1, max_size=8)


def visible_tokens(forest: PackedForest, row: int, runs: np.ndarray, span: slice) -> list[int]:
    """Rows that a row sees through some runs, in order."""
    seen: list[int] = []
    for source, first, length in runs[span].tolist():
        assert source == 0
        seen += range(first, first + length)
    return seen


@settings(max_examples=300, deadline=None)
@given(sequences, st.integers(1, 4), st.integers(1, 5))
def test_each_row_sees_its_path(ids: list[list[int]], min_shared: int, rows: int) -> None:
    tree = build_tree([sequence(s) for s in ids], min_shared)
    forest = pack_forest(tree)
    assert forest.rows == tree.tokens
    mask = forest.dense_mask().numpy()
    for number, tokens in enumerate(ids):
        row = int(forest.read_rows[number])
        path = np.flatnonzero(mask[row])
        order = np.argsort(forest.row_depth[path])
        assert forest.ids[path][order].tolist() == tokens
    covered = np.zeros(forest.rows, dtype=int)
    for first, count, begin, end, with_own, slot in forest.tiles(rows).tolist():
        assert count <= rows and with_own == 1 and slot == -1
        covered[first : first + count] += 1
        for row in range(first, first + count):
            seen = visible_tokens(forest, row, forest.runs, slice(begin, end))
            seen += range(int(forest.own_start[row]), row + 1)
            assert sorted(seen) == np.flatnonzero(mask[row]).tolist()
    assert (covered == 1).all()


@settings(max_examples=200, deadline=None)
@given(sequences, st.integers(1, 3), st.integers(1, 4), st.integers(1, 6))
def test_split_tiles_partition_the_ancestors(
    ids: list[list[int]], min_shared: int, rows: int, split: int
) -> None:
    forest = pack_forest(build_tree([sequence(s) for s in ids], min_shared))
    runs, tiles = forest.split_tiles(rows, split)
    seen: dict[int, list[int]] = {}
    own: dict[int, int] = {}
    slots = [slot for *_, slot in tiles.tolist() if slot >= 0]
    assert slots == list(range(len(slots)))
    for first, count, begin, end, with_own, _ in tiles.tolist():
        assert runs[begin:end, 2].sum() <= split
        for row in range(first, first + count):
            piece = visible_tokens(forest, row, runs, slice(begin, end))
            seen.setdefault(row, []).extend(piece)
            own[row] = own.get(row, 0) + with_own
    assert set(own.values()) == {1}
    mask = forest.dense_mask().numpy()
    for row, ancestors in seen.items():
        expected = np.flatnonzero(mask[row])
        expected = expected[(expected < forest.own_start[row]) | (expected > row)]
        assert sorted(ancestors) == expected.tolist()


def two_leaf_tree() -> PrefixTree:
    stem = list(range(40))
    return build_tree([sequence([*stem, 100, 101]), sequence([*stem, 200])])


def test_read_tiles_cover_the_read_rows() -> None:
    forest = pack_forest(two_leaf_tree())
    tiles = forest.read_tiles(forest.read_rows)
    assert tiles[:, 0].tolist() == forest.read_rows.tolist() == [41, 42]
    assert [forest.runs[a:b].tolist() for _, _, a, b, _, _ in tiles.tolist()] == [[[0, 0, 40]]] * 2


def test_cached_tokens_become_pool_runs() -> None:
    tree = two_leaf_tree()
    root = tree.roots[0]
    forest = pack_forest(tree, {root: [PoolRun(64, 16), PoolRun(16, 16)]})
    assert forest.rows == 8 + 2 + 1
    assert forest.ids[:8].tolist() == list(range(32, 40))
    leaf = next(g for g in forest.groups if g[0] == 8)
    assert forest.runs[leaf[2] : leaf[3]].tolist() == [[1, 64, 16], [1, 16, 16], [0, 0, 8]]
    with pytest.raises(ValueError, match="no square mask"):
        forest.dense_mask()


def test_impossible_caches_are_refused() -> None:
    tree = two_leaf_tree()
    with pytest.raises(ValueError, match="48 cached rows for its 40 tokens"):
        pack_forest(tree, {tree.roots[0]: [PoolRun(0, 48)]})
    with pytest.raises(ValueError, match="last token is cached"):
        pack_forest(tree, {tree.ends[0]: [PoolRun(0, 2)]})


@given(st.integers(1, 100_000))
def test_buckets_pad_at_most_five_percent(rows: int) -> None:
    padded = bucket_rows(rows)
    assert rows <= padded <= max(rows * 1.05, rows + 7)
    assert bucket_rows(padded) == padded
