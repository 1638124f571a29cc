"""The PyTorch implementations: what runs on a CPU, and a fallback anywhere.

prefix_attention. All tiles of one parent form a block of contiguous sibling rows. The block's
ancestor part is one flash call without a mask, with the GQA group folded into the query rows, so
the ancestors' keys are read once for all criteria. The own part is one batched causal flash call
over the sibling segments, padded to a common length (a causal row never sees the padding after
it). The two partial results are merged exactly from their log-sum-exps in float32.

verdict_head. One small GEMM over the label rows; the vocabulary's log-sum-exp streams over chunks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

_VOCAB_CHUNK = 8192
# Segments are padded to a common length only while padding adds at most this share of rows.
_MAX_PADDING = 0.35
# PyTorch's CPU flash kernel computes a causal product in key blocks of 512, hidden or not. Cutting
# the rows into blocks leaves out most of what is hidden; beyond some length there is little of it.
_CAUSAL_ROWS = 192
_CAUSAL_LIMIT = 1024


def prefix_attention_torch(
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
    """`prefix_attention` through PyTorch's flash kernels; see the module's docstring."""
    rows, heads, _ = q.shape
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((rows, heads), float("-inf"), dtype=torch.float32)
    starts = own_start.tolist()
    run_list = runs.tolist()
    segments: list[tuple[int, int, int]] = []
    path_rows = [False] * rows
    for block in _sibling_blocks(tiles.tolist()):
        path = [run for a, b in block.spans for run in run_list[a:b] if run[2]]
        if path:
            keys, values = _gather_path(k, k_pool, path), _gather_path(v, v_pool, path)
            index = _row_index(block.ranges, q.device)
            out[index], lse[index] = _ancestor_part(q[index], keys, values, scale)
            for first, end in block.ranges:
                path_rows[first:end] = [True] * (end - first)
        if block.with_own:
            for first, end in block.ranges:
                segments += _own_segments(starts, first, end)
    for batch in _length_batches(segments):
        index, part, part_lse = _own_part(q, k, v, batch, scale)
        if isinstance(index, slice) and not path_rows[index.start]:
            out[index] = part
            continue
        out[index] = _merged(out[index], lse[index], part, part_lse)
    return out


@dataclass(frozen=True, slots=True)
class _Block:
    """Rows with the same ancestors: ranges (first, end), and the spans of their runs."""

    ranges: tuple[tuple[int, int], ...]
    spans: tuple[tuple[int, int], ...]
    with_own: bool


def _sibling_blocks(tiles: list[list[int]]) -> list[_Block]:
    """Joins split tiles of the same rows, then all tiles with the same ancestors."""
    spans: dict[tuple[int, int], set[tuple[int, int]]] = {}
    own: set[tuple[int, int]] = set()
    for first, count, begin, end, with_own, _ in tiles:
        if count:
            rows = (first, first + count)
            spans.setdefault(rows, set()).add((begin, end))
            if with_own:
                own.add(rows)
    joined: dict[tuple[tuple[tuple[int, int], ...], bool], list[tuple[int, int]]] = {}
    for rows, parts in sorted(spans.items()):
        ranges = joined.setdefault((tuple(sorted(parts)), rows in own), [])
        if ranges and ranges[-1][1] == rows[0]:
            ranges[-1] = (ranges[-1][0], rows[1])
        else:
            ranges.append(rows)
    return [_Block(tuple(ranges), *key) for key, ranges in joined.items()]


def _row_index(ranges: tuple[tuple[int, int], ...], device: torch.device) -> slice | Tensor:
    if len(ranges) == 1:
        return slice(*ranges[0])
    return torch.cat([torch.arange(first, end, device=device) for first, end in ranges])


def _own_segments(starts: list[int], first: int, end: int) -> list[tuple[int, int, int]]:
    """Splits rows [first, end) into (start of the own segment, first row, end row)."""
    segments = []
    row = first
    while row < end:
        stop = row + 1
        while stop < end and starts[stop] == starts[row]:
            stop += 1
        segments.append((starts[row], row, stop))
        row = stop
    return segments


def _length_batches(
    segments: list[tuple[int, int, int]],
) -> Iterator[list[tuple[int, int, int]]]:
    """Groups segments of similar length, so that padding them to one length costs little."""
    batch: list[tuple[int, int, int]] = []
    real = 0
    for segment in sorted(segments, key=lambda s: s[2] - s[0], reverse=True):
        length = segment[2] - segment[0]
        longest = batch[0][2] - batch[0][0] if batch else length
        if batch and longest * (len(batch) + 1) > (real + length) * (1 + _MAX_PADDING):
            yield batch
            batch, real = [], 0
        batch.append(segment)
        real += length
    if batch:
        yield batch


def _gather_path(new: Tensor, pool: Tensor, path: list[list[int]]) -> Tensor:
    pieces = [(pool if source else new)[start : start + n] for source, start, n in path]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _ancestor_part(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """All rows of q [n, Hq, D] to all of keys [m, Hkv, D]; returns out [n, Hq, D], lse [n, Hq]."""
    rows, heads, dim = q.shape
    kv_heads = keys.shape[1]
    group = heads // kv_heads
    folded = q.view(rows, kv_heads, group, dim).permute(1, 2, 0, 3)
    folded = folded.reshape(1, kv_heads, group * rows, dim)
    out, lse = _flash(folded, keys.transpose(0, 1)[None], values.transpose(0, 1)[None], scale)
    out = out.view(kv_heads, group, rows, dim).permute(2, 0, 1, 3).reshape(rows, heads, dim)
    return out, lse.view(kv_heads, group, rows).permute(2, 0, 1).reshape(rows, heads)


def _own_part(
    q: Tensor, k: Tensor, v: Tensor, batch: list[tuple[int, int, int]], scale: float
) -> tuple[slice | Tensor, Tensor, Tensor]:
    """Causal attention inside each segment of a batch.

    Returns:
        (row numbers [n], out [n, Hq, D], lse float32 [n, Hq]) of the rows asked for.
    """
    device = q.device
    if len(batch) == 1:
        start, row, stop = batch[0]
        query, key, value = (x[start:stop].transpose(0, 1)[None] for x in (q, k, v))
        out, lse = _causal(query, key, value, scale)
        wanted = slice(row - start, stop - start)
        return slice(row, stop), out[0].transpose(0, 1)[wanted], lse[0].transpose(0, 1)[wanted]
    longest = max(stop - start for start, _, stop in batch)
    bounds = torch.tensor(batch, device=device)
    offset = bounds[:, :1] + torch.arange(longest, device=device)
    index = torch.minimum(offset, bounds[:, 2:] - 1)
    query, key, value = (x[index].transpose(1, 2) for x in (q, k, v))
    out, lse = _causal(query, key, value, scale)
    is_wanted = (offset >= bounds[:, 1:2]) & (offset < bounds[:, 2:])
    chosen = is_wanted.flatten().nonzero().squeeze(-1)
    rows = index.flatten()[chosen]
    out = out.transpose(1, 2).flatten(0, 1)[chosen]
    return rows, out, lse.transpose(1, 2).flatten(0, 1)[chosen]


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`_flash` with a causal mask over equally many rows and keys; long ones in blocks of rows."""
    rows = q.shape[2]
    if q.device.type != "cpu" or not 2 * _CAUSAL_ROWS <= rows <= _CAUSAL_LIMIT:
        return _flash(q, k, v, scale, is_causal=True)
    parts = []
    for first in range(0, rows, _CAUSAL_ROWS):
        block = slice(first, first + _CAUSAL_ROWS)
        out, lse = _flash(q[:, :, block], k[:, :, block], v[:, :, block], scale, is_causal=True)
        if first:
            before = slice(first)
            past, past_lse = _flash(q[:, :, block], k[:, :, before], v[:, :, before], scale)
            out = _merged(out, lse, past, past_lse)
            lse = torch.logaddexp(lse, past_lse)
        parts.append((out, lse))
    return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)


def _merged(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> Tensor:
    """Attention over two sets of keys from the results [..., D] and log-sum-exps [...] of each."""
    weight = torch.sigmoid(part_lse - lse).unsqueeze(-1)
    return torch.lerp(out.float(), part.float(), weight).to(out.dtype)


def _flash(
    q: Tensor, k: Tensor, v: Tensor, scale: float, is_causal: bool = False
) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T) v for q [B, Hq, n, D], k and v [B, Hkv, m, D]; lse float32 [B, Hq, n].

    PyTorch's CPU flash kernel maps query heads to their key/value head by itself.
    """
    if q.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, is_causal, scale=scale
        )
        return out, lse
    group = q.shape[1] // k.shape[1]
    k, v = (x if group == 1 else x.repeat_interleave(group, dim=1) for x in (k, v))
    scores = (q.float() @ k.float().transpose(-1, -2)) * scale
    if is_causal:
        n, m = scores.shape[-2:]
        hidden = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(m - n + 1)
        scores.masked_fill_(hidden, float("-inf"))
    lse = scores.logsumexp(-1)
    return ((scores - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def verdict_head_torch(
    hidden: Tensor,
    norm_weight: Tensor,
    eps: float,
    unit_offset: bool,
    label_rows: Tensor,
    label_ptr: Tensor,
    vocab_weight: Tensor,
) -> tuple[Tensor, Tensor]:
    """`verdict_head` as a small GEMM; the norm in float32, rounded as transformers rounds it."""
    x = hidden.float()
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    if unit_offset:
        x = (x * (1.0 + norm_weight.float())).to(hidden.dtype)
    else:
        x = norm_weight * x.to(hidden.dtype)
    logits = F.linear(x, label_rows).float()
    bounds = label_ptr.tolist()
    labels = [logits[:, a:b].logsumexp(-1) for a, b in pairwise(bounds)]
    vocab = hidden.new_empty(0, dtype=torch.float32)
    if len(vocab_weight):
        vocab = logits.new_full((len(x),), float("-inf"))
        for chunk in vocab_weight.split(_VOCAB_CHUNK):
            vocab = torch.logaddexp(vocab, F.linear(x, chunk).float().logsumexp(-1))
    return torch.stack(labels, dim=-1), vocab
