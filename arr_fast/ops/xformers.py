"""prefix_attention through xFormers: the ancestors' part by its partial attention, merged in fp32.

Ancestors: `memory_efficient_attention_partial` without a bias, one call per family, grouped heads
as [1, rows, Hkv, group, D]; keys are expanded over the group without a copy. Partials are asked for
in float32, which only xFormers' split-K kernel offers, so it is named; it knows no causal bias
without paged or padded keys, so the own part is computed in plain float32. `merge_attentions`
combines the two; its log-sum-exps are [1, Hkv, group, rows], natural log, float64 beside float32
partials.

Held in tests to the signatures of xFormers 0.0.35 (v0.0.35, 03b91d7d, xformers/ops/fmha). Its
kernels need a GPU; what has been executed of them is said in docs/kernels.md.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from arr_fast.errors import MissingDependencyError
from arr_fast.ops.varlen_plan import families_of, own_part, own_pieces_of

HEAD_DIMS = (16, 32, 64, 128, 256, 512)


def prefix_attention_xformers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    k_pool: Tensor,
    v_pool: Tensor,
    own_start: Tensor,
    runs: Tensor,
    tiles: Tensor,
    scale: float,
) -> Tensor:
    """`prefix_attention` by xFormers; arguments as in `arr_fast.ops.prefix_attention`.

    Raises:
        MissingDependencyError: xFormers is not installed.
        ValueError: q is neither float16 nor bfloat16, or its head dim is not one of HEAD_DIMS.
    """
    fmha = _fmha()
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f'q is {q.dtype}; impl "xformers" takes float16 or bfloat16')
    if q.shape[2] not in HEAD_DIMS:
        raise ValueError(f'q has head dim {q.shape[2]}; impl "xformers" takes {HEAD_DIMS}')
    rows, heads, dim = q.shape
    kv_heads = k.shape[1]
    grouped = q.reshape(rows, kv_heads, heads // kv_heads, dim)
    out = torch.zeros(grouped.shape, dtype=torch.float32, device=q.device)
    lse = torch.zeros(grouped.shape[:3], dtype=torch.float32, device=q.device)
    pieces = own_pieces_of(own_start, tiles)
    if pieces:
        index, out_own, lse_own = own_part(grouped, k, v, pieces, scale)
        out[index], lse[index] = out_own, lse_own
    for family in families_of(runs, tiles):
        index = torch.tensor(family.rows, device=q.device)
        part, part_lse = _partial(
            fmha, grouped[index], family.gather(k, k_pool), family.gather(v, v_pool), scale
        )
        own_lse = lse[index].permute(1, 2, 0)[None].to(part_lse.dtype)
        merged, _ = fmha.merge_attentions(
            [part, out[index][None]], [part_lse, own_lse], write_lse=False
        )
        out[index] = merged[0]
    return out.view(rows, heads, dim).to(q.dtype)


def _fmha() -> Any:
    try:
        return importlib.import_module("xformers.ops.fmha")
    except ImportError as error:
        raise MissingDependencyError("xformers", "cuda") from error


def _partial(fmha: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """q [n, Hkv, group, D] over k, v [m, Hkv, D]: out [1, n, Hkv, group, D], lse [1, Hkv, group,
    n]."""
    expanded = (-1, -1, q.shape[2], -1)
    out, lse = fmha.memory_efficient_attention_partial(
        q[None],
        k[:, :, None].expand(expanded)[None],
        v[:, :, None].expand(expanded)[None],
        attn_bias=None,
        scale=scale,
        # Left to itself, xFormers chooses among kernels that refuse float32 partials.
        op=fmha.triton_splitk.FwOp,
        output_dtype=torch.float32,
    )
    return out, lse
