"""`prefix_attention` under the interpreter against dense fp64 attention over an independently built
mask."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arr_fast_kernels.configs import AttentionConfig, attention_config
from arr_fast_kernels.prefix_attention import prefix_attention
from tests.kernels.forests import Forest, Node, dense_attention, draw_tensors, pack, random_nodes

CONFIG = attention_config("interpret", 64, torch.float32)


def check(
    forest: Forest,
    *,
    query_heads: int,
    kv_heads: int,
    head_dim: int,
    dtype: torch.dtype,
    seed: int = 0,
    sharpness: float = 1.0,
    config: AttentionConfig = CONFIG,
    tensors: dict[str, torch.Tensor] | None = None,
    launch: Callable[..., torch.Tensor] = prefix_attention,
) -> torch.Tensor:
    """Asserts err(kernel, fp64) <= err(eager in the same dtype, fp64) + a bound from eps.

    The bound: 4 eps of the dtype for the output's rounding, and 4 fp32 eps of the largest score
    (by Cauchy-Schwarz) for the exponent, both times max |v|.
    """
    tensors = tensors or draw_tensors(
        forest,
        query_heads=query_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        dtype=dtype,
        seed=seed,
        sharpness=sharpness,
    )
    scale = head_dim**-0.5
    out = launch(
        **tensors,
        own_start=forest.own_start,
        runs=forest.runs,
        tiles=forest.tiles,
        scale=scale,
        config=config,
    )
    expected = dense_attention(tensors, forest.mask, scale, torch.float64)
    eager = dense_attention(tensors, forest.mask, scale, dtype)
    assert out.dtype == dtype and out.shape == expected.shape
    error = (out.double() - expected).abs().max().item()
    allowed = (eager.double() - expected).abs().max().item()
    largest = torch.nan_to_num(tensors["v"]).abs().max().item()
    norms = [torch.nan_to_num(tensors[n]).float().norm(dim=-1) for n in ("q", "k", "k_pool")]
    score = (norms[0].max() * torch.cat(norms[1:]).max()).item() * scale
    bound = 4 * (torch.finfo(dtype).eps + torch.finfo(torch.float32).eps * score) * largest
    assert error <= allowed + bound, (error, allowed, bound)
    assert torch.count_nonzero(out[forest.real_rows :]) == 0
    return out


def rows_of(group: int, config: AttentionConfig = CONFIG) -> int:
    return config.block_m // group


def siblings(prefix: int, lengths: list[int], *, cached: bool = False) -> list[Node]:
    root = Node(None, prefix, cached, children=list(range(1, len(lengths) + 1)))
    return [root, *(Node(0, n) for n in lengths)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("query_heads", "kv_heads", "head_dim"),
    [
        (2, 2, 64),
        (4, 2, 64),
        (3, 1, 96),
        (6, 1, 64),
        (7, 1, 128),
        (8, 2, 128),
        (16, 1, 64),
        (2, 1, 256),
    ],
    ids=lambda n: str(n),
)
def test_heads(query_heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
    group = query_heads // kv_heads
    trees = [siblings(19, [5, 1, 8], cached=True), siblings(9, [3])]
    forest = pack(trees, rows_per_tile=rows_of(group))
    check(forest, query_heads=query_heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype)


@pytest.mark.parametrize("prefix", [1, 15, 16, 17, 63])
@pytest.mark.parametrize("cached", [False, True], ids=["new", "cached"])
def test_block_edges(prefix: int, cached: bool) -> None:
    forest = pack([siblings(prefix, [1, 16, 17, 31], cached=cached)], rows_per_tile=rows_of(2))
    check(forest, query_heads=4, kv_heads=2, head_dim=64, dtype=torch.float32)


def test_one_criterion_and_no_ancestor() -> None:
    forest = pack([siblings(21, [13]), [Node(None, 40)]], rows_per_tile=rows_of(2))
    check(forest, query_heads=2, kv_heads=1, head_dim=64, dtype=torch.float32)


def test_empty_ancestor_run() -> None:
    """A run of length 0 adds nothing, also as the only run."""
    forest = pack([siblings(8, [4, 4])], rows_per_tile=rows_of(2))
    with_empty = torch.cat([torch.tensor([[1, 2, 0]], dtype=torch.int32), forest.runs])
    tiles = forest.tiles.clone()
    for tile in tiles:
        if tile[2] == tile[3]:
            tile[2], tile[3] = 0, 1
        else:
            tile[2:4] += 1
    forest = replace(forest, runs=with_empty, tiles=tiles)
    check(forest, query_heads=2, kv_heads=1, head_dim=64, dtype=torch.float32)


def test_two_hundred_segments() -> None:
    rng = random.Random(3)
    forest = pack(
        [siblings(33, [rng.randint(1, 4) for _ in range(200)], cached=True)],
        rows_per_tile=rows_of(2),
    )
    check(forest, query_heads=2, kv_heads=1, head_dim=64, dtype=torch.float16)


def test_sharp_scores_need_the_running_max() -> None:
    """Scores of +-100 and more overflow exp2 without the running maximum."""
    forest = pack([siblings(45, [9, 20])], rows_per_tile=rows_of(1))
    check(forest, query_heads=1, kv_heads=1, head_dim=64, dtype=torch.float32, sharpness=60.0)


def test_padding_rows_and_tiles() -> None:
    forest = pack([siblings(12, [6, 5])], rows_per_tile=rows_of(2), padding_rows=9, padding_tiles=3)
    check(forest, query_heads=4, kv_heads=2, head_dim=64, dtype=torch.float32)


@pytest.mark.parametrize("split_tokens", [9, 16, 33])
@pytest.mark.parametrize("cached", [False, True], ids=["new", "cached"])
def test_splits_merge_to_one_softmax(split_tokens: int, cached: bool) -> None:
    trees = [siblings(40, [5, 9, 14], cached=cached), siblings(20, [3, 3])]
    whole = pack(trees, rows_per_tile=rows_of(2))
    split = pack(trees, rows_per_tile=rows_of(2), split_tokens=split_tokens, padding_tiles=2)
    assert int(split.tiles[:, 5].max()) > 0 and int(whole.tiles[:, 5].max()) == -1
    arguments = {"query_heads": 4, "kv_heads": 2, "head_dim": 64, "dtype": torch.float32}
    merged = check(split, **arguments)
    torch.testing.assert_close(merged, check(whole, **arguments), rtol=0, atol=2e-6)


def test_non_contiguous_inputs() -> None:
    forest = pack([siblings(19, [5, 8])], rows_per_tile=rows_of(2))
    plain = draw_tensors(
        forest, query_heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, seed=1
    )
    strided = {n: t.transpose(0, 1).contiguous().transpose(0, 1) for n, t in plain.items()}
    strided["q"] = torch.stack([plain["q"], plain["q"]], -1)[..., 0]  # last stride 2
    assert not strided["k"].is_contiguous()
    check(forest, query_heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, tensors=strided)


@pytest.mark.parametrize("block_m", [64, 128])
def test_shipped_block_sizes(block_m: int) -> None:
    config = replace(CONFIG, block_m=block_m, block_n=64)
    forest = pack([siblings(130, [13] * 11, cached=True)], rows_per_tile=rows_of(4, config))
    check(forest, query_heads=8, kv_heads=2, head_dim=64, dtype=torch.float16, config=config)


FOREST_ARGUMENTS = {
    "seed": st.integers(0, 2**31),
    "depth": st.integers(1, 4),
    "trees": st.integers(1, 3),
    "heads": st.sampled_from([(1, 1), (2, 1), (4, 2), (3, 1), (6, 2), (7, 1)]),
    "dtype": st.sampled_from([torch.float32, torch.float16]),
    "cached": st.booleans(),
    "split_tokens": st.sampled_from([None, None, 7, 16]),
}
QUIET = [HealthCheck.function_scoped_fixture]


@settings(max_examples=10, deadline=None, suppress_health_check=QUIET)
@given(**FOREST_ARGUMENTS)
def test_random_forests(**drawn: Any) -> None:
    check_random_forest(**drawn)


@pytest.mark.slow
@settings(max_examples=150, deadline=None, suppress_health_check=QUIET)
@given(**FOREST_ARGUMENTS)
def test_many_random_forests(**drawn: Any) -> None:
    check_random_forest(**drawn)


def check_random_forest(
    seed: int,
    depth: int,
    trees: int,
    heads: tuple[int, int],
    dtype: torch.dtype,
    cached: bool,
    split_tokens: int | None,
) -> None:
    rng = random.Random(seed)
    drawn = [
        random_nodes(rng, depth=depth, max_children=3, max_length=20, cached=cached)
        for _ in range(trees)
    ]
    forest = pack(
        drawn,
        rows_per_tile=rows_of(heads[0] // heads[1]),
        split_tokens=split_tokens,
        padding_rows=2,
    )
    if forest.real_rows == 0 or forest.tiles.shape[0] > 60:
        return
    check(forest, query_heads=heads[0], kv_heads=heads[1], head_dim=64, dtype=dtype, seed=seed)
