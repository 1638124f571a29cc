"""prefix_attention: the torch impl against the fp64 oracle, and the op against its contract.

Rule (STYLE.md): err(impl, fp64) <= err(plain eager in the same dtype, fp64) + a bound from eps.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from arr_fast.engine.attention import dense_attention
from arr_fast.engine.forest import PackedForest, PoolRun, pack_forest
from arr_fast.engine.tree import build_tree
from arr_fast.ops import IMPLS, prefix_attention
from arr_fast.ops.prefix_attention import check_prefix_attention
from tests.engine.test_tree import sequence

WHOLE = 1 << 20


def forest_of(prefix: int, leaves: list[int], cached: int = 0) -> PackedForest:
    """One shared segment, some leaves, and optionally a cached stretch at the front."""
    stem = list(range(prefix))
    ids = [[*stem, *range(1000 * (i + 1), 1000 * (i + 1) + n)] for i, n in enumerate(leaves)]
    tree = build_tree([sequence(s) for s in ids])
    pool = {tree.roots[0]: [PoolRun(3, cached)]} if cached else None
    return pack_forest(tree, pool)


def tensors(
    forest: PackedForest, heads: int, kv_heads: int, dim: int, pool: int = 0, seed: int = 0
) -> tuple[Tensor, ...]:
    make = torch.Generator().manual_seed(seed)
    q = torch.randn(forest.rows, heads, dim, generator=make)
    k, v = (torch.randn(forest.rows, kv_heads, dim, generator=make) for _ in range(2))
    kp, vp = (torch.randn(pool, kv_heads, dim, generator=make) for _ in range(2))
    return q, k, v, kp, vp


def tables(forest: PackedForest, rows: int = WHOLE) -> tuple[Tensor, ...]:
    arrays = (forest.own_start, forest.runs, forest.tiles(rows))
    return tuple(torch.from_numpy(np.ascontiguousarray(a)) for a in arrays)


def dense(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Plain masked attention, written out."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    scores = scores.masked_fill(~mask, -math.inf)
    return torch.einsum("hts,shd->thd", scores.softmax(-1), v)


CASES = [
    (40, [13] * 20, 8, 4, 64),
    (1, [1], 4, 4, 32),
    (600, [3, 200, 17, 1], 8, 1, 64),
    (63, [5], 6, 2, 16),
    (0, [9], 7, 1, 96),
    (31, list(range(1, 40)), 12, 2, 128),
    (10, [500, 490, 405, 3], 8, 4, 64),
    (1100, [7], 4, 2, 16),
]


@pytest.mark.parametrize(
    "prefix,leaves,heads,kv_heads,dim",
    CASES,
    ids=[f"P{p}-K{len(s)}-H{h}x{g}-D{d}" for p, s, h, g, d in CASES],
)
def test_torch_matches_dense_attention(
    prefix: int, leaves: list[int], heads: int, kv_heads: int, dim: int
) -> None:
    forest = forest_of(prefix, leaves)
    q, k, v, kp, vp = tensors(forest, heads, kv_heads, dim)
    mask, scale = forest.dense_mask(), dim**-0.5
    exact = dense(q.double(), k.double(), v.double(), mask, scale)
    eager = dense(q, k, v, mask, scale)
    out = prefix_attention(q, k, v, kp, vp, *tables(forest), scale, "torch")
    bound = (eager - exact).abs().max() + 4 * torch.finfo(torch.float32).eps
    assert (out - exact).abs().max() <= bound
    oracle = prefix_attention(q, k, v, kp, vp, *tables(forest), scale, "reference")
    assert (oracle - exact).abs().max() <= torch.finfo(torch.float32).eps * 4


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=20), min_size=1, max_size=8),
    st.integers(1, 3),
    st.sampled_from([1, 3, WHOLE]),
    st.integers(0, 10_000),
)
def test_torch_matches_dense_attention_on_random_trees(
    ids: list[list[int]], min_shared: int, rows: int, seed: int
) -> None:
    forest = pack_forest(build_tree([sequence(s) for s in ids], min_shared))
    q, k, v, kp, vp = tensors(forest, 6, 2, 16, seed=seed)
    exact = dense(q.double(), k.double(), v.double(), forest.dense_mask(), 0.25)
    out = prefix_attention(q, k, v, kp, vp, *tables(forest, rows), 0.25, "torch")
    assert (out - exact).abs().max() <= 2e-6
    own, _, _ = tables(forest)
    runs, tiles = (torch.from_numpy(x) for x in forest.split_tiles(2, 3))
    split = prefix_attention(q, k, v, kp, vp, own, runs, tiles, 0.25, "torch")
    assert (split - exact).abs().max() <= 2e-6


def test_cached_rows_equal_computed_ones() -> None:
    whole, partly = forest_of(40, [7, 9]), forest_of(40, [7, 9], cached=32)
    q, k, v, kp, vp = tensors(whole, 8, 2, 32)
    pool_k, pool_v = torch.randn(2, 50, 2, 32)
    pool_k[3:35], pool_v[3:35] = k[:32], v[:32]
    out = prefix_attention(q, k, v, kp, vp, *tables(whole), 0.2, "torch")
    short = [x[32:].contiguous() for x in (q, k, v)]
    for impl in ("torch", "reference"):
        got = prefix_attention(*short, pool_k, pool_v, *tables(partly), 0.2, impl)
        torch.testing.assert_close(got, out[32:], atol=2e-6, rtol=0)


def test_rows_without_a_tile_are_zero_and_strided_inputs_work() -> None:
    forest = forest_of(20, [4, 4])
    q, k, v, kp, vp = tensors(forest, 4, 2, 32)
    own, runs, _ = tables(forest)
    some = torch.from_numpy(forest.read_tiles(forest.read_rows))
    out = prefix_attention(q, k, v, kp, vp, own, runs, some, 0.2, "torch")
    full = prefix_attention(q, k, v, kp, vp, *tables(forest), 0.2, "torch")
    read = torch.from_numpy(forest.read_rows)
    torch.testing.assert_close(out[read], full[read], atol=1e-6, rtol=0)
    rest = torch.ones(forest.rows, dtype=torch.bool)
    rest[read] = False
    assert (out[rest] == 0).all()
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v)]
    assert not strided[0].is_contiguous()
    again = prefix_attention(*strided, kp, vp, *tables(forest), 0.2, "torch")
    torch.testing.assert_close(again, full, atol=1e-6, rtol=0)


def test_dense_attention_for_training_is_the_same_function() -> None:
    forest = forest_of(25, [6, 11, 2])
    q, k, v, kp, vp = tensors(forest, 8, 4, 16)
    out = prefix_attention(q, k, v, kp, vp, *tables(forest), 0.25, "torch")
    query, key, value = (x.transpose(0, 1)[None].requires_grad_() for x in (q, k, v))
    module = torch.nn.Module()
    got, _ = dense_attention(
        module, query, key, value, None, scaling=0.25, forest_mask=forest.dense_mask()
    )
    torch.testing.assert_close(got[0], out, atol=2e-6, rtol=0)
    got.square().sum().backward()
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in (query, key, value))


def test_op_contract() -> None:
    forest = forest_of(20, [4, 6])
    args = (*tensors(forest, 4, 2, 16), *tables(forest), 0.25, "torch")
    torch.library.opcheck(prefix_attention, args)
    q = args[0].clone().requires_grad_()
    with pytest.raises(RuntimeError, match="inference only"):
        prefix_attention(q, *args[1:]).sum().backward()


@pytest.mark.compile
def test_compiles_as_one_graph() -> None:
    forest = forest_of(20, [4, 6])
    args = (*tensors(forest, 4, 2, 16), *tables(forest), 0.25, "torch")

    def twice(q: Tensor) -> Tensor:
        return F.silu(prefix_attention(q * 2, *args[1:]))

    compiled = torch.compile(twice, fullgraph=True, dynamic=True)
    torch.testing.assert_close(compiled(args[0]), twice(args[0]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "position,value,message",
    [
        (0, torch.zeros(3, 4), "q must be"),
        (1, torch.zeros(31, 2, 16), "k must be"),
        (1, torch.zeros(30, 2, 24), r"k must be \[30, Hkv, 16\]"),
        (0, torch.zeros(30, 4, 24), r"k must be \[30, Hkv, 24\]"),
        (2, torch.zeros(30, 1, 16), "v must have k's shape"),
        (1, torch.zeros(30, 3, 16), "not a multiple"),
        (3, torch.zeros(5, 2, 8), "k_pool must be"),
        (4, torch.zeros(5, 2, 16), "v_pool has 5 rows"),
        (5, torch.zeros(29, dtype=torch.int32), "own_start must be"),
        (6, torch.zeros(2, 2, dtype=torch.int32), "runs must be"),
        (7, torch.zeros(2, 6), "tiles must be int32"),
        (1, torch.zeros(30, 2, 16, dtype=torch.float16), "k is torch.float16"),
    ],
)
def test_bad_arguments_are_named(position: int, value: object, message: str) -> None:
    """Whoever would compute it; an impl whose package is missing has not been asked yet."""
    forest = forest_of(20, [4, 6])
    args = [*tensors(forest, 4, 2, 16), *tables(forest), 0.25]
    args[position] = value
    for impl in IMPLS:
        with pytest.raises(ValueError, match=message):
            prefix_attention(*args, impl)


def test_an_unknown_impl_is_named() -> None:
    forest = forest_of(20, [4, 6])
    with pytest.raises(ValueError, match="impl must be torch, triton"):
        prefix_attention(*tensors(forest, 4, 2, 16), *tables(forest), 0.25, "fast")


def table(*rows: list[int]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32)


# A root of 4 rows and two children of 3: the tables, and one change that breaks each.
SEGMENTS = [0, 0, 0, 0, 4, 4, 4, 7, 7, 7]


@pytest.mark.parametrize(
    "change,message",
    [
        ({"own_start": [0, 0, 0, 0, 4, 4, 4, 7, 7, 10]}, r"own_start\[9\] is 10"),
        ({"own_start": [0, 0, 0, 0, 4, 4, 4, 5, 5, 5]}, r"own_start\[7\] .* segments overlap"),
        ({"own_start": [0, 0, 0, 0, 4, 4, 4, 7, 4, 7]}, r"own_start\[8\] .* segments overlap"),
        ({"runs": table([0, 0, 11])}, r"runs\[0\] is \[0, 0, 11\]"),
        ({"runs": table([1, 0, 4])}, "2 pool rows"),
        ({"runs": table([2, 0, 4])}, r"runs\[0\]"),
        ({"runs": table([0, 1, 4])}, r"runs\[0\] overlaps the segments of the tile at row 4"),
        ({"tiles": table([0, 4, 0, 0, 1, -1], [4, 7, 0, 1, 1, -1])}, "tiles holds .* 10 new rows"),
        ({"tiles": table([0, 4, 0, 0, 1, -1], [4, 6, 0, 2, 1, -1])}, "tiles holds .* 1 runs"),
        ({"tiles": table([0, 5, 0, 0, 1, -1], [4, 6, 0, 1, 1, -1])}, "tiles overlap at row 4"),
    ],
)
def test_broken_tables_are_named(change: dict[str, object], message: str) -> None:
    tables = {
        "own_start": SEGMENTS,
        "runs": table([0, 0, 4]),
        "tiles": table([0, 4, 0, 0, 1, -1], [4, 6, 0, 1, 1, -1], [0, 0, 0, 0, 0, -1]),
    }

    def call(tables: dict[str, object], impl: str = "torch") -> None:
        start = torch.tensor(tables["own_start"], dtype=torch.int32)
        rows, pool = torch.zeros(10, 2, 16), torch.zeros(2, 2, 16)
        given = (start, tables["runs"], tables["tiles"])
        prefix_attention(rows, rows, rows, pool, pool, *given, 0.25, impl)

    call(tables)
    for impl in IMPLS:
        with pytest.raises(ValueError, match=message):
            call(tables | change, impl)


def test_attention_on_another_device_is_named() -> None:
    forest = forest_of(20, [4, 6])
    args = [*tensors(forest, 4, 2, 16), *tables(forest)]
    names = ("k", "v", "k_pool", "v_pool", "own_start", "runs", "tiles")
    for position, name in enumerate(names, start=1):
        moved = list(args)
        moved[position] = moved[position].to("meta")
        with pytest.raises(ValueError, match=f"{name} is on meta, q is on cpu"):
            check_prefix_attention(*moved)
