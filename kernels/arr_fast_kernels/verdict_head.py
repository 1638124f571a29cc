"""Final norm, label logits and optional log-sum-exp over the vocabulary: logits are never written.

    x = hidden * rsqrt(mean(hidden^2) + eps) * (weight | 1 + weight)
    label[l] = log sum_{r in label l} exp(<x, label_row[r]>)
    vocab    = log sum_v exp(<x, vocab_row[v]>)

Legend: N read rows, H hidden size, R label rows (token variants), L labels, V vocabulary, S
vocabulary parts.

`_label_kernel` reads a row of hidden once: the norm's factor is one number per row, so the dot
products run over unnormed values and are scaled at the end, in fp32 throughout. With a vocabulary
it also leaves the normed row [N, H] in hidden's dtype for `_vocab_kernel`, a GEMM whose epilogue
keeps one online (max, sum) per row over a fixed part of the vocabulary, and `_vocab_merge_kernel`
combines the S parts. A part is a fixed number of tokens, so a row's result does not depend on its
batch.
Limits: R <= 64, H any. Memory beyond inputs and outputs: N H elements and 8 N S bytes, S = V / 512;
never N V.
Idea: cut-cross-entropy (arXiv 2411.09009) without its backward; indexed dot and log-sum-exp kept
apart as there.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arr_fast_kernels.configs import (
    LABEL_BLOCK_H,
    LABEL_WARPS,
    VOCAB_PART,
    VocabConfig,
    arch_of,
    dot_precision,
    vocab_config,
)
from arr_fast_kernels.launching import on_its_device

MAX_LABEL_ROWS = 64


@triton.jit
def _norm_weight(weight_ptr, offsets_h, is_column_H, UNIT_OFFSET: tl.constexpr):
    """The norm's weight in fp32; Gemma's convention stores it minus one."""
    weight_H = tl.load(weight_ptr + offsets_h, mask=is_column_H, other=0.0).to(tl.float32)
    if UNIT_OFFSET:
        weight_H += 1.0
    return weight_H


@triton.jit
def _label_kernel(
    label_logits_ptr,
    normed_ptr,
    hidden_ptr,
    weight_ptr,
    label_rows_ptr,
    label_ptr_ptr,
    stride_hn,
    stride_lr,
    hidden_size,
    label_count,
    rows_of_labels,
    eps,
    UNIT_OFFSET: tl.constexpr,
    WRITE_NORMED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """One read row: norm, dots with the label rows, log-sum-exp per label."""
    row = tl.program_id(0).to(tl.int64)
    eps = tl.cast(eps, tl.float32)  # Inductor passes Python floats as fp64
    offsets_r = tl.arange(0, BLOCK_R)
    is_label_row_R = offsets_r < rows_of_labels
    square_H = tl.zeros([BLOCK_H], tl.float32)
    dot_RH = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for start in range(0, hidden_size, BLOCK_H):
        offsets_h = start + tl.arange(0, BLOCK_H)
        is_column_H = offsets_h < hidden_size
        hidden_H = tl.load(
            hidden_ptr + row * stride_hn + offsets_h, mask=is_column_H, other=0.0
        ).to(tl.float32)
        square_H += hidden_H * hidden_H
        scaled_H = hidden_H * _norm_weight(weight_ptr, offsets_h, is_column_H, UNIT_OFFSET)
        labels_RH = tl.load(
            label_rows_ptr + offsets_r.to(tl.int64)[:, None] * stride_lr + offsets_h[None, :],
            mask=is_label_row_R[:, None] & is_column_H[None, :],
            other=0.0,
        ).to(tl.float32)
        dot_RH += scaled_H[None, :] * labels_RH
    factor = 1.0 / tl.sqrt(tl.sum(square_H) / hidden_size + eps)
    logit_R = tl.sum(dot_RH, 1) * factor

    for label in range(0, label_count):
        begin = tl.load(label_ptr_ptr + label)
        end = tl.load(label_ptr_ptr + label + 1)
        variant_R = tl.where((offsets_r >= begin) & (offsets_r < end), logit_R, float("-inf"))
        largest = tl.max(variant_R)
        log_sum = largest + tl.log(tl.sum(tl.exp(variant_R - largest)))
        tl.store(label_logits_ptr + row * label_count + label, log_sum)

    if WRITE_NORMED:
        for start in range(0, hidden_size, BLOCK_H):
            offsets_h = start + tl.arange(0, BLOCK_H)
            is_column_H = offsets_h < hidden_size
            hidden_H = tl.load(
                hidden_ptr + row * stride_hn + offsets_h, mask=is_column_H, other=0.0
            ).to(tl.float32)
            normed_H = (
                hidden_H * factor * _norm_weight(weight_ptr, offsets_h, is_column_H, UNIT_OFFSET)
            )
            tl.store(
                normed_ptr + row * hidden_size + offsets_h,
                normed_H.to(normed_ptr.dtype.element_ty),
                mask=is_column_H,
            )


@triton.jit
def _vocab_kernel(
    part_max_ptr,
    part_sum_ptr,
    normed_ptr,
    vocab_ptr,
    stride_vv,
    rows,
    vocab,
    hidden_size,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PART: tl.constexpr,
    INPUT_PRECISION: tl.constexpr,
):
    """BLOCK_N rows against one part of the vocabulary; row tiles run fastest, so a part stays in L2
    for all of them."""
    row_tile = tl.program_id(0)
    part = tl.program_id(1)
    row_N = row_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    is_row_N = row_N < rows
    offset_N = row_N.to(tl.int64) * hidden_size
    running_max_N = tl.full([BLOCK_N], float("-inf"), tl.float32)
    running_sum_N = tl.zeros([BLOCK_N], tl.float32)
    for first in range(0, PART, BLOCK_V):
        token_V = part * PART + first + tl.arange(0, BLOCK_V)
        is_token_V = token_V < vocab
        offset_V = token_V.to(tl.int64) * stride_vv
        logits_NV = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        for start in tl.range(0, hidden_size, BLOCK_H):
            offsets_h = start + tl.arange(0, BLOCK_H)
            is_column_H = offsets_h < hidden_size
            x_NH = tl.load(
                normed_ptr + offset_N[:, None] + offsets_h[None, :],
                mask=is_row_N[:, None] & is_column_H[None, :],
                other=0.0,
            )
            w_VH = tl.load(
                vocab_ptr + offset_V[:, None] + offsets_h[None, :],
                mask=is_token_V[:, None] & is_column_H[None, :],
                other=0.0,
            )
            logits_NV = tl.dot(x_NH, w_VH.T, logits_NV, input_precision=INPUT_PRECISION)
        logits_NV = tl.where(is_token_V[None, :], logits_NV, float("-inf"))
        tile_max_N = tl.maximum(running_max_N, tl.max(logits_NV, 1))
        # Only a tile wholly past the vocabulary leaves -inf here; subtracting 0 there avoids inf -
        # inf.
        safe_max_N = tl.where(tile_max_N == float("-inf"), 0.0, tile_max_N)
        tile_sum_N = tl.sum(tl.exp(logits_NV - safe_max_N[:, None]), 1)
        running_sum_N = running_sum_N * tl.exp(running_max_N - safe_max_N) + tile_sum_N
        running_max_N = tile_max_N
    offset = part.to(tl.int64) * rows + row_N
    tl.store(part_max_ptr + offset, running_max_N, mask=is_row_N)
    tl.store(part_sum_ptr + offset, running_sum_N, mask=is_row_N)


@triton.jit
def _vocab_merge_kernel(
    vocab_lse_ptr, part_max_ptr, part_sum_ptr, rows, parts, BLOCK_S: tl.constexpr
):
    """Log-sum-exp of one row over the parts."""
    row = tl.program_id(0)
    running_max_S = tl.full([BLOCK_S], float("-inf"), tl.float32)
    running_sum_S = tl.zeros([BLOCK_S], tl.float32)
    for start in range(0, parts, BLOCK_S):
        part_S = start + tl.arange(0, BLOCK_S)
        is_part_S = part_S < parts
        offset_S = part_S.to(tl.int64) * rows + row
        part_max_S = tl.load(part_max_ptr + offset_S, mask=is_part_S, other=float("-inf"))
        part_sum_S = tl.load(part_sum_ptr + offset_S, mask=is_part_S, other=0.0)
        new_max_S = tl.maximum(running_max_S, part_max_S)
        safe_max_S = tl.where(new_max_S == float("-inf"), 0.0, new_max_S)
        running_sum_S = running_sum_S * tl.exp(running_max_S - safe_max_S) + part_sum_S * tl.exp(
            part_max_S - safe_max_S
        )
        running_max_S = new_max_S
    largest = tl.max(running_max_S)
    total = tl.sum(running_sum_S * tl.exp(running_max_S - largest))
    tl.store(vocab_lse_ptr + row, largest + tl.log(total))


@on_its_device
def verdict_head(
    *,
    hidden: torch.Tensor,
    norm_weight: torch.Tensor,
    eps: float,
    unit_offset: bool,
    label_rows: torch.Tensor,
    label_ptr: torch.Tensor,
    vocab_weight: torch.Tensor,
    config: VocabConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the head; arguments are those of `arr_fast.ops.verdict_head`, validated there.

    Args:
        hidden: [N, H] decoder output at the read rows; fp16, bf16 or fp32.
        norm_weight: [H] RMSNorm weight.
        eps: RMSNorm epsilon.
        unit_offset: the weight is 1 + norm_weight.
        label_rows: [R, H] gathered output-embedding rows, R <= 64.
        label_ptr: i32 [L + 1]; rows label_ptr[l] .. label_ptr[l + 1] - 1 are the variants of label
            l.
        vocab_weight: [V, H], or [0, H] when no log-sum-exp over the vocabulary is asked for.
        config: vocabulary block sizes; None takes the shipped ones for this device and N.

    Returns:
        (label logits fp32 [N, L], log-sum-exp over the vocabulary fp32 [N], or [0] when not asked
        for).

    Raises:
        ValueError: label_rows has more than 64 rows.
    """
    rows, hidden_size = hidden.shape
    label_count = label_ptr.shape[0] - 1
    vocab = vocab_weight.shape[0]
    if label_rows.shape[0] > MAX_LABEL_ROWS:
        raise ValueError(f"label_rows has {label_rows.shape[0]} rows, at most {MAX_LABEL_ROWS} fit")
    label_logits = torch.empty((rows, label_count), dtype=torch.float32, device=hidden.device)
    vocab_lse = torch.empty(rows if vocab else 0, dtype=torch.float32, device=hidden.device)
    if rows == 0:
        return label_logits, vocab_lse
    hidden, label_rows, vocab_weight, norm_weight = (
        t if t.stride(-1) == 1 else t.contiguous()
        for t in (hidden, label_rows, vocab_weight, norm_weight)
    )
    label_ptr = label_ptr.contiguous()
    normed = torch.empty(
        (rows if vocab else 0, hidden_size), dtype=hidden.dtype, device=hidden.device
    )
    _label_kernel[(rows,)](
        label_logits_ptr=label_logits,
        normed_ptr=normed,
        hidden_ptr=hidden,
        weight_ptr=norm_weight,
        label_rows_ptr=label_rows,
        label_ptr_ptr=label_ptr,
        stride_hn=hidden.stride(0),
        stride_lr=label_rows.stride(0),
        hidden_size=hidden_size,
        label_count=label_count,
        rows_of_labels=label_rows.shape[0],
        eps=eps,
        UNIT_OFFSET=unit_offset,
        WRITE_NORMED=vocab > 0,
        BLOCK_R=triton.next_power_of_2(label_rows.shape[0]),
        BLOCK_H=LABEL_BLOCK_H,
        num_warps=LABEL_WARPS,
        enable_fp_fusion=True,
    )
    if vocab == 0:
        return label_logits, vocab_lse
    arch = arch_of(hidden.device)
    config = config or vocab_config(arch, rows, hidden.dtype)
    parts = triton.cdiv(vocab, VOCAB_PART)
    part_max = torch.empty((parts, rows), dtype=torch.float32, device=hidden.device)
    part_sum = torch.empty((parts, rows), dtype=torch.float32, device=hidden.device)
    _vocab_kernel[(triton.cdiv(rows, config.block_n), parts)](
        part_max_ptr=part_max,
        part_sum_ptr=part_sum,
        normed_ptr=normed,
        vocab_ptr=vocab_weight,
        stride_vv=vocab_weight.stride(0),
        rows=rows,
        vocab=vocab,
        hidden_size=hidden_size,
        BLOCK_N=config.block_n,
        BLOCK_V=config.block_v,
        BLOCK_H=config.block_h,
        PART=VOCAB_PART,
        INPUT_PRECISION=dot_precision(arch),
        num_warps=config.num_warps,
        num_stages=config.num_stages,
        enable_fp_fusion=True,
    )
    _vocab_merge_kernel[(rows,)](
        vocab_lse_ptr=vocab_lse,
        part_max_ptr=part_max,
        part_sum_ptr=part_sum,
        rows=rows,
        parts=parts,
        BLOCK_S=128,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return label_logits, vocab_lse
