"""flash-attn and xFormers backends against the fp64 reference, over stand-ins with the packages'
own signatures.

The packages need a GPU. The stand-ins refuse what the real functions refuse (dtypes, layouts,
unknown keywords) and compute what their documentation says, so these tests hold our calls, layouts
and merges, not the packages' kernels.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
import random
import sys
import types
from typing import Any

import pytest
import torch
from torch import Tensor

from arr_fast.errors import MissingDependencyError
from arr_fast.ops.flash import prefix_attention_flash
from arr_fast.ops.prefix_attention import prefix_attention
from arr_fast.ops.xformers import prefix_attention_xformers
from tests.kernels.forests import Forest, dense_attention, draw_tensors, pack, random_nodes

# As in flash_attn_interface.py: its Triton kernels for AMD are in use.
USE_TRITON_ROCM = False


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """Stand-in with the signature of flash_attn 2.7 and 2.8 (flash_attn/flash_attn_interface.py at
    every tag of Dao-AILab/flash-attention from v2.7.0 to v2.8.3, 060c9188).

    Documented there: out (total, nheads, headdim) in the input dtype; softmax_lse (nheads,
    total_q), natural log; causal is aligned to the bottom right. Not documented: softmax_lse is
    (total_q, nheads) from flash_attn_triton_amd/fwd_prefill.py.
    """
    assert q.dtype in (torch.float16, torch.bfloat16) and q.dtype == k.dtype == v.dtype
    assert all(t.ndim == 3 and t.stride(-1) == 1 for t in (q, k, v))
    assert q.shape[1] % k.shape[1] == 0 and dropout_p == 0.0
    for cumulative, total, longest in (
        (cu_seqlens_q, len(q), max_seqlen_q),
        (cu_seqlens_k, len(k), max_seqlen_k),
    ):
        assert cumulative.dtype == torch.int32 and cumulative[0] == 0 and cumulative[-1] == total
        assert cumulative.diff().max() == longest
    group = q.shape[1] // k.shape[1]
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for i in range(len(cu_seqlens_q) - 1):
        rows = slice(int(cu_seqlens_q[i]), int(cu_seqlens_q[i + 1]))
        keys = slice(int(cu_seqlens_k[i]), int(cu_seqlens_k[i + 1]))
        k_i, v_i = (t[keys].float().repeat_interleave(group, 1) for t in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[rows].float(), k_i) * softmax_scale
        if causal:
            n, m = scores.shape[1:]
            scores.masked_fill_(torch.ones(n, m).triu(m - n + 1).bool(), float("-inf"))
        lse[:, rows] = scores.logsumexp(-1)
        out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_i).to(q.dtype)
    return out, lse.T if USE_TRITON_ROCM else lse, None


class SplitKOp:
    """Stand-in of xformers.ops.fmha.triton_splitk.FwOp."""


def memory_efficient_attention_partial(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: Any = None,
    p: float = 0.0,
    scale: float | None = None,
    *,
    op: Any = None,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Stand-in with the signature of xFormers 0.0.35 (xformers/ops/fmha/__init__.py at tag v0.0.35
    of facebookresearch/xformers, 03b91d7d; later ones re-export it from the package mslk), no bias.

    [B, M, G, H, K] in, out in `output_dtype`, lse [B, G, H, M]: natural log, float64 for float32
    outputs as in its split-K kernel. Without `op` the dispatch never looks at that kernel, and no
    other offers an output dtype of its own.
    """
    assert query.ndim == key.ndim == 5 and query.shape[2:4] == key.shape[2:4]
    assert query.dtype in (torch.float16, torch.bfloat16) and attn_bias is None
    if op is not SplitKOp:
        raise NotImplementedError("Custom output dtype not supported")
    assert query.shape[-1] in (16, 32, 64, 128, 256, 512)
    scores = torch.einsum("bmghk,bnghk->bghmn", query.float(), key.float()) * scale
    out = torch.einsum("bghmn,bnghk->bmghk", scores.softmax(-1), value.float())
    lse = scores.logsumexp(-1)
    return out.to(output_dtype), lse.double() if output_dtype == torch.float32 else lse


def merge_attentions(
    attn_split: Any,
    lse_split: Any,
    write_lse: bool = True,
    output_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Stand-in with the signature of xFormers 0.0.35; its docstring's formula."""
    for part, lse in zip(attn_split, lse_split, strict=True):
        batch, rows, groups, heads, _ = part.shape
        assert lse.shape == (batch, groups, heads, rows)
    assert len({lse.dtype for lse in lse_split}) == len({part.dtype for part in attn_split}) == 1
    lse = torch.stack(list(lse_split))
    weights = lse.softmax(0).permute(0, 1, 4, 2, 3)[..., None].to(attn_split[0].dtype)
    merged = (torch.stack(list(attn_split)) * weights).sum(0)
    return merged.to(output_dtype or merged.dtype), lse.logsumexp(0) if write_lse else None


@pytest.fixture
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    flash = types.ModuleType("flash_attn")
    vars(flash)["flash_attn_varlen_func"] = flash_attn_varlen_func
    fmha = types.ModuleType("xformers.ops.fmha")
    vars(fmha)["memory_efficient_attention_partial"] = memory_efficient_attention_partial
    vars(fmha)["merge_attentions"] = merge_attentions
    vars(fmha)["triton_splitk"] = types.SimpleNamespace(FwOp=SplitKOp)
    monkeypatch.setitem(sys.modules, "flash_attn", flash)
    monkeypatch.setitem(sys.modules, "xformers", types.ModuleType("xformers"))
    monkeypatch.setitem(sys.modules, "xformers.ops", types.ModuleType("xformers.ops"))
    monkeypatch.setitem(sys.modules, "xformers.ops.fmha", fmha)


def packed_forest(seed: int) -> Forest:
    """Two random trees; some cached, one split."""
    rng = random.Random(seed)
    trees = [
        random_nodes(rng, depth=3, max_children=3, max_length=20, cached=seed % 2 == 0)
        for _ in range(2)
    ]
    split = 9 if seed == 3 else None
    return pack(trees, rows_per_tile=7, split_tokens=split, padding_rows=2, padding_tiles=1)


def check(impl: str, seed: int, heads: tuple[int, int], dtype: torch.dtype) -> None:
    """err <= err(eager in the same dtype) + 2 eps max |v|: partials are rounded once more before
    the merge."""
    forest = packed_forest(seed)
    tensors = draw_tensors(
        forest, query_heads=heads[0], kv_heads=heads[1], head_dim=32, dtype=dtype, seed=seed
    )
    tables = {"own_start": forest.own_start, "runs": forest.runs, "tiles": forest.tiles}
    out = prefix_attention(**tensors, **tables, scale=32**-0.5, impl=impl)
    exact = dense_attention(tensors, forest.mask, 32**-0.5, torch.float64)
    eager = dense_attention(tensors, forest.mask, 32**-0.5, dtype)
    largest = torch.nan_to_num(tensors["v"]).abs().max().item()
    allowed = (eager.double() - exact).abs().max().item() + 2 * torch.finfo(dtype).eps * largest
    assert (out.double() - exact).abs().max().item() <= allowed


@pytest.mark.parametrize("impl", ["flash", "xformers"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (6, 2), (3, 1)], ids=str)
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.usefixtures("stand_ins")
def test_random_forests(impl: str, dtype: torch.dtype, heads: tuple[int, int], seed: int) -> None:
    check(impl, seed, heads, dtype)


@pytest.mark.parametrize(
    ("package", "call"),
    [("flash_attn", prefix_attention_flash), ("xformers", prefix_attention_xformers)],
)
def test_a_missing_package_is_named(
    package: str, call: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    empty = torch.zeros(0, 2, 32)
    table = torch.zeros(0, 6, dtype=torch.int32)
    with pytest.raises(MissingDependencyError, match=r'pip install "arr-fast\[cuda\]"'):
        call(empty, empty, empty, empty, empty, table[:, 0], table[:, :3], table, 1.0)


@pytest.mark.parametrize("impl", ["flash", "xformers"])
@pytest.mark.usefixtures("stand_ins")
def test_float32_is_refused(impl: str) -> None:
    rows = torch.zeros(2, 2, 32)
    table = torch.tensor([[0, 2, 0, 0, 1, -1]], dtype=torch.int32)
    start = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="takes float16 or bfloat16"):
        prefix_attention(
            rows, rows, rows, rows[:0], rows[:0], start, table[:0, :3], table, 1.0, impl
        )


@pytest.mark.parametrize(("impl", "head_dim"), [("flash", 264), ("xformers", 96)])
@pytest.mark.usefixtures("stand_ins")
def test_a_head_dim_that_a_package_lacks_is_named(impl: str, head_dim: int) -> None:
    rows = torch.zeros(2, 2, head_dim, dtype=torch.float16)
    table = torch.tensor([[0, 2, 0, 0, 1, -1]], dtype=torch.int32)
    start = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match=f'q has head dim {head_dim}; impl "{impl}" takes'):
        prefix_attention(
            rows, rows, rows, rows[:0], rows[:0], start, table[:0, :3], table, 1.0, impl
        )


@pytest.mark.usefixtures("stand_ins")
def test_flash_attn_for_amd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "USE_TRITON_ROCM", True)
    check("flash", 1, (6, 2), torch.float16)


@pytest.mark.interpret
@pytest.mark.skipif(
    not {"FLASH_ATTENTION_TRITON_AMD_ENABLE", "TRITON_INTERPRET"} <= set(os.environ),
    reason="needs flash-attn, TRITON_INTERPRET=1 and FLASH_ATTENTION_TRITON_AMD_ENABLE=TRUE",
)
@pytest.mark.parametrize("seed", range(4))
def test_flash_attn_own_kernels(seed: int) -> None:
    """flash-attn's interface over its Triton kernels; docs/kernels.md says how to run this."""
    from triton.runtime import driver

    target = types.SimpleNamespace(backend="hip", arch="gfx942", warp_size=64)
    driver.set_active(types.SimpleNamespace(get_current_target=lambda: target))
    from flash_attn import flash_attn_interface

    forward = flash_attn_interface._flash_attn_varlen_forward
    forward.register_kernel("cpu")(forward._init_fn)
    check("flash", seed, [(4, 4), (4, 2), (6, 2), (3, 1)][seed], torch.float16)


@pytest.mark.interpret
@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None or os.environ.get("TRITON_INTERPRET") != "1",
    reason="needs xFormers, the Triton it was written for, and TRITON_INTERPRET=1",
)
@pytest.mark.parametrize("seed", range(4))
def test_xformers_own_kernels(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """xFormers' split-K and merge kernels themselves; docs/kernels.md says how to run this."""
    from xformers.ops.fmha import triton_splitk

    merge = triton_splitk.merge_attentions_varargs
    merge.register_kernel("cpu")(merge._init_fn)
    monkeypatch.setattr(triton_splitk.FwOp, "SUPPORTED_DEVICES", {"cpu"})
    check("xformers", seed, [(4, 4), (4, 2), (6, 2), (3, 1)][seed], torch.float16)


@pytest.mark.skipif(
    importlib.util.find_spec("xformers") is None, reason="xFormers is not installed here"
)
def test_xformers_signatures() -> None:
    from xformers.ops import fmha

    for stand_in in (memory_efficient_attention_partial, merge_attentions):
        assert _names(getattr(fmha, stand_in.__name__)) == _names(stand_in)


@pytest.mark.skipif(
    importlib.util.find_spec("flash_attn") is None, reason="flash-attn is not installed here"
)
def test_flash_attn_signature() -> None:
    import flash_attn

    assert _names(flash_attn.flash_attn_varlen_func) == _names(flash_attn_varlen_func)


def _names(function: Any) -> list[tuple[str, Any]]:
    return [(p.name, p.kind) for p in inspect.signature(function).parameters.values()]
