"""Tables of a forest that is given by the lengths of its segments, packed as every batch is."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from arr_fast.engine.forest import PackedForest, pack_forest
from arr_fast.engine.tree import TokenSequence, build_tree

Path = tuple[tuple[int, int], ...]
# Segments differ in their first token; no segment is this long.
_KEYS_PER_SEGMENT = 1 << 20


def tables_of_paths(paths: Sequence[Path], rows_per_tile: int) -> tuple[Tensor, Tensor, Tensor]:
    """Packs a forest and cuts its tiles.

    Args:
        paths: Root-to-leaf paths, each a tuple of (segment number, tokens); paths that begin with
            the same segments share them, where they are long enough to be shared.
        rows_per_tile: Most rows of a tile.

    Returns:
        own_start int32 [T], runs int32 [R, 3] and tiles int32 [N, 6] of `prefix_attention`.
    """
    forest = _pack(tuple(paths))
    tiles = forest.tiles(rows_per_tile)
    # Copies: the forest is kept.
    return torch.tensor(forest.own_start), torch.tensor(forest.runs), torch.tensor(tiles)


@lru_cache(maxsize=4)
def _pack(paths: tuple[Path, ...]) -> PackedForest:
    sequences = []
    for path in paths:
        segments = [np.arange(tokens) + number * _KEYS_PER_SEGMENT for number, tokens in path]
        keys = np.concatenate(segments)
        sequences.append(TokenSequence(keys, keys, np.arange(len(keys))[None]))
    return pack_forest(build_tree(sequences))
