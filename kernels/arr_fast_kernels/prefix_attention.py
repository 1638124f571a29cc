"""Tree attention over a packed ragged forest, forward only.

    out[i, h] = sum_j softmax_j(scale * <q[i, h], k[j, h // group]>) v[j, h // group]

where j runs over the rows of all ancestors of row i's segment and over the rows `own_start[i] .. i`
of its own segment.

Legend: T new rows, C pool rows, Hq query heads, Hkv key heads, group = Hq / Hkv, D head dim, R
runs, N tiles, M query slots of a tile (row-major over (row, head of the group)), K keys of one
block. Strides: o, q, k, v, and kp, vp of the pools; t is a row's, h a head's.

One program handles one tile and one KV head. A tile gathers contiguous rows of sibling segments
times the whole GQA group, so every ancestor key and value is read once per tile, whatever the
number of siblings in it. One fp32 state (running max, running sum, accumulator) is carried from the
first ancestor's first key to the last own key; nothing is merged through memory, unless the host
splits a tile's runs over several programs (`split_slot >= 0`), whose fp32 partials
`_merge_splits_kernel` combines.

Limits: D <= 256 (padded to a power of two in registers only), rows of a tile * group <= BLOCK_M.
Scores and accumulators are fp32; probabilities are cast to the values' dtype before the second
product, as in FlashAttention.
Idea: FlashAttention-2's online softmax (arXiv 2307.08691); shared-prefix tiles as in Hydragen
(arXiv 2402.05099), without its merge.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from arr_fast_kernels.configs import (
    MAX_SPLIT_TILES,
    AttentionConfig,
    arch_of,
    attention_config,
    dot_precision,
    padded_head_dim,
)
from arr_fast_kernels.launching import on_its_device

MERGE_BLOCK_M = 16  # 16 x 256 fp32 accumulators are 32 registers a thread on 4 warps


@triton.jit
def _attend_keys(
    running_max_M,
    running_sum_M,
    accumulator_MD,
    q_MD,
    k_ptr,
    v_ptr,
    stride_kt,
    stride_vt,
    first_key,
    end_key,
    row_M,
    own_start_M,
    scale_log2,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    IS_OWN: tl.constexpr,
):
    """Adds the keys first_key .. end_key - 1 to the softmax state; IS_OWN applies the causal,
    block-diagonal mask."""
    offsets_d = tl.arange(0, BLOCK_D)
    offsets_n = tl.arange(0, BLOCK_N)
    for block_start in tl.range(first_key, end_key, BLOCK_N):
        key_N = block_start + offsets_n
        is_key_N = key_N < end_key
        is_loaded_ND = is_key_N[:, None]
        if HEAD_DIM != BLOCK_D:
            is_loaded_ND = is_loaded_ND & (offsets_d < HEAD_DIM)[None, :]
        offset_N = key_N.to(tl.int64)
        k_ND = tl.load(
            k_ptr + offset_N[:, None] * stride_kt + offsets_d[None, :],
            mask=is_loaded_ND,
            other=0.0,
        )
        scores_MN = tl.dot(q_MD, k_ND.T, input_precision=INPUT_PRECISION) * scale_log2
        is_visible_MN = is_key_N[None, :]
        if IS_OWN:
            is_visible_MN = (
                is_visible_MN
                & (key_N[None, :] <= row_M[:, None])
                & (key_N[None, :] >= own_start_M[:, None])
            )
        scores_MN = tl.where(is_visible_MN, scores_MN, float("-inf"))
        block_max_M = tl.maximum(running_max_M, tl.max(scores_MN, 1))
        # A row that has seen no key yet keeps max = -inf; subtracting 0 there avoids inf - inf.
        safe_max_M = tl.where(block_max_M == float("-inf"), 0.0, block_max_M)
        rescale_M = tl.exp2(running_max_M - safe_max_M)
        probs_MN = tl.exp2(scores_MN - safe_max_M[:, None])
        running_sum_M = running_sum_M * rescale_M + tl.sum(probs_MN, 1)
        v_ND = tl.load(
            v_ptr + offset_N[:, None] * stride_vt + offsets_d[None, :],
            mask=is_loaded_ND,
            other=0.0,
        )
        accumulator_MD = accumulator_MD * rescale_M[:, None]
        accumulator_MD = tl.dot(
            probs_MN.to(v_ND.dtype), v_ND, accumulator_MD, input_precision=INPUT_PRECISION
        )
        running_max_M = block_max_M
    return running_max_M, running_sum_M, accumulator_MD


@triton.jit
def _prefix_attention_kernel(
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    slot_row_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    k_pool_ptr,
    v_pool_ptr,
    own_start_ptr,
    runs_ptr,
    tiles_ptr,
    stride_ot,
    stride_oh,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_kpt,
    stride_kph,
    stride_vpt,
    stride_vph,
    kv_heads,
    scale_log2,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
    HAS_SPLITS: tl.constexpr,
):
    """One tile (axis 0, so neighbours share their parent's keys in L2) and one KV head (axis 1)."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    first_row = tl.load(tiles_ptr + tile * 6)
    tile_rows = tl.load(tiles_ptr + tile * 6 + 1)
    run_begin = tl.load(tiles_ptr + tile * 6 + 2)
    run_end = tl.load(tiles_ptr + tile * 6 + 3)
    with_own = tl.load(tiles_ptr + tile * 6 + 4)
    split_slot = tl.load(tiles_ptr + tile * 6 + 5)
    if tile_rows == 0:  # padding of the tile table
        return
    scale_log2 = tl.cast(scale_log2, tl.float32)  # Inductor passes Python floats as fp64

    offsets_m = tl.arange(0, BLOCK_M)
    offsets_d = tl.arange(0, BLOCK_D)
    is_row_M = offsets_m < tile_rows * GROUP
    row_M = first_row + offsets_m // GROUP
    row64_M = row_M.to(tl.int64)
    head_M = kv_head * GROUP + offsets_m % GROUP
    is_stored_MD = is_row_M[:, None] & (offsets_d < HEAD_DIM)[None, :]
    q_MD = tl.load(
        q_ptr + (row64_M * stride_qt + head_M * stride_qh)[:, None] + offsets_d[None, :],
        mask=is_stored_MD,
        other=0.0,
    )
    # Slots past the tile's rows see no own key: theirs start after every row.
    own_start_M = tl.load(own_start_ptr + row64_M, mask=is_row_M, other=2147483647)

    running_max_M = tl.full([BLOCK_M], float("-inf"), tl.float32)
    running_sum_M = tl.zeros([BLOCK_M], tl.float32)
    accumulator_MD = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    k_ptr += kv_head * stride_kh
    v_ptr += kv_head * stride_vh
    k_pool_ptr += kv_head * stride_kph
    v_pool_ptr += kv_head * stride_vph

    for run in range(run_begin, run_end):
        is_pooled = tl.load(runs_ptr + run * 3) == 1
        first_key = tl.load(runs_ptr + run * 3 + 1)
        end_key = first_key + tl.load(runs_ptr + run * 3 + 2)
        running_max_M, running_sum_M, accumulator_MD = _attend_keys(
            running_max_M,
            running_sum_M,
            accumulator_MD,
            q_MD,
            tl.where(is_pooled, k_pool_ptr, k_ptr),
            tl.where(is_pooled, v_pool_ptr, v_ptr),
            tl.where(is_pooled, stride_kpt, stride_kt),
            tl.where(is_pooled, stride_vpt, stride_vt),
            first_key,
            end_key,
            row_M,
            own_start_M,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_N,
            INPUT_PRECISION,
            IS_OWN=False,
        )
    # Rows ascend and own_start ascends with them, so the first row's start bounds the tile's own
    # keys from below.
    first_own = tl.load(own_start_ptr + first_row)
    running_max_M, running_sum_M, accumulator_MD = _attend_keys(
        running_max_M,
        running_sum_M,
        accumulator_MD,
        q_MD,
        k_ptr,
        v_ptr,
        stride_kt,
        stride_vt,
        first_own,
        tl.where(with_own == 1, first_row + tile_rows, first_own),
        row_M,
        own_start_M,
        scale_log2,
        HEAD_DIM,
        BLOCK_D,
        BLOCK_N,
        INPUT_PRECISION,
        IS_OWN=True,
    )

    is_empty_M = running_sum_M == 0.0
    out_MD = accumulator_MD / tl.where(is_empty_M, 1.0, running_sum_M)[:, None]
    if HAS_SPLITS and split_slot >= 0:
        slot = split_slot * kv_heads + kv_head
        lse_M = tl.where(is_empty_M, float("-inf"), running_max_M + tl.log2(running_sum_M))
        tl.store(partial_lse_ptr + slot * BLOCK_M + offsets_m, lse_M)
        partial_offset_M = (slot * BLOCK_M + offsets_m) * HEAD_DIM
        tl.store(
            partial_ptr + partial_offset_M[:, None] + offsets_d[None, :], out_MD, mask=is_stored_MD
        )
        tl.store(slot_row_ptr + split_slot * 2, first_row)
        tl.store(slot_row_ptr + split_slot * 2 + 1, tile_rows)
    else:
        tl.store(
            out_ptr + (row64_M * stride_ot + head_M * stride_oh)[:, None] + offsets_d[None, :],
            out_MD.to(out_ptr.dtype.element_ty),
            mask=is_stored_MD,
        )


@triton.jit
def _merge_splits_kernel(
    out_ptr,
    partial_ptr,
    partial_lse_ptr,
    slot_row_ptr,
    stride_ot,
    stride_oh,
    kv_heads,
    slots,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MERGE_M: tl.constexpr,
):
    """Merges the partials of one split tile, in slot order: out = sum_s 2^(lse_s - lse) out_s.

    slot_row [slots, 2] holds (first row, rows) of the slots that were written, -1 elsewhere. The
    parts of one tile hold consecutive slots; the program of the first one does the work.
    """
    slot = tl.program_id(0)
    kv_head = tl.program_id(1).to(tl.int64)
    first_row = tl.load(slot_row_ptr + slot * 2)
    if first_row < 0:
        return
    if slot > 0:
        previous_row = tl.load(slot_row_ptr + slot * 2 - 2)
        if previous_row == first_row:
            return
    tile_rows = tl.load(slot_row_ptr + slot * 2 + 1)

    offsets_m = tl.program_id(2) * MERGE_M + tl.arange(0, MERGE_M)
    offsets_d = tl.arange(0, BLOCK_D)
    is_row_M = offsets_m < tile_rows * GROUP
    is_stored_MD = is_row_M[:, None] & (offsets_d < HEAD_DIM)[None, :]
    running_max_M = tl.full([MERGE_M], float("-inf"), tl.float32)
    running_sum_M = tl.zeros([MERGE_M], tl.float32)
    accumulator_MD = tl.zeros([MERGE_M, BLOCK_D], tl.float32)
    part = slot
    part_row = first_row
    while part_row == first_row:
        base_M = (part * kv_heads + kv_head) * BLOCK_M + offsets_m
        lse_M = tl.load(partial_lse_ptr + base_M, mask=is_row_M, other=float("-inf"))
        partial_MD = tl.load(
            partial_ptr + (base_M * HEAD_DIM)[:, None] + offsets_d[None, :],
            mask=is_stored_MD,
            other=0.0,
        )
        new_max_M = tl.maximum(running_max_M, lse_M)
        safe_max_M = tl.where(new_max_M == float("-inf"), 0.0, new_max_M)
        rescale_M = tl.exp2(running_max_M - safe_max_M)
        weight_M = tl.exp2(lse_M - safe_max_M)
        running_sum_M = running_sum_M * rescale_M + weight_M
        accumulator_MD = accumulator_MD * rescale_M[:, None] + partial_MD * weight_M[:, None]
        running_max_M = new_max_M
        part += 1
        part_row = tl.load(slot_row_ptr + part * 2, mask=part < slots, other=-1)
    out_MD = accumulator_MD / tl.where(running_sum_M == 0.0, 1.0, running_sum_M)[:, None]
    row_M = (first_row + offsets_m // GROUP).to(tl.int64)
    head_M = kv_head * GROUP + offsets_m % GROUP
    tl.store(
        out_ptr + (row_M * stride_ot + head_M * stride_oh)[:, None] + offsets_d[None, :],
        out_MD.to(out_ptr.dtype.element_ty),
        mask=is_stored_MD,
    )


@on_its_device
def prefix_attention(
    *,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    own_start: torch.Tensor,
    runs: torch.Tensor,
    tiles: torch.Tensor,
    scale: float,
    config: AttentionConfig | None = None,
) -> torch.Tensor:
    """Launches tree attention; shapes and tables are those of `arr_fast.ops.prefix_attention`,
    validated there.

    Args:
        q: [T, Hq, D] queries, rotary applied; fp16, bf16 or fp32.
        k: [T, Hkv, D] keys of the new rows, same dtype.
        v: [T, Hkv, D] values of the new rows, same dtype.
        k_pool: [C, Hkv, D] keys of cached rows, C may be 0.
        v_pool: [C, Hkv, D] values of cached rows.
        own_start: i32 [T]; row i sees the new rows own_start[i] .. i.
        runs: i32 [R, 3] of (0 new | 1 pool, first row, length).
        tiles: i32 [N, 6] of (first row, rows, run_begin, run_end, with_own, split_slot | -1). The
            parts of a split tile hold consecutive slots of 0 .. N - 1, and exactly one of them has
            with_own = 1. At most MAX_SPLIT_TILES tiles in a table with splits.
        scale: factor of the scores, usually 1 / sqrt(D).
        config: block sizes; None takes the shipped ones for this device. Tiles must have been cut
            for its block_m.

    Returns:
        [T, Hq, D] in q's dtype; rows that no tile covers are zero.
    """
    rows, query_heads, head_dim = q.shape
    kv_heads = k.shape[1]
    tile_count = tiles.shape[0]
    arch = arch_of(q.device)
    config = config or attention_config(arch, head_dim, q.dtype)
    q, k, v, k_pool, v_pool = (
        t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v, k_pool, v_pool)
    )
    own_start, runs, tiles = (table.contiguous() for table in (own_start, runs, tiles))
    out = torch.zeros((rows, query_heads, head_dim), dtype=q.dtype, device=q.device)
    if rows == 0 or tile_count == 0:
        return out
    # The number of slots is known on the device only. Splits serve forests with too few tiles for
    # the card, so a small table bounds the scratch memory and a large one needs none.
    has_splits = tile_count <= MAX_SPLIT_TILES
    slots = tile_count if has_splits else 0
    partial = q.new_empty((slots, kv_heads, config.block_m, head_dim), dtype=torch.float32)
    partial_lse = q.new_empty((slots, kv_heads, config.block_m), dtype=torch.float32)
    slot_row = torch.full((slots, 2), -1, dtype=torch.int32, device=q.device)
    group = query_heads // kv_heads
    block_d = padded_head_dim(head_dim)
    _prefix_attention_kernel[(tile_count, kv_heads)](
        out_ptr=out,
        partial_ptr=partial,
        partial_lse_ptr=partial_lse,
        slot_row_ptr=slot_row,
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        k_pool_ptr=k_pool,
        v_pool_ptr=v_pool,
        own_start_ptr=own_start,
        runs_ptr=runs,
        tiles_ptr=tiles,
        stride_ot=out.stride(0),
        stride_oh=out.stride(1),
        stride_qt=q.stride(0),
        stride_qh=q.stride(1),
        stride_kt=k.stride(0),
        stride_kh=k.stride(1),
        stride_vt=v.stride(0),
        stride_vh=v.stride(1),
        stride_kpt=k_pool.stride(0),
        stride_kph=k_pool.stride(1),
        stride_vpt=v_pool.stride(0),
        stride_vph=v_pool.stride(1),
        kv_heads=kv_heads,
        scale_log2=scale * math.log2(math.e),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=config.block_m,
        BLOCK_N=config.block_n,
        INPUT_PRECISION=dot_precision(arch, head_dim),
        HAS_SPLITS=has_splits,
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    if has_splits:
        _merge_splits_kernel[(slots, kv_heads, triton.cdiv(config.block_m, MERGE_BLOCK_M))](
            out_ptr=out,
            partial_ptr=partial,
            partial_lse_ptr=partial_lse,
            slot_row_ptr=slot_row,
            stride_ot=out.stride(0),
            stride_oh=out.stride(1),
            kv_heads=kv_heads,
            slots=slots,
            GROUP=group,
            HEAD_DIM=head_dim,
            BLOCK_D=block_d,
            BLOCK_M=config.block_m,
            MERGE_M=MERGE_BLOCK_M,
            num_warps=4,
            enable_fp_fusion=True,
        )
    return out
