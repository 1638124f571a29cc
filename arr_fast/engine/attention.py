"""Attention functions that the engine plugs into transformers by name.

`arr_fast_tree`: tree attention for decoder layers; the forest's tables travel as the keyword
argument `forest`, no mask is built and no cache is used.
`arr_fast_dense`: the same meaning from a square mask, differentiable; for training a judge.
`arr_fast_flash_varlen`: one call per vision layer for all images. Its name contains "flash"
because transformers hands cumulative lengths only to such names.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from arr_fast.ops import prefix_attention

TREE = "arr_fast_tree"
DENSE = "arr_fast_dense"
VARLEN = "arr_fast_flash_varlen"


class ForestTables(NamedTuple):
    """What one decoder layer needs to know of a packed forest.

    Attributes:
        own_start: int32 [T].
        runs: int32 [R, 3].
        tiles: int32 [N, 6].
        k_pool, v_pool: [C, Hkv, D], this layer's cached rows.
        store_rows: int64 [S], rows whose keys and values are kept after this forward.
        store_slots: int64 [S], where in the pool they go.
        impl: Who computes the op.
    """

    own_start: Tensor
    runs: Tensor
    tiles: Tensor
    k_pool: Tensor
    v_pool: Tensor
    store_rows: Tensor
    store_slots: Tensor
    impl: str


def attend(q: Tensor, k: Tensor, v: Tensor, forest: ForestTables, scale: float) -> Tensor:
    """Tree attention for rows [T, H, D]; keeps the keys and values that the caches asked for."""
    if forest.store_rows.numel():
        forest.k_pool.index_copy_(0, forest.store_slots, k.index_select(0, forest.store_rows))
        forest.v_pool.index_copy_(0, forest.store_slots, v.index_select(0, forest.store_rows))
    out: Tensor = prefix_attention(
        q,
        k,
        v,
        forest.k_pool,
        forest.v_pool,
        forest.own_start,
        forest.runs,
        forest.tiles,
        scale,
        forest.impl,
    )
    return out


def tree_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    forest: ForestTables,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface for `arr_fast_tree`; tensors are [1, H, T, D]."""
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    return attend(q, k, v, forest, scaling)[None], None


def dense_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    forest_mask: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Differentiable tree attention from a bool mask [T, T] or [B, 1, T, T]."""
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=forest_mask, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


def varlen_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    cu_seq_lens_q: Tensor,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Full attention inside each image (or window); tensors are [1, H, N, D].

    Equal neighbouring lengths run as one batched call.
    """
    lengths = cu_seq_lens_q.diff().tolist()
    outputs = []
    start = position = 0
    while position < len(lengths):
        length = lengths[position]
        count = 1
        while position + count < len(lengths) and lengths[position + count] == length:
            count += 1
        span = slice(start, start + length * count)
        q, k, v = (
            x[0, :, span].unflatten(1, (count, length)).transpose(0, 1) for x in (query, key, value)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outputs.append(out.transpose(1, 2).flatten(0, 1))
        start, position = start + length * count, position + count
    return torch.cat(outputs)[None], None


def register() -> None:
    """Makes the three names known to transformers."""
    ALL_ATTENTION_FUNCTIONS.register(TREE, tree_attention)
    ALL_ATTENTION_FUNCTIONS.register(DENSE, dense_attention)
    ALL_ATTENTION_FUNCTIONS.register(VARLEN, varlen_attention)
