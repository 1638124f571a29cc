"""What tree attention over a forest must compute and move: tiles, operations and bytes by count."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from arr_fast_kernels.configs import attention_config, rows_per_tile


@dataclass(frozen=True, slots=True)
class ForestShape:
    """A batch of pairs judged in both orders: text -> images (per order) -> criteria."""

    pairs: int = 8
    text: int = 64
    images: int = 530
    criteria: int = 20
    criterion: int = 24

    def families(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (ancestor tokens, sibling lengths) of every parent."""
        for _ in range(self.pairs):
            yield 0, [self.text]
            yield self.text, [self.images, self.images]
            for _ in range(2):
                yield self.text + self.images, [self.criterion] * self.criteria

    @property
    def rows(self) -> int:
        """New rows of the forest."""
        return sum(sum(lengths) for _, lengths in self.families())

    @property
    def read_rows(self) -> int:
        """Verdicts: one per pair, order and criterion."""
        return self.pairs * 2 * self.criteria


def attention_traffic(
    forest: ForestShape, query_heads: int, kv_heads: int, head_dim: int, arch: str, itemsize: int
) -> dict[str, float]:
    """Counts a forest's tiles, operations and bytes.

    L2 model for `hbm_bytes`: tiles of one parent are neighbours in the launch order, so a parent's
    path is fetched from HBM once per KV head where its keys and values for one head fit half of a
    40 MiB L2 (A100, the smallest), and once per tile otherwise.

    Returns:
        tiles, tile_limit (sum over parents of ceil(rows group / BLOCK_M)), flops, requested and hbm
        key/value bytes, query_bytes (queries and outputs), and least_bytes (every row of q, k, v,
        out once). What the kernel really loads is counted under the interpreter in the tests.
    """
    group = query_heads // kv_heads
    block_m = attention_config(arch, head_dim, torch.bfloat16).block_m
    rows_of_tile = rows_per_tile(group, head_dim, arch)
    pair_bytes = 2 * head_dim * itemsize  # one key and one value of one head
    totals = dict.fromkeys(("tiles", "tile_limit", "flops", "requested", "hbm"), 0.0)
    for ancestors, lengths in forest.families():
        starts = [sum(lengths[:i]) for i in range(len(lengths))]
        rows = sum(lengths)
        totals["tile_limit"] += math.ceil(rows * group / block_m)
        visible = sum(ancestors * n + n * (n + 1) / 2 for n in lengths)
        totals["flops"] += 4 * visible * query_heads * head_dim
        fits = ancestors * pair_bytes <= 20 * 2**20
        totals["hbm"] += kv_heads * pair_bytes * (ancestors if fits else 0)
        for first in range(0, rows, rows_of_tile):
            end = min(first + rows_of_tile, rows)
            own = end - max(start for start in starts if start <= first)
            totals["tiles"] += 1
            totals["requested"] += kv_heads * pair_bytes * (ancestors + own)
            totals["hbm"] += kv_heads * pair_bytes * (own + (0 if fits else ancestors))
    query_bytes = 2.0 * forest.rows * query_heads * head_dim * itemsize
    totals["query_bytes"] = query_bytes
    totals["least_bytes"] = query_bytes + forest.rows * kv_heads * pair_bytes
    return totals
