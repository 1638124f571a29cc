"""prefix_attention: tree attention over a packed forest (schema, checks and dispatch).

Row i attends to the rows of its tile's ancestor runs, and to new rows own_start[i]..i:

    out[i] = softmax(scale * q[i] . [K_ancestors; K_own]) [V_ancestors; V_own]

Legend: T new rows, C cached rows, Hq query heads, Hkv key/value heads, D head dim, R runs, N tiles.
"""

from __future__ import annotations

import torch
from torch import Tensor

from arr_fast.ops.tree_tables import check_tables

TILE_FIRST, TILE_ROWS, TILE_RUN_BEGIN, TILE_RUN_END, TILE_WITH_OWN, TILE_SPLIT = range(6)
RUN_SOURCE, RUN_FIRST, RUN_LENGTH = range(3)


@torch.library.custom_op("arr_fast::prefix_attention", mutates_args=())
def prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    own_start: Tensor,
    runs: Tensor,
    tiles: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    """Attention of every new row to its ancestors in full and to its own segment causally.

    Args:
        q: [T, Hq, D], rotary applied.
        k: [T, Hkv, D], rotary applied; Hq is a multiple of Hkv.
        v: [T, Hkv, D].
        k_pool: [C, Hkv, D], this layer's cached rows; C may be 0.
        v_pool: [C, Hkv, D].
        own_start: int32 [T]; row i sees new rows own_start[i]..i of its own segment.
        runs: int32 [R, 3]: (0 new | 1 pool, first row, length), ancestors from the root down.
        tiles: int32 [N, 6]: (first row, rows, run_begin, run_end, with_own, split_slot | -1).
        scale: Multiplies the scores; 1 / sqrt(D) as a rule.
        impl: "torch", "triton", "flash", "xformers" or "reference".

    Returns:
        [T, Hq, D] in q's dtype. Rows that no tile covers are zero.

    Raises:
        ValueError: Shapes, dtypes or devices that do not fit; the message names the argument.
    """
    check_prefix_attention(q, k, v, k_pool, v_pool, own_start, runs, tiles)
    if impl == "torch":
        from arr_fast.ops.torch_impl import prefix_attention_torch

        return prefix_attention_torch(q, k, v, k_pool, v_pool, own_start, runs, tiles, scale)
    if impl == "triton":
        from arr_fast_kernels.prefix_attention import prefix_attention as launch

        out: Tensor = launch(
            q=q,
            k=k,
            v=v,
            k_pool=k_pool,
            v_pool=v_pool,
            own_start=own_start,
            runs=runs,
            tiles=tiles,
            scale=scale,
        )
        return out
    if impl == "reference":
        from arr_fast.ops.reference import prefix_attention_reference

        return prefix_attention_reference(q, k, v, k_pool, v_pool, own_start, runs, tiles, scale)
    if impl == "flash":
        from arr_fast.ops.flash import prefix_attention_flash

        return prefix_attention_flash(q, k, v, k_pool, v_pool, own_start, runs, tiles, scale)
    if impl == "xformers":
        from arr_fast.ops.xformers import prefix_attention_xformers

        return prefix_attention_xformers(q, k, v, k_pool, v_pool, own_start, runs, tiles, scale)
    raise ValueError(f"impl must be torch, triton, flash, xformers or reference, got {impl!r}")


@prefix_attention.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    own_start: Tensor,
    runs: Tensor,
    tiles: Tensor,
    scale: float,
    impl: str,
) -> Tensor:
    return torch.empty_like(q, memory_format=torch.contiguous_format)


def _no_backward(ctx: object, grad: Tensor) -> None:
    raise RuntimeError(
        "prefix_attention is inference only; train through engine.attention.dense_attention"
    )


prefix_attention.register_autograd(_no_backward)


def check_prefix_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    own_start: Tensor,
    runs: Tensor,
    tiles: Tensor,
) -> None:
    """Checks shapes, dtypes and devices, and on a CPU the tables' values; raises a ValueError that
    names the argument."""
    if q.ndim != 3:
        raise ValueError(f"q must be [T, Hq, D], got {tuple(q.shape)}")
    rows, heads, dim = q.shape
    if k.ndim != 3 or k.shape[0] != rows or k.shape[2] != dim:
        raise ValueError(f"k must be [{rows}, Hkv, {dim}], got {tuple(k.shape)}")
    if k.shape[1] == 0 or heads % k.shape[1]:
        raise ValueError(f"q has {heads} heads, not a multiple of k's {k.shape[1]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}, got {tuple(v.shape)}")
    for name, pool in (("k_pool", k_pool), ("v_pool", v_pool)):
        if pool.ndim != 3 or pool.shape[1:] != k.shape[1:]:
            raise ValueError(f"{name} must be [C, {k.shape[1]}, {dim}], got {tuple(pool.shape)}")
    if v_pool.shape != k_pool.shape:
        raise ValueError(f"v_pool has {v_pool.shape[0]} rows, k_pool has {k_pool.shape[0]}")
    for name, tensor in (("k", k), ("v", v), ("k_pool", k_pool), ("v_pool", v_pool)):
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} is {tensor.dtype}, q is {q.dtype}")
    if own_start.shape != (rows,):
        raise ValueError(f"own_start must be [{rows}], got {tuple(own_start.shape)}")
    if runs.ndim != 2 or runs.shape[1] != 3:
        raise ValueError(f"runs must be [R, 3], got {tuple(runs.shape)}")
    if tiles.ndim != 2 or tiles.shape[1] != 6:
        raise ValueError(f"tiles must be [N, 6], got {tuple(tiles.shape)}")
    for name, tensor in (("own_start", own_start), ("runs", runs), ("tiles", tiles)):
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32, got {tensor.dtype}")
    for name, tensor in (
        ("k", k),
        ("v", v),
        ("k_pool", k_pool),
        ("v_pool", v_pool),
        ("own_start", own_start),
        ("runs", runs),
        ("tiles", tiles),
    ):
        if tensor.device != q.device:
            raise ValueError(f"{name} is on {tensor.device}, q is on {q.device}")
    # On a GPU a look at the values would wait for the device.
    if tiles.device.type == "cpu":
        check_tables(own_start, runs, tiles, rows, k_pool.shape[0])
