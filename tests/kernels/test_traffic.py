"""The count of tiles and bytes over tables that the engine builds.

The interpreter's tests hold it to what the kernel loads.
"""

from __future__ import annotations

import random

import torch

from arr_fast.engine.path_forest import tables_of_paths
from arr_fast.ops.tree_tables import check_tables
from arr_fast_kernels.configs import ARCHS, attention_config
from arr_fast_kernels.traffic import ForestShape, attention_traffic


def test_tables_are_those_of_the_shape() -> None:
    """Segments lie as `families` says, and every row of a tile has its parent's path."""
    shape = ForestShape(pairs=2, text=17, images=21, criteria=3, criterion=5)
    own_start, runs, tiles = tables_of_paths(shape.paths(), 4)
    check_tables(own_start, runs, tiles, shape.rows, 0)
    starts: list[int] = []
    ancestors: list[int] = []
    for above, lengths in shape.families():
        for length in lengths:
            starts += [len(starts)] * length
            ancestors += [above] * length
    assert own_start.tolist() == starts
    for first, rows, begin, end, with_own, slot in tiles.tolist():
        assert (with_own, slot) == (1, -1)
        seen = int(runs[begin:end, 2].sum())
        assert ancestors[first : first + rows] == [seen] * rows
    assert sorted(r for f, n, *_ in tiles.tolist() for r in range(f, f + n)) == list(
        range(shape.rows)
    )


def test_the_l2_model_sees_the_order_of_tiles() -> None:
    """Four parents whose paths need 12 MiB each: neighbours share a fetch, alternation costs one
    per tile.
    """
    shape = ForestShape(pairs=2, text=8192, images=16384, criteria=8, criterion=64)
    config = attention_config("sm_80", 128, torch.float16)
    own_start, runs, tiles = tables_of_paths(shape.paths(), config.block_m)
    ancestors = torch.tensor([int(runs[a:b, 2].sum()) for a, b in tiles[:, 2:4].tolist()])
    is_leaf = ancestors == shape.text + shape.images
    by_parent = tiles[is_leaf].view(4, 4, 6)  # 512 rows of each parent in 4 tiles
    alternating = tiles.clone()
    alternating[is_leaf] = by_parent.transpose(0, 1).reshape(16, 6)
    near, far = (
        attention_traffic(shape, (own_start, runs, order), 8, 8, 128, config, 2)
        for order in (tiles, alternating)
    )
    assert near["requested"] == far["requested"]
    paths = 8 * 512 * (shape.text + shape.images)
    assert far["hbm"] - near["hbm"] == 12 * paths


def test_tiles_and_blocks_stay_in_budget_for_shipped_configs() -> None:
    """At most ceil(rows x group / BLOCK_M) tiles per parent wherever group divides BLOCK_M."""
    rng = random.Random(0)
    for arch in ARCHS:
        for heads in ((16, 8), (32, 8), (64, 8)):
            shape = ForestShape(criteria=rng.randint(1, 30), criterion=rng.randint(16, 40))
            config = attention_config(arch, 128, torch.bfloat16)
            tables = tables_of_paths(shape.paths(), config.block_m * heads[1] // heads[0])
            model = attention_traffic(shape, tables, *heads, 128, config, 2)
            assert model["tiles"] <= model["tile_limit"]
            assert model["path"] == model["requested"] <= model["blocks"] <= 1.15 * model["path"]
