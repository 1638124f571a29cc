"""Random packed forests for the attention tests, with a visibility mask built from the definition
alone.

The tables (own_start, runs, tiles) and the dense mask come from separate code: the mask enumerates,
token by token, every ancestor and the earlier rows of the own segment, and never reads a run or a
tile.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Node:
    """One segment: `cached` ones have keys in the pool and no rows."""

    parent: int | None
    length: int
    cached: bool = False
    first: int = -1
    children: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Forest:
    """Tables of a packed forest and the dense mask [T, C + T] (pool columns first)."""

    rows: int
    pool_rows: int
    own_start: torch.Tensor
    runs: torch.Tensor
    tiles: torch.Tensor
    mask: torch.Tensor
    used_pool: torch.Tensor  # bool [C]: pool rows that belong to a segment
    real_rows: int  # rows before the padding rows


def random_nodes(
    rng: random.Random, *, depth: int, max_children: int, max_length: int, cached: bool
) -> list[Node]:
    """Draws one tree; a cached segment's ancestors are all cached, as in a prefix cache."""
    nodes: list[Node] = []

    def grow(parent: int | None, level: int) -> None:
        is_cached = cached and (parent is None or nodes[parent].cached) and rng.random() < 0.6
        length = rng.choice([1, 2, rng.randint(1, max_length), rng.randint(1, max_length)])
        nodes.append(Node(parent, length, is_cached))
        index = len(nodes) - 1
        if parent is not None:
            nodes[parent].children.append(index)
        if level < depth:
            for _ in range(rng.randint(0 if level else 1, max_children)):
                grow(index, level + 1)

    grow(None, 1)
    return nodes


def pack(
    trees: list[list[Node]],
    *,
    rows_per_tile: int,
    split_tokens: int | None = None,
    padding_rows: int = 0,
    padding_tiles: int = 0,
    pool_gap: int = 3,
) -> Forest:
    """Lays trees out breadth-first and cuts tiles; `split_tokens` cuts each tile's ancestors into
    parts of that many tokens."""
    row = 0
    pool_row = pool_gap
    runs: list[tuple[int, int, int]] = []
    tiles: list[tuple[int, int, int, int, int, int]] = []
    slots = 0
    for nodes in trees:
        order = [0]
        for index in order:
            order.extend(nodes[index].children)
        for index in order:
            node = nodes[index]
            if node.cached:
                node.first, pool_row = pool_row, pool_row + node.length + pool_gap
            else:
                node.first, row = row, row + node.length
        families = [(None, [0])] + [(i, nodes[i].children) for i in order if nodes[i].children]
        for parent, children in families:
            new = [nodes[c] for c in children if not nodes[c].cached]
            if not new:
                continue
            path: list[tuple[int, int, int]] = []
            ancestor = parent
            while ancestor is not None:
                node = nodes[ancestor]
                path.insert(0, (int(node.cached), node.first, node.length))
                ancestor = node.parent
            parts = [path] if split_tokens is None else _split(path, split_tokens)
            spans = []
            for part in parts:
                spans.append((len(runs), len(runs) + len(part)))
                runs.extend(part)
            first, end = new[0].first, new[-1].first + new[-1].length
            assert end - first == sum(n.length for n in new), "siblings are contiguous"
            for tile_row in range(first, end, rows_per_tile):
                tile_rows = min(rows_per_tile, end - tile_row)
                for number, (begin, stop) in enumerate(spans):
                    with_own = int(number == len(spans) - 1)
                    slot = -1
                    if len(spans) > 1:
                        slot, slots = slots, slots + 1
                    tiles.append((tile_row, tile_rows, begin, stop, with_own, slot))
    tiles.sort(key=lambda t: -sum(runs[r][2] for r in range(t[2], t[3])))
    tiles += [(0, 0, 0, 0, 0, -1)] * padding_tiles
    total = row + padding_rows
    own_start = torch.arange(total, dtype=torch.int32)
    mask = torch.zeros(total, pool_row + total, dtype=torch.bool)
    used_pool = torch.zeros(pool_row, dtype=torch.bool)
    for nodes in trees:
        for node in nodes:
            if node.cached:
                used_pool[node.first : node.first + node.length] = True
                continue
            for i in range(node.first, node.first + node.length):
                own_start[i] = node.first
                mask[i, pool_row + node.first : pool_row + i + 1] = True
                ancestor = node.parent
                while ancestor is not None:
                    up = nodes[ancestor]
                    base = up.first + (0 if up.cached else pool_row)
                    mask[i, base : base + up.length] = True
                    ancestor = up.parent
    return Forest(
        rows=total,
        pool_rows=pool_row,
        own_start=own_start,
        runs=torch.tensor(runs, dtype=torch.int32).reshape(-1, 3),
        tiles=torch.tensor(tiles, dtype=torch.int32).reshape(-1, 6),
        mask=mask,
        used_pool=used_pool,
        real_rows=row,
    )


def _split(path: list[tuple[int, int, int]], tokens: int) -> list[list[tuple[int, int, int]]]:
    """Cuts a path into parts of at most `tokens` tokens, from the root down."""
    parts: list[list[tuple[int, int, int]]] = [[]]
    room = tokens
    for buffer, first, length in path:
        while length:
            if room == 0:
                parts.append([])
                room = tokens
            step = min(room, length)
            parts[-1].append((buffer, first, step))
            first, length, room = first + step, length - step, room - step
    return parts


def draw_tensors(
    forest: Forest,
    *,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int,
    sharpness: float = 1.0,
) -> dict[str, torch.Tensor]:
    """Draws q, k, v, k_pool, v_pool; every row that no segment owns is NaN, so reading one
    shows."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    tensors = {
        "q": draw(forest.rows, query_heads, head_dim) * sharpness,
        "k": draw(forest.rows, kv_heads, head_dim),
        "v": draw(forest.rows, kv_heads, head_dim),
        "k_pool": draw(forest.pool_rows, kv_heads, head_dim),
        "v_pool": draw(forest.pool_rows, kv_heads, head_dim),
    }
    for name in ("k_pool", "v_pool"):
        tensors[name][~forest.used_pool] = float("nan")
    for name in ("q", "k", "v"):
        tensors[name][forest.real_rows :] = float("nan")
    return tensors


def dense_attention(
    tensors: dict[str, torch.Tensor], mask: torch.Tensor, scale: float, dtype: torch.dtype
) -> torch.Tensor:
    """Masked softmax attention [T, Hq, D] in `dtype`; rows that see nothing are zero."""
    q = torch.nan_to_num(tensors["q"]).to(dtype).transpose(0, 1)
    group = q.shape[0] // tensors["k"].shape[1]
    k = torch.cat([tensors["k_pool"], tensors["k"]])
    v = torch.cat([tensors["v_pool"], tensors["v"]])
    k = torch.nan_to_num(k).to(dtype).transpose(0, 1).repeat_interleave(group, 0)
    v = torch.nan_to_num(v).to(dtype).transpose(0, 1).repeat_interleave(group, 0)
    scores = (q @ k.transpose(1, 2)) * scale
    scores = scores.masked_fill(~mask, float("-inf"))
    probs = torch.softmax(scores, -1).masked_fill(~mask.any(-1)[:, None], 0.0)
    return (probs @ v).transpose(0, 1)
