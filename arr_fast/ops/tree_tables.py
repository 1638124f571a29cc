"""What the tables of prefix_attention must satisfy; broken ones read the wrong keys in silence."""

from __future__ import annotations

import numpy as np
from torch import Tensor


def check_tables(
    own_start: Tensor, runs: Tensor, tiles: Tensor, new_rows: int, pool_rows: int
) -> None:
    """Checks the values of a forest's tables, which must be on the CPU.

    Args:
        own_start: int32 [T].
        runs: int32 [R, 3].
        tiles: int32 [N, 6].
        new_rows: T.
        pool_rows: C.

    Raises:
        ValueError: Segments or tiles that overlap, or rows and runs that do not exist; the message
            names the table and the entry.
    """
    _check_segments(own_start.numpy())
    _check_runs(runs.numpy(), new_rows, pool_rows)
    _check_tiles(tiles.numpy(), own_start.numpy(), runs.numpy())


def _check_segments(start: np.ndarray) -> None:
    row = np.arange(len(start))
    if (bad := (start < 0) | (start > row)).any():
        i = int(bad.argmax())
        raise ValueError(f"own_start[{i}] is {start[i]}; it must be in 0 .. {i}")
    # Rows of a segment all name its first row, so that row names itself.
    bad = start[start] != start
    bad[1:] |= start[1:] < start[:-1]
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(f"own_start[{i}] is {start[i]}, inside another segment: segments overlap")


def _check_runs(runs: np.ndarray, new_rows: int, pool_rows: int) -> None:
    source, first, length = runs.T.astype(np.int64)
    limit = np.where(source == 0, new_rows, pool_rows)
    is_known = (source == 0) | (source == 1)
    bad = ~is_known | (first < 0) | (length < 0) | (first + length > limit)
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"runs[{i}] is {runs[i].tolist()}; there are {new_rows} new rows (0) and {pool_rows} "
            "pool rows (1)"
        )


def _check_tiles(tiles: np.ndarray, start: np.ndarray, runs: np.ndarray) -> None:
    real = tiles[tiles[:, 1] != 0].astype(np.int64)
    first, count, begin, end, _, slot = real.T
    bad = (first < 0) | (count < 0) | (first + count > len(start))
    bad |= (begin < 0) | (end < begin) | (end > len(runs))
    if bad.any():
        tile = real[int(bad.argmax())].tolist()
        raise ValueError(
            f"tiles holds {tile}; there are {len(start)} new rows and {len(runs)} runs"
        )
    # Parts of a split tile share their rows; everything else has rows of its own.
    whole, split = real[slot < 0, :2], np.unique(real[slot >= 0, :2], axis=0)
    spans = np.concatenate([whole, split])
    last_end = 0
    for a, n in sorted(spans.tolist()):
        if a < last_end:
            raise ValueError(f"tiles overlap at row {a}")
        last_end = a + n
    size = end - begin
    tile_of = np.repeat(np.arange(len(real)), size)
    run_of = np.arange(len(tile_of)) + np.repeat(end - np.cumsum(size), size)
    source, row, length = runs[run_of].T
    bad = (source == 0) & (length > 0) & (row + length > start[first[tile_of]])
    if bad.any():
        i = int(bad.argmax())
        raise ValueError(
            f"runs[{run_of[i]}] overlaps the segments of the tile at row {first[tile_of[i]]}: "
            "ancestors lie before their descendants"
        )
