"""fp64 oracles of the inference ops: written for clarity, one row at a time, and never fast."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor


def prefix_attention_reference(
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
    """`prefix_attention` in float64, row by row; returns q's dtype.

    Split tiles of the same rows are gathered first, so a split cannot change the result.
    """
    rows, heads, dim = q.shape
    group = heads // k.shape[1]
    keys = torch.cat([k, k_pool]).double().repeat_interleave(group, dim=1)
    values = torch.cat([v, v_pool]).double().repeat_interleave(group, dim=1)
    visible: list[list[int]] = [[] for _ in range(rows)]
    covered = [False] * rows
    starts = own_start.tolist()
    run_list = runs.tolist()
    for first, count, begin, end, with_own, _ in tiles.tolist():
        for row in range(first, first + count):
            covered[row] = True
            for source, start, length in run_list[begin:end]:
                offset = start + rows * source
                visible[row] += range(offset, offset + length)
            if with_own:
                visible[row] += range(starts[row], row + 1)
    out = torch.zeros(rows, heads, dim, dtype=torch.float64, device=q.device)
    for row in range(rows):
        if not covered[row]:
            continue
        index = torch.tensor(visible[row], device=q.device)
        scores = torch.einsum("hd,nhd->hn", q[row].double(), keys[index]) * scale
        out[row] = torch.einsum("hn,nhd->hd", scores.softmax(-1), values[index])
    return out.to(q.dtype)


def verdict_head_reference(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    unit_offset: bool,
    label_rows: Tensor,
    label_ptr: Tensor,
    vocab_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """`verdict_head` in float64; returns float32."""
    x = hidden.double()
    x = x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    x = x * (norm_weight.double() + (1.0 if unit_offset else 0.0))
    logits = x @ label_rows.double().T
    bounds = label_ptr.tolist()
    labels = [logits[:, a:b].logsumexp(-1) for a, b in pairwise(bounds)]
    vocab = (x @ vocab_weight.double().T).logsumexp(-1) if len(vocab_weight) else x.new_empty(0)
    return torch.stack(labels, dim=-1).float(), vocab.float()
