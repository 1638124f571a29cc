"""What tree attention over a forest must compute and move: tiles, operations and bytes by count.

Two counts stand side by side. What is needed comes from the forest's definition (`ForestShape`);
what is requested comes from walking the kernel's loop over the tile tables that the engine built.
So a table that cuts too many tiles, lists a run twice or lets a tile see its neighbours' ancestors
shows, as does a block of keys too large for the runs.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from arr_fast_kernels.configs import AttentionConfig

Path = tuple[tuple[int, int], ...]  # (segment, tokens) from a root to a leaf
Tables = tuple[Tensor, Tensor, Tensor]  # own_start, runs, tiles, as `prefix_attention` takes them
BuildTables = Callable[[tuple[Path, ...], int], Tables]  # paths, rows of a tile -> tables
# Half of A100's 40 MiB, the smallest L2 of the supported cards; queries and outputs use the rest.
L2_BYTES = 20 * 2**20


@dataclass(frozen=True, slots=True)
class ForestShape:
    """A batch of pairs judged in both orders: text -> images (per order) -> criteria."""

    pairs: int = 8
    text: int = 64
    images: int = 530
    criteria: int = 20
    criterion: int = 24

    def families(self) -> Iterator[tuple[int, list[int]]]:
        """Yields (ancestor tokens, sibling lengths) of every parent, in the order of the rows."""
        for _ in range(self.pairs):
            yield 0, [self.text]
            yield self.text, [self.images, self.images]
            for _ in range(2):
                yield self.text + self.images, [self.criterion] * self.criteria

    def paths(self) -> tuple[Path, ...]:
        """Every criterion's path."""
        found: list[Path] = []
        segments = 0
        for _ in range(self.pairs):
            text, images = segments, segments + 1
            segments += 3
            for order in range(2):
                path = ((text, self.text), (images + order, self.images))
                found += [(*path, (segments + j, self.criterion)) for j in range(self.criteria)]
                segments += self.criteria
        return tuple(found)

    @property
    def rows(self) -> int:
        """New rows of the forest."""
        return sum(sum(lengths) for _, lengths in self.families())

    @property
    def read_rows(self) -> int:
        """Verdicts: one per pair, order and criterion."""
        return self.pairs * 2 * self.criteria


def attention_traffic(
    forest: ForestShape,
    tables: Tables,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    config: AttentionConfig,
    itemsize: int,
) -> dict[str, float]:
    """Counts a forest's tiles, operations and bytes.

    L2 model for `hbm`: tiles run in the table's order, one KV head after another. A stretch of keys
    and values is fetched from HBM unless it is among the last `L2_BYTES` that were read (least
    recently used goes first); a tile's own keys are always fetched.

    Args:
        forest: what the tables were built for.
        tables: own_start, runs and tiles, without splits.
        query_heads: Hq.
        kv_heads: Hkv.
        head_dim: D.
        config: block sizes; the tiles must have been cut for its block_m.
        itemsize: bytes of an element.

    Returns:
        tiles, tile_limit (sum over parents of ceil(rows group / BLOCK_M)), flops; bytes of keys and
        values: path (every tile's path once), requested (what the kernel's loads ask for), blocks
        (the same with the masked keys of every last block) and hbm; query_bytes (queries and
        outputs), and least_bytes (every row of q, k, v, out once).
    """
    group = query_heads // kv_heads
    pair_bytes = 2 * head_dim * itemsize  # one key and one value of one head
    totals = dict.fromkeys(("tiles", "tile_limit", "flops"), 0.0)
    ancestors_of: list[int] = []
    segment_of: list[int] = []
    for ancestors, lengths in forest.families():
        totals["tile_limit"] += math.ceil(sum(lengths) * group / config.block_m)
        visible = sum(ancestors * n + n * (n + 1) / 2 for n in lengths)
        totals["flops"] += 4 * visible * query_heads * head_dim
        for length in lengths:
            segment_of += [len(segment_of)] * length
            ancestors_of += [ancestors] * length
    own_start, runs, tiles = (table.tolist() for table in tables)
    keys = dict.fromkeys(("path", "requested", "blocks", "hbm"), 0)
    recent: OrderedDict[tuple[int, int, int], int] = OrderedDict()
    for first, rows, run_begin, run_end, _, _ in tiles:
        totals["tiles"] += 1
        keys["path"] += ancestors_of[first] + first + rows - segment_of[first]
        own = first + rows - own_start[first]
        for length in [*(run[2] for run in runs[run_begin:run_end]), own]:
            keys["requested"] += length
            keys["blocks"] += math.ceil(length / config.block_n) * config.block_n
        keys["hbm"] += own
        for run in map(tuple, runs[run_begin:run_end]):
            keys["hbm"] += 0 if run in recent else run[2]
            recent[run] = run[2] * pair_bytes
            recent.move_to_end(run)
            while sum(recent.values()) > L2_BYTES:
                recent.popitem(last=False)
    totals |= {name: float(kv_heads * pair_bytes * count) for name, count in keys.items()}
    totals["query_bytes"] = 2.0 * forest.rows * query_heads * head_dim * itemsize
    totals["least_bytes"] = totals["query_bytes"] + forest.rows * kv_heads * pair_bytes
    return totals
