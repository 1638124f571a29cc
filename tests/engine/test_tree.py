"""The prefix tree spells every sequence, holds shared runs once, and never merges images."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arr_fast.engine.planner import (
    ImageTable,
    Path,
    build_paths,
    cut_item,
    estimate_rows,
    token_batches,
)
from arr_fast.engine.tree import PrefixTree, TokenSequence, build_tree
from arr_fast.prompts import TokenRun
from tests.engine import scenes


def sequence(ids: list[int], positions: list[int] | None = None) -> TokenSequence:
    array = np.asarray(ids, dtype=np.int64)
    where = np.arange(len(ids)) if positions is None else np.asarray(positions)
    return TokenSequence(array, array.copy(), where[None].astype(np.int64))


def spelled(tree: PrefixTree, end: int) -> list[int]:
    """Token ids on the path from the root to a segment."""
    pieces: list[list[int]] = []
    while end >= 0:
        segment = tree.segments[end]
        tokens = tree.sequences[segment.sequence].ids[segment.begin : segment.end]
        pieces.append(tokens.tolist())
        end = segment.parent
    return [token for piece in reversed(pieces) for token in piece]


def distinct_prefixes(sequences: list[list[int]]) -> int:
    """Nodes of the plain trie: the fewest tokens any tree can compute."""
    return len({tuple(s[: n + 1]) for s in sequences for n in range(len(s))})


families = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=10)


@settings(max_examples=300, deadline=None)
@given(families, st.integers(1, 6))
def test_paths_spell_their_sequences(ids: list[list[int]], min_shared: int) -> None:
    tree = build_tree([sequence(s) for s in ids], min_shared)
    for number, tokens in enumerate(ids):
        assert spelled(tree, tree.ends[number]) == tokens
    for index, segment in enumerate(tree.segments):
        assert segment.parent < index
        assert (segment.parent < 0) == (index in tree.roots)
        for child in segment.children:
            assert tree.segments[child].begin == segment.end
    assert distinct_prefixes(ids) <= tree.tokens <= sum(map(len, ids))


@settings(max_examples=200, deadline=None)
@given(families)
def test_with_min_shared_one_the_tree_is_the_trie(ids: list[list[int]]) -> None:
    tree = build_tree([sequence(s) for s in ids], min_shared=1)
    assert tree.tokens == distinct_prefixes(ids)


def test_short_shared_runs_are_copied_and_long_ones_kept() -> None:
    stem = list(range(100, 130))
    longer = [*stem, *range(50, 70)]
    ids = [[*stem, 1, 2, 3, 10 + i] for i in range(3)] + [[*longer, 7], [*longer, 8]]
    tree = build_tree([sequence(s) for s in ids], min_shared=16)
    root = tree.segments[tree.roots[0]]
    lengths = sorted(len(tree.segments[c]) for c in root.children)
    # Three leaves keep their own copy of [1, 2, 3]; the run of 20 is shared by two leaves.
    assert (len(root), lengths) == (30, [4, 4, 4, 20])


def test_positions_take_part_in_the_comparison() -> None:
    a, b = sequence([5, 6, 7], [0, 1, 2]), sequence([5, 6, 7], [0, 1, 5])
    tree = build_tree([a, b], min_shared=1)
    assert tree.tokens == 4


def test_equal_sequences_share_their_leaf_and_an_empty_one_is_refused() -> None:
    tree = build_tree([sequence([1, 2]), sequence([1, 2])])
    assert tree.ends[0] == tree.ends[1]
    with pytest.raises(ValueError, match="sequence 1 is empty"):
        build_tree([sequence([1]), sequence([])])


def test_images_of_equal_size_are_told_apart() -> None:
    images = [scenes.image(32, 32, 1), scenes.image(32, 32, 2)]
    runs = [TokenRun(np.arange(20)), TokenRun(np.full(8, 99), 0), TokenRun(np.full(8, 99), 1)]
    positions = np.arange(36)[None]
    table = ImageTable()
    ab = build_paths(runs, [np.array([1])], positions, images, table)[0]
    ba = build_paths(runs, [np.array([1])], positions, images[::-1], table)[0]
    assert (ab.sequence.ids == ba.sequence.ids).all()
    tree = build_tree([ab.sequence, ba.sequence])
    assert len(tree.segments[tree.roots[0]]) == 20
    assert tree.tokens == 20 + 2 * 17
    same = build_tree([ab.sequence, ab.sequence])
    assert same.tokens == 37


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 60))
def test_batches_keep_order_and_budget(rows: list[int], budget: int) -> None:
    batches = list(token_batches(rows, budget))
    assert [n for batch in batches for n in batch] == list(range(len(rows)))
    for batch in batches:
        assert len(batch) == 1 or sum(rows[n] for n in batch) <= budget


def test_the_row_estimate_is_an_upper_bound() -> None:
    images = [scenes.image(32, 32, 1), scenes.image(32, 32, 2)]
    runs = [TokenRun(np.arange(20)), TokenRun(np.full(8, 99), 0), TokenRun(np.full(8, 99), 1)]
    tails = [np.arange(n) + 200 for n in (3, 5, 20)]
    table = ImageTable()
    paths = build_paths(runs, tails, np.arange(36)[None], images, table)
    paths += build_paths(runs, tails, np.arange(36)[None], images[::-1], table)
    tree = build_tree([p.sequence for p in paths])
    assert tree.tokens <= estimate_rows(paths) == 2 * 36 + 2 * 28


def group_paths(size: int, tails: int) -> list[Path]:
    """All ordered pairs of `size` images by first image; 100 image rows each, tails of 10 rows."""
    images = [scenes.image(32, 32, n) for n in range(size)]
    runs = [TokenRun(np.arange(4)), TokenRun(np.full(100, 99), 0), TokenRun(np.full(100, 99), 1)]
    endings = [np.arange(10) + 200 + 10 * n for n in range(tails)]
    table = ImageTable()
    positions = np.arange(204)[None]
    pairs = permutations(range(size), 2)
    return [
        path
        for i, j in pairs
        for path in build_paths(runs, endings, positions, [images[i], images[j]], table)
    ]


def test_the_row_estimate_counts_a_shared_first_image_once() -> None:
    paths = group_paths(size=3, tails=5)
    tree = build_tree([p.sequence for p in paths])
    assert tree.tokens <= estimate_rows(paths) == 3 * 104 + 6 * (100 + 5 * 10)


def test_a_group_is_cut_between_first_images() -> None:
    paths = group_paths(size=4, tails=3)
    units = cut_item(7, paths, budget=10_000, piece=500)
    assert [unit.paths for unit in units] == [range(n, n + 9) for n in (0, 9, 18, 27)]
    assert [unit.rows for unit in units] == [104 + 3 * (100 + 30)] * 4
    assert [unit.is_last for unit in units] == [False, False, False, True]
    assert {unit.item for unit in units} == {7}
    assert len(cut_item(0, paths, budget=10_000, piece=10_000)) == 1


def test_what_shares_its_images_is_cut_by_the_budget_alone() -> None:
    paths = group_paths(size=2, tails=40)[:40]
    assert len(cut_item(0, paths, budget=10_000, piece=1)) == 1
    units = cut_item(0, paths, budget=304, piece=1)
    assert [len(unit.paths) for unit in units] == [10] * 4
    assert all(unit.rows == 304 for unit in units)
    alone = cut_item(0, paths, budget=10, piece=10)
    assert [unit.paths for unit in alone] == [range(n, n + 1) for n in range(40)]
    assert cut_item(0, [], budget=10, piece=10) == []
