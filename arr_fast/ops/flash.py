"""prefix_attention through flash-attn: two variable-length calls and one merge in float32.

The ancestors' part is one call over the families (no mask), the own part one causal call over the
segments; flash-attn aligns the causal mask to the bottom right, which is what rows in the middle of
a segment need. Partials come back in the input dtype, so this impl has an error bound of its own
(one more rounding than the others) and is never chosen by "auto". Log-sum-exps are natural log,
[Hq, rows], but [rows, Hq] from flash-attn's Triton kernels for AMD.

Held in tests to the signature of flash_attn_varlen_func of flash-attn v2.7.0 to v2.8.3 (060c9188,
flash_attn/flash_attn_interface.py). flash-attn itself needs a GPU and has not been executed: see
docs/kernels.md.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from arr_fast.errors import MissingDependencyError
from arr_fast.ops.varlen_plan import families_of, merge_parts, own_pieces_of


def prefix_attention_flash(
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
    """`prefix_attention` by flash-attn; arguments as in `arr_fast.ops.prefix_attention`.

    Raises:
        MissingDependencyError: flash-attn is not installed.
        ValueError: q is neither float16 nor bfloat16, or its head dim is over 256.
    """
    attend = _varlen_func()
    if q.dtype not in (torch.float16, torch.bfloat16):
        raise ValueError(f'q is {q.dtype}; impl "flash" takes float16 or bfloat16')
    if q.shape[2] > 256:
        raise ValueError(f'q has head dim {q.shape[2]}; impl "flash" takes at most 256')
    out = torch.zeros(q.shape, dtype=torch.float32, device=q.device)
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float32, device=q.device)
    families = families_of(runs, tiles)
    if families:
        rows = _index([row for family in families for row in family.rows], q)
        keys = [family.gather(k, k_pool) for family in families]
        values = [family.gather(v, v_pool) for family in families]
        lengths = [len(family.rows) for family in families], [len(key) for key in keys]
        part, part_lse = _call(
            attend, q[rows], torch.cat(keys), torch.cat(values), *lengths, scale, causal=False
        )
        out[rows], lse[rows] = part.float(), part_lse
    pieces = own_pieces_of(own_start, tiles)
    if pieces:
        rows = _index([row for piece in pieces for row in range(piece.row, piece.stop)], q)
        own = _index([row for piece in pieces for row in range(piece.start, piece.stop)], q)
        lengths = [p.stop - p.row for p in pieces], [p.stop - p.start for p in pieces]
        part, part_lse = _call(attend, q[rows], k[own], v[own], *lengths, scale, causal=True)
        out[rows], _ = merge_parts(out[rows], lse[rows], part, part_lse)
    return out.to(q.dtype)


def _varlen_func() -> Callable[..., Any]:
    try:
        module = importlib.import_module("flash_attn")
    except ImportError as error:
        raise MissingDependencyError("flash-attn", "cuda") from error
    function: Callable[..., Any] = module.flash_attn_varlen_func
    return function


def _lse_is_by_row(attend: Callable[..., Any]) -> bool:
    """Whether log-sum-exps come as [rows, Hq]: FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE."""
    return bool(getattr(sys.modules.get(attend.__module__), "USE_TRITON_ROCM", False))


def _call(
    attend: Callable[..., Any],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    *,
    causal: bool,
) -> tuple[Tensor, Tensor]:
    """One variable-length call; returns out [n, Hq, D] and lse float32 [n, Hq]."""
    out, lse, _ = attend(
        q,
        k,
        v,
        cu_seqlens_q=_cumulative(query_lengths, q),
        cu_seqlens_k=_cumulative(key_lengths, q),
        max_seqlen_q=max(query_lengths),
        max_seqlen_k=max(key_lengths),
        dropout_p=0.0,
        softmax_scale=scale,
        causal=causal,
        return_attn_probs=True,
    )
    return out, lse if _lse_is_by_row(attend) else lse.transpose(0, 1)


def _cumulative(lengths: Sequence[int], like: Tensor) -> Tensor:
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=like.device)


def _index(rows: list[int], like: Tensor) -> Tensor:
    return torch.tensor(rows, dtype=torch.int64, device=like.device)
