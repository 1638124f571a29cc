"""prefix_attention against masked SDPA and K separate SDPA calls: `pytest
benches/bench_prefix_attention.py`.

One prefix and K = 20 criteria of 13 to 40 tokens; 8 query heads over 4. On a GPU flash-attn (our
backend) and FlexAttention join. The gate is dense attention in float64 on the same inputs.
"""

from __future__ import annotations

import importlib.util
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arr_fast.ops.prefix_attention import prefix_attention
from benches.measure import report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
QUERY_HEADS, KV_HEADS, CRITERIA = 8, 4, 20


@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("prefix", [600, 2000])
def test_prefix_attention(prefix: int, head_dim: int, benchmark: Any) -> None:
    """The prefix is cached, as after its own prefill: only the criteria have queries."""
    rng = random.Random(0)
    lengths = [rng.randint(13, 40) for _ in range(CRITERIA)]
    starts = [sum(lengths[:i]) for i in range(CRITERIA)]
    rows = sum(lengths)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int, heads: int) -> Tensor:
        drawn = torch.randn(count, heads, head_dim, generator=generator)
        return drawn.to(device=DEVICE, dtype=DTYPE)

    q, k, v = draw(rows, QUERY_HEADS), draw(rows, KV_HEADS), draw(rows, KV_HEADS)
    k_pool, v_pool = draw(prefix, KV_HEADS), draw(prefix, KV_HEADS)
    scale = head_dim**-0.5
    impl = "triton" if DEVICE == "cuda" else "torch"
    tables = make_tables(prefix, starts, lengths, rows_per_tile(head_dim))
    keys, values = torch.cat([k_pool, k]), torch.cat([v_pool, v])
    mask = make_mask(prefix, starts, lengths)

    def ours(chosen: str = impl) -> Tensor:
        return prefix_attention(q, k, v, k_pool, v_pool, *tables, scale, chosen)

    def masked() -> Tensor:
        return F.scaled_dot_product_attention(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            attn_mask=mask,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)

    def separate() -> Tensor:
        parts = []
        for start, length in zip(starts, lengths, strict=True):
            own = slice(start, start + length)
            parts.append(
                F.scaled_dot_product_attention(
                    q[own].transpose(0, 1)[None],
                    torch.cat([k_pool, k[own]]).transpose(0, 1)[None],
                    torch.cat([v_pool, v[own]]).transpose(0, 1)[None],
                    attn_mask=causal[start],
                    scale=scale,
                    enable_gqa=True,
                )[0].transpose(0, 1)
            )
        return torch.cat(parts)

    causal = {
        start: torch.ones(length, prefix + length, dtype=torch.bool, device=DEVICE).tril(prefix)
        for start, length in zip(starts, lengths, strict=True)
    }
    exact = dense(q, keys, values, mask, scale, torch.float64)
    allowed = (dense(q, keys, values, mask, scale, DTYPE).double() - exact).abs().max()
    bound = allowed + 8 * torch.finfo(DTYPE).eps * values.abs().max()
    runs: dict[str, Callable[[], Tensor]] = {
        "ours": ours,
        "masked sdpa": masked,
        "K sdpa calls": separate,
    }
    if DEVICE == "cuda":
        runs |= gpu_rivals(ours, q, keys, values, mask, scale)
    for name, run in runs.items():
        assert (run().double() - exact).abs().max() <= 2 * bound, name
    rows = report(benchmark, "prefix_attention", f"prefix{prefix}-D{head_dim}", DTYPE, runs)
    assert min(row.ratio for name, row in rows.items() if name != "ours") > 1


def gpu_rivals(
    ours: Callable[[str], Tensor],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor,
    scale: float,
) -> dict[str, Callable[[], Tensor]]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def visible(batch: Tensor, head: Tensor, row: Tensor, key: Tensor) -> Tensor:
        return mask[row, key]

    block_mask = create_block_mask(visible, None, None, *mask.shape, device=DEVICE)
    flex = torch.compile(flex_attention)
    rivals: dict[str, Callable[[], Tensor]] = {
        "FlexAttention": lambda: flex(
            q.transpose(0, 1)[None],
            keys.transpose(0, 1)[None],
            values.transpose(0, 1)[None],
            block_mask=block_mask,
            scale=scale,
            enable_gqa=True,
        )[0].transpose(0, 1)
    }
    if importlib.util.find_spec("flash_attn") is not None:
        rivals["flash-attn"] = lambda: ours("flash")
    return rivals


def rows_per_tile(head_dim: int) -> int:
    """The kernel's on a GPU; the torch impl joins tiles and wants few."""
    if DEVICE != "cuda":
        return 2**20
    from arr_fast_kernels.specs import rows_per_tile as of_kernel

    return of_kernel(QUERY_HEADS // KV_HEADS, head_dim, torch.device(DEVICE))


def make_tables(
    prefix: int, starts: list[int], lengths: list[int], per_tile: int
) -> tuple[Tensor, Tensor, Tensor]:
    own = [start for start, length in zip(starts, lengths, strict=True) for _ in range(length)]
    tiles = [
        (row, min(per_tile, len(own) - row), 0, 1, 1, -1) for row in range(0, len(own), per_tile)
    ]
    tables = (own, [(1, 0, prefix)], tiles)
    first, second, third = (torch.tensor(t, dtype=torch.int32, device=DEVICE) for t in tables)
    return first, second, third


def make_mask(prefix: int, starts: list[int], lengths: list[int]) -> Tensor:
    rows = sum(lengths)
    mask = torch.zeros(rows, prefix + rows, dtype=torch.bool, device=DEVICE)
    mask[:, :prefix] = True
    for start, length in zip(starts, lengths, strict=True):
        own = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
        mask[start : start + length, prefix + start : prefix + start + length] = own
    return mask


def dense(
    q: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float, dtype: torch.dtype
) -> Tensor:
    group = q.shape[1] // keys.shape[1]
    k, v = (t.to(dtype).transpose(0, 1).repeat_interleave(group, 0) for t in (keys, values))
    scores = (q.to(dtype).transpose(0, 1) @ k.transpose(1, 2)) * scale
    return (scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v).transpose(0, 1)
