"""Packed forests: a prefix tree laid out as rows of one ragged forward, with its tables.

Rows of a tree lie breadth-first, so siblings are contiguous. A segment whose keys and values are
cached has no rows; its descendants refer to the pool in their place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch

from arr_fast.engine.tree import PrefixTree

NEW, POOL = 0, 1


@dataclass(frozen=True, slots=True)
class PoolRun:
    """A stretch of cached rows."""

    first: int
    length: int


@dataclass(frozen=True)
class PackedForest:
    """Tables of one forward over a packed prefix tree.

    Attributes:
        ids: int64 [T] token ids.
        keys: int64 [T]; negative at image features (see `TokenSequence`).
        positions: int64 [P, T].
        own_start: int32 [T]; row i sees rows own_start[i]..i of its segment.
        runs: int32 [R, 3] (0 new | 1 pool, first row, length), ancestors from the root down.
        groups: (first row, end row, run_begin, run_end) of each maximal block of sibling rows with
            the same ancestors.
        read_rows: int64 [sequences], the row that holds each sequence's last token.
        row_depth: int64 [T], depth of each row on its path.
        row_segment: int64 [T], segment of each row.
    """

    ids: np.ndarray
    keys: np.ndarray
    positions: np.ndarray
    own_start: np.ndarray
    runs: np.ndarray
    groups: tuple[tuple[int, int, int, int], ...]
    read_rows: np.ndarray
    row_depth: np.ndarray
    row_segment: np.ndarray

    @property
    def rows(self) -> int:
        """Rows computed by the forward."""
        return len(self.ids)

    def tiles(self, rows_per_tile: int) -> np.ndarray:
        """Cuts the sibling groups into query tiles.

        Args:
            rows_per_tile: Most rows of a tile; the kernel's BLOCK_M // GQA group.

        Returns:
            int32 [N, 6]: (first row, rows, run_begin, run_end, with_own, split_slot = -1), longest
            first.

        Raises:
            ValueError: rows_per_tile under 1.
        """
        if rows_per_tile < 1:
            raise ValueError(f"rows_per_tile must be at least 1, got {rows_per_tile}")
        tiles = [
            (row, min(rows_per_tile, end - row), begin, stop, 1, -1)
            for first, end, begin, stop in self.groups
            for row in range(first, end, rows_per_tile)
        ]
        work = [self._path_length(t[2], t[3]) + t[1] for t in tiles]
        order = sorted(range(len(tiles)), key=lambda i: -work[i])
        return np.asarray([tiles[i] for i in order], dtype=np.int32).reshape(-1, 6)

    def split_tiles(self, rows_per_tile: int, split_tokens: int) -> tuple[np.ndarray, np.ndarray]:
        """Tiles whose ancestors are cut at fixed token counts, for forests with few tiles.

        Split points depend on the path alone, never on the batch, so results do not either.

        Args:
            rows_per_tile: As in `tiles`.
            split_tokens: Ancestor tokens per piece.

        Returns:
            (runs int32 [R', 3], tiles int32 [N', 6]); a tile cut into pieces appears once per
            piece, each with its own slot, and its last piece also handles the rows' own part.
        """
        if split_tokens < 1:
            raise ValueError(f"split_tokens must be at least 1, got {split_tokens}")
        runs: list[tuple[int, int, int]] = []
        spans: dict[tuple[int, int], list[tuple[int, int]]] = {}
        for begin, stop in sorted({(g[2], g[3]) for g in self.groups}):
            spans[begin, stop] = []
            for piece in _cut(self.runs[begin:stop].tolist(), split_tokens) or [[]]:
                spans[begin, stop].append((len(runs), len(runs) + len(piece)))
                runs += piece
        tiles: list[tuple[int, int, int, int, int, int]] = []
        slot = 0
        for first, rows, begin, stop, _, _ in self.tiles(rows_per_tile).tolist():
            pieces = spans[begin, stop]
            for number, (a, b) in enumerate(pieces):
                is_last = number == len(pieces) - 1
                tiles.append((first, rows, a, b, int(is_last), slot if len(pieces) > 1 else -1))
                slot += len(pieces) > 1
        return (
            np.asarray(runs, dtype=np.int32).reshape(-1, 3),
            np.asarray(tiles, dtype=np.int32).reshape(-1, 6),
        )

    def read_tiles(self, rows: np.ndarray) -> np.ndarray:
        """Tiles int32 [N, 6] that cover exactly some rows, one row each."""
        firsts = np.asarray([group[0] for group in self.groups])
        order = np.argsort(firsts)
        group_of = order[np.searchsorted(firsts[order], rows, side="right") - 1]
        spans = np.asarray([group[2:] for group in self.groups])[group_of]
        tiles = np.empty((len(rows), 6), dtype=np.int32)
        tiles[:, 0], tiles[:, 1] = rows, 1
        tiles[:, 2:4] = spans
        tiles[:, 4], tiles[:, 5] = 1, -1
        return tiles

    def longest_path(self) -> int:
        """Most ancestor tokens of any row."""
        return max(self._path_length(begin, stop) for _, _, begin, stop in self.groups)

    def _path_length(self, begin: int, stop: int) -> int:
        return int(self.runs[begin:stop, 2].sum())

    def dense_mask(self) -> torch.Tensor:
        """Bool [T, T], true where a row may look; only for forests without cached segments."""
        if (self.runs[:, 0] == POOL).any():
            raise ValueError("a forest with cached segments has no square mask")
        mask = torch.zeros(self.rows, self.rows, dtype=torch.bool)
        for first, end, begin, stop in self.groups:
            for _, start, length in self.runs[begin:stop].tolist():
                mask[first:end, start : start + length] = True
        index = torch.arange(self.rows)
        own = torch.from_numpy(self.own_start.astype(np.int64))
        mask |= (index[None, :] >= own[:, None]) & (index[None, :] <= index[:, None])
        return mask


def pack_forest(
    tree: PrefixTree, cached: Mapping[int, Sequence[PoolRun]] | None = None
) -> PackedForest:
    """Lays a tree out as rows.

    Args:
        tree: The tree.
        cached: Segment index -> pool runs that hold its leading tokens. The runs of a segment may
            cover it in part; the rest is computed.

    Returns:
        The packed forest.

    Raises:
        ValueError: Pool runs longer than their segment, or a read token that is cached.
    """
    cached = cached or {}
    covered = {s: sum(run.length for run in runs) for s, runs in cached.items()}
    for number, length in covered.items():
        if length > len(tree.segments[number]):
            raise ValueError(
                f"segment {number}: {length} cached rows for its "
                f"{len(tree.segments[number])} tokens"
            )
    layout = _Layout()
    level = list(tree.roots)
    paths: dict[int, tuple[tuple[int, int, int], ...]] = {-1: ()}
    row_of: dict[int, int] = {}
    for root in level:
        queue = [root]
        while queue:
            upcoming: list[int] = []
            for index in queue:
                segment = tree.segments[index]
                pool = tuple((POOL, run.first, run.length) for run in cached.get(index, ()))
                ancestors = paths[segment.parent] + pool
                count = len(segment) - covered.get(index, 0)
                first = layout.add(index, segment.end - count, count, ancestors)
                row_of[index] = first
                own = ((NEW, first, count),) if count else ()
                paths[index] = ancestors + own
                upcoming += segment.children
            queue = upcoming
    read_rows = []
    for number, segment_index in enumerate(tree.ends):
        segment = tree.segments[segment_index]
        count = len(segment) - covered.get(segment_index, 0)
        if count == 0:
            raise ValueError(f"sequence {number}: its last token is cached and cannot be read")
        read_rows.append(row_of[segment_index] + count - 1)
    return layout.finish(tree, np.asarray(read_rows, dtype=np.int64))


class _Layout:
    """Rows collected segment by segment; neighbours with the same ancestors form one group."""

    def __init__(self) -> None:
        self.rows = 0
        self.pieces: list[tuple[int, int, int, int]] = []
        self.runs: list[tuple[int, int, int]] = []
        self.groups: list[tuple[int, int, int, int]] = []
        self._last_path: tuple[tuple[int, int, int], ...] | None = None

    def add(
        self, segment: int, depth: int, count: int, path: tuple[tuple[int, int, int], ...]
    ) -> int:
        first = self.rows
        if not count:
            return first
        self.pieces.append((segment, depth, count, first))
        self.rows += count
        if self.groups and path == self._last_path:
            group = self.groups[-1]
            self.groups[-1] = (group[0], self.rows, group[2], group[3])
            return first
        begin = len(self.runs)
        self.runs += _joined(path)
        self.groups.append((first, self.rows, begin, len(self.runs)))
        self._last_path = path
        return first

    def finish(self, tree: PrefixTree, read_rows: np.ndarray) -> PackedForest:
        ids, keys, positions, own, depths, segments = [], [], [], [], [], []
        for index, depth, count, first in self.pieces:
            sequence = tree.sequences[tree.segments[index].sequence]
            span = slice(depth, depth + count)
            ids.append(sequence.ids[span])
            keys.append(sequence.keys[span])
            positions.append(sequence.positions[:, span])
            own.append(np.full(count, first, dtype=np.int32))
            depths.append(np.arange(depth, depth + count))
            segments.append(np.full(count, index))
        return PackedForest(
            ids=np.concatenate(ids),
            keys=np.concatenate(keys),
            positions=np.concatenate(positions, axis=1),
            own_start=np.concatenate(own),
            runs=np.asarray(self.runs, dtype=np.int32).reshape(-1, 3),
            groups=tuple(self.groups),
            read_rows=read_rows,
            row_depth=np.concatenate(depths),
            row_segment=np.concatenate(segments),
        )


def _joined(path: tuple[tuple[int, int, int], ...]) -> list[tuple[int, int, int]]:
    """Joins runs that continue each other in the same buffer."""
    joined: list[tuple[int, int, int]] = []
    for source, first, length in path:
        if joined and joined[-1][0] == source and sum(joined[-1][1:]) == first:
            joined[-1] = (source, joined[-1][1], joined[-1][2] + length)
        else:
            joined.append((source, first, length))
    return joined


def _cut(runs: list[list[int]], size: int) -> list[list[tuple[int, int, int]]]:
    """Cuts a path of runs into pieces of `size` tokens; the last may be shorter."""
    pieces: list[list[tuple[int, int, int]]] = []
    room = 0
    for source, first, length in runs:
        while length:
            if not room:
                pieces.append([])
                room = size
            taken = min(room, length)
            pieces[-1].append((source, first, taken))
            first, length, room = first + taken, length - taken, room - taken
    return pieces


@lru_cache(maxsize=512)
def bucket_rows(rows: int) -> int:
    """The padded row count: a multiple of 8 at most 5 % above `rows`, so that shapes are few."""
    step = 8
    while step * 2 * 20 <= rows:
        step *= 2
    return (rows + step - 1) // step * step
