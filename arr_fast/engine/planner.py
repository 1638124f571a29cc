"""From conversations to forests: sequences, token budgets, cached prefixes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import numpy as np

from arr_fast.engine.cache import BLOCK, PrefixPool, chain_keys
from arr_fast.engine.families import ImageFeatures
from arr_fast.engine.forest import PackedForest, PoolRun, pack_forest
from arr_fast.engine.runner import StorePlan
from arr_fast.engine.tree import MIN_SHARED, PrefixTree, TokenSequence, build_tree
from arr_fast.images import CanonicalImage
from arr_fast.prompts import TokenRun

PrefixCacheMode = Literal["off", "text", "images"]
# Feature numbers take the low bits of an image key.
_FEATURE_BITS = 24


@dataclass(frozen=True, slots=True)
class Path:
    """One conversation: the sequence, and where its images lie in it.

    Attributes:
        sequence: Ids, keys and positions.
        images: The images in order of appearance.
        spans: (first row, features) of each image.
        shared: Rows before this index are common to the item's leaves.
    """

    sequence: TokenSequence
    images: tuple[CanonicalImage, ...]
    spans: tuple[tuple[int, int], ...]
    shared: int


class ImageTable:
    """Numbers the images of one call by content, so that equal images share their segments."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.images: list[CanonicalImage] = []

    def number(self, image: CanonicalImage) -> int:
        """The image's number; equal content has one number."""
        number = self.numbers.setdefault(image.content_hash, len(self.images))
        if number == len(self.images):
            self.images.append(image)
        return number


def build_paths(
    runs: Sequence[TokenRun],
    tails: Sequence[np.ndarray],
    positions: np.ndarray,
    images: Sequence[CanonicalImage],
    table: ImageTable,
) -> list[Path]:
    """Conversations that share `runs` and differ in their tails.

    Args:
        runs: Shared runs; `TokenRun.image` indexes `images`.
        tails: Ids after the shared runs, one array per conversation.
        positions: int64 [P, T] of the shared runs.
        images: The item's images.
        table: Numbers images across the call.
    """
    ids = np.concatenate([run.ids for run in runs])
    keys, spans, shown = ids.copy(), [], []
    row = 0
    for run in runs:
        if run.image >= 0:
            number = table.number(images[run.image])
            keys[row : row + len(run.ids)] = -1 - (
                (number << _FEATURE_BITS) + np.arange(len(run.ids))
            )
            spans.append((row, len(run.ids)))
            shown.append(images[run.image])
        row += len(run.ids)
    # Text after any prefix continues one past its largest position, on every axis.
    start = int(positions.max()) + 1
    paths = []
    for tail in tails:
        after = np.broadcast_to(np.arange(start, start + len(tail)), (len(positions), len(tail)))
        sequence = TokenSequence(
            ids=np.concatenate([ids, tail]),
            keys=np.concatenate([keys, tail]),
            positions=np.concatenate([positions, after], axis=1),
        )
        paths.append(Path(sequence, tuple(shown), tuple(spans), len(ids)))
    return paths


class RowCounter:
    """An upper bound on the rows of an item's paths: each shared part once, and every tail.

    Paths of one item share their text, so what precedes the end of an image is known by the images
    up to there.
    """

    def __init__(self) -> None:
        self.rows = 0
        self._seen: dict[tuple[str, ...], int] = {}

    def add(self, path: Path) -> None:
        """Counts a path."""
        hashes = tuple(image.content_hash for image in path.images)
        # The text after the last image has a key of its own.
        keys = [*(hashes[: number + 1] for number in range(len(hashes))), (*hashes, "")]
        ends = [0, *(row + count for row, count in path.spans), path.shared]
        for key, (begin, end) in zip(keys, pairwise(ends), strict=True):
            known = self._seen.get(key, 0)
            if end - begin > known:
                self._seen[key] = end - begin
                self.rows += end - begin - known
        self.rows += len(path.sequence) - path.shared


def estimate_rows(paths: Sequence[Path]) -> int:
    """An upper bound on the rows of an item; see `RowCounter`."""
    counter = RowCounter()
    for path in paths:
        counter.add(path)
    return counter.rows


def token_batches(rows: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Fills batches of item numbers to a budget of rows, in order; one item may exceed it."""
    batch: list[int] = []
    used = 0
    for number, count in enumerate(rows):
        if batch and used + count > budget:
            yield batch
            batch, used = [], 0
        batch.append(number)
        used += count
    if batch:
        yield batch


@dataclass(frozen=True, slots=True)
class WorkUnit:
    """Neighbouring paths of one item that one forward can hold."""

    item: int
    paths: range
    rows: int
    is_last: bool


def cut_item(item: int, paths: Sequence[Path], budget: int, piece: int) -> list[WorkUnit]:
    """Cuts an item into units that each fit a budget; neighbours share most, so order is kept.

    Args:
        item: Its number.
        paths: Its conversations.
        budget: Rows that one forward may hold; a single path may exceed it.
        piece: Rows from which on the item is also cut between paths that share hardly anything
            (pairs of a group with different first images), which costs nothing.
    """
    units: list[WorkUnit] = []
    begin, counter = 0, RowCounter()
    for number, path in enumerate(paths):
        before = counter.rows
        counter.add(path)
        is_over = counter.rows > budget or (
            counter.rows > piece and _is_cheap(paths[number - 1], path, before)
        )
        if number > begin and is_over:
            units.append(WorkUnit(item, range(begin, number), before, False))
            begin, counter = number, RowCounter()
            counter.add(path)
    if paths:
        units.append(WorkUnit(item, range(begin, len(paths)), counter.rows, True))
    return units


def _is_cheap(last: Path, path: Path, rows: int) -> bool:
    """Whether a forward of `rows` rows may end between two paths: they share under a twentieth."""
    shared = min(len(last.sequence), len(path.sequence))
    differ = last.sequence.keys[:shared] != path.sequence.keys[:shared]
    return bool(differ.any()) and int(differ.argmax()) * 20 <= rows


@dataclass(frozen=True)
class ForestPlan:
    """Everything the runner needs for one forward.

    Attributes:
        tree: The prefix tree.
        forest: Its rows.
        features: The images that appear in computed rows.
        spans: (first row, first feature, length) of each stretch of image rows; features are
            numbered through all of `features`.
        store: Rows to keep.
        reserved: Pool keys that this forward will write.
    """

    tree: PrefixTree
    forest: PackedForest
    features: list[ImageFeatures]
    spans: tuple[tuple[int, int, int], ...]
    store: StorePlan
    reserved: tuple[bytes, ...]


def plan_forest(
    paths: Sequence[Path],
    table: ImageTable,
    features: dict[str, ImageFeatures],
    pool: PrefixPool,
    mode: PrefixCacheMode,
    salt: bytes,
    min_shared: int = MIN_SHARED,
) -> ForestPlan:
    """Builds tree, rows and tables of one forward.

    Args:
        paths: The conversations.
        table: The call's image numbers.
        features: Content hash -> features.
        pool: The prefix pool.
        mode: What may be cached: nothing, text before the first image, or all shared segments.
        salt: Weights epoch and processor settings, for the pool's keys.
        min_shared: See `build_tree`.
    """
    tree = build_tree([path.sequence for path in paths], min_shared)
    chains = _chains(tree, paths, mode, salt) if mode != "off" and pool.blocks else {}
    cached = {}
    for index, chain in chains.items():
        segment = tree.segments[index]
        runs = _span_of(pool.lookup(chain), segment.begin, segment.end)
        if runs:
            cached[index] = runs
    forest = pack_forest(tree, cached)
    rows, slots, reserved = _store(tree, forest, chains, pool)
    shown, spans = _feature_spans(forest, table, features)
    return ForestPlan(tree, forest, shown, spans, StorePlan(rows, slots), reserved)


def _chains(
    tree: PrefixTree, paths: Sequence[Path], mode: PrefixCacheMode, salt: bytes
) -> dict[int, list[bytes]]:
    """Segment -> keys of the whole cacheable blocks on its path, for segments that hold some."""
    chains = {}
    for index, segment in enumerate(tree.segments):
        path = paths[segment.sequence]
        limit = path.spans[0][0] if mode == "text" and path.spans else path.shared
        # The last token of a path is read, so it is never only cached.
        limit = min(limit, segment.end, len(path.sequence) - 1)
        if limit <= segment.begin or limit < BLOCK:
            continue
        images = [
            (row, bytes.fromhex(image.content_hash))
            for (row, _), image in zip(path.spans, path.images, strict=True)
            if row < limit
        ]
        ids, positions = path.sequence.ids[:limit], path.sequence.positions[:, :limit]
        chains[index] = chain_keys(ids, positions, salt, images)
    return chains


def _span_of(runs: Sequence[PoolRun], begin: int, end: int) -> list[PoolRun]:
    """The pool rows of depths [begin, end) from runs that lead the path from depth 0."""
    span = []
    depth = 0
    for run in runs:
        first, stop = max(begin, depth), min(end, depth + run.length)
        if first < stop:
            span.append(PoolRun(run.first + first - depth, stop - first))
        depth += run.length
    return span


def _store(
    tree: PrefixTree, forest: PackedForest, chains: dict[int, list[bytes]], pool: PrefixPool
) -> tuple[np.ndarray, np.ndarray, tuple[bytes, ...]]:
    """Reserves pool rows for whole blocks that this forward computes."""
    rows: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    reserved: list[bytes] = []
    first_row: dict[int, int] = {}
    for row, segment in enumerate(forest.row_segment.tolist()):
        first_row.setdefault(segment, row)
    for index, chain in chains.items():
        depth_rows = _path_rows(tree, forest, first_row, index)
        for block, key in enumerate(chain):
            span = depth_rows[block * BLOCK : (block + 1) * BLOCK]
            if (span < 0).any():
                continue
            slot = pool.reserve(key)
            if slot is None:
                continue
            reserved.append(key)
            rows.append(span)
            slots.append(np.arange(slot, slot + BLOCK))
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *rows]), np.concatenate([empty, *slots]), tuple(reserved)


def _path_rows(
    tree: PrefixTree, forest: PackedForest, first_row: dict[int, int], index: int
) -> np.ndarray:
    """int64 [depth], the forest row of each token on a segment's path; -1 where it is cached."""
    rows = np.full(tree.segments[index].end, -1, dtype=np.int64)
    while index >= 0:
        segment = tree.segments[index]
        first = first_row.get(index)
        if first is not None:
            depth = int(forest.row_depth[first])
            rows[depth : segment.end] = np.arange(first, first + segment.end - depth)
        index = segment.parent
    return rows


def _feature_spans(
    forest: PackedForest, table: ImageTable, features: dict[str, ImageFeatures]
) -> tuple[list[ImageFeatures], tuple[tuple[int, int, int], ...]]:
    """Which features the computed rows hold, over the images that they show."""
    rows = np.flatnonzero(forest.keys < 0)
    if not len(rows):
        return [], ()
    packed = -1 - forest.keys[rows]
    numbers = packed >> _FEATURE_BITS
    shown = np.unique(numbers)
    chosen = [features[table.images[number].content_hash] for number in shown.tolist()]
    starts = np.cumsum([0, *(f.count for f in chosen)])
    source = starts[np.searchsorted(shown, numbers)] + (packed & ((1 << _FEATURE_BITS) - 1))
    breaks = np.flatnonzero((np.diff(rows) != 1) | (np.diff(source) != 1)) + 1
    edges = [0, *breaks.tolist(), len(rows)]
    spans = [(int(rows[a]), int(source[a]), b - a) for a, b in pairwise(edges)]
    return chosen, tuple(spans)
