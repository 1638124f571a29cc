"""Differentiable attention over packed branches that skips what the mask would discard.

A branch sees its tree's prefix and itself, never its siblings, so a dense mask over a row is mostly
False. Here prefixes attend causally, and each branch is one batch entry whose keys are the prefix
and its own tokens. Tests hold it equal to the dense mask. It enters transformers' layers by name.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface

NAME = "shapes_branches"
MASKED = -1e9


@dataclass(frozen=True, slots=True)
class Span:
    """Consecutive tokens of the flattened rows."""

    start: int
    length: int


@dataclass(frozen=True, slots=True)
class Group:
    """Segments of alike length that attend together.

    Attributes:
        queries: int64 [M * S], flat token of each query, padded with the dummy row.
        keys: int64 [M * K], flat token of each key, padded with the dummy row.
        mask: float32 [M, 1, S, K], 0 or MASKED.
        shape: (M, S, K).
    """

    queries: Tensor
    keys: Tensor
    mask: Tensor
    shape: tuple[int, int, int]


def make_group(segments: Sequence[tuple[Span | None, Span]], dummy: int) -> Group:
    """Tables for segments, each with the prefix it hangs from (None for a prefix itself).

    Args:
        segments: (prefix, own) spans.
        dummy: Index of the row of zeros behind the last token.
    """
    count = len(segments)
    own_max = max(own.length for _, own in segments)
    prefix_max = max(prefix.length if prefix else 0 for prefix, _ in segments)
    queries = np.full((count, own_max), dummy, np.int64)
    keys = np.full((count, prefix_max + own_max), dummy, np.int64)
    mask = np.full((count, own_max, prefix_max + own_max), MASKED, np.float32)
    mask[:, :, prefix_max:] = np.where(np.tri(own_max, dtype=bool), 0.0, MASKED)
    for i, (prefix, own) in enumerate(segments):
        queries[i, : own.length] = own.start + np.arange(own.length)
        keys[i, prefix_max : prefix_max + own.length] = queries[i, : own.length]
        if prefix:
            keys[i, : prefix.length] = prefix.start + np.arange(prefix.length)
            mask[i, :, : prefix.length] = 0.0
    return Group(
        torch.from_numpy(queries.ravel()),
        torch.from_numpy(keys.ravel()),
        torch.from_numpy(mask[:, None]),
        (count, own_max, prefix_max + own_max),
    )


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    groups: Sequence[Group] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Attention of transformers' interface; `groups` must cover every token that matters.

    Args:
        module: The attention module; not used.
        query: [B, Hq, T, D].
        key: [B, Hkv, T, D].
        value: Like `key`.
        attention_mask: Must be None.
        scaling: Factor of the scores.
        dropout: Must be 0.
        groups: What attends to what.

    Returns:
        [B, T, Hq, D], zero where no group has the token, and None.
    """
    batch, heads, length, size = query.shape
    kv_heads = key.shape[1]
    shared = heads // kv_heads
    q = F.pad(query.transpose(1, 2).reshape(batch * length, heads * size), (0, 0, 0, 1))
    k = F.pad(key.transpose(1, 2).reshape(batch * length, kv_heads * size), (0, 0, 0, 1))
    v = F.pad(value.transpose(1, 2).reshape(batch * length, kv_heads * size), (0, 0, 0, 1))
    places, parts = [], []
    for group in groups:
        count, own, reach = group.shape
        qs = q.index_select(0, group.queries).view(count, own, kv_heads, shared, size)
        qs = qs.permute(0, 2, 3, 1, 4).reshape(count, kv_heads, shared * own, size)
        ks = k.index_select(0, group.keys).view(count, reach, kv_heads, size).transpose(1, 2)
        vs = v.index_select(0, group.keys).view(count, reach, kv_heads, size).transpose(1, 2)
        scores = qs @ ks.transpose(-1, -2) * scaling
        scores = scores.view(count, kv_heads * shared, own, reach) + group.mask
        weights = scores.softmax(-1).view(count, kv_heads, shared * own, reach)
        mixed = (weights @ vs).view(count, kv_heads, shared, own, size)
        parts.append(mixed.permute(0, 3, 1, 2, 4).reshape(count * own, heads * size))
        places.append(group.queries)
    out = q.new_zeros(q.shape).index_copy(0, torch.cat(places), torch.cat(parts))
    return out[:-1].view(batch, length, heads, size), None


AttentionInterface.register(NAME, attend)
