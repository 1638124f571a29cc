"""Bytes by count: what the interpreted kernels load and store is what `specs` and `traffic` say."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from arr_fast.engine.path_forest import tables_of_paths
from arr_fast.ops.rpo_loss import rpo_loss
from arr_fast.ops.sde_step import sde_step
from arr_fast_kernels.configs import attention_config
from arr_fast_kernels.prefix_attention import MERGE_BLOCK_M, prefix_attention
from arr_fast_kernels.traffic import ForestShape, attention_traffic
from tests.ops.rpo_cases import draw_latents, rpo_inputs
from tests.ops.rpo_checks import coefficients_of


@contextmanager
def counted_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts the bytes of unmasked lanes of every load and store, by "load" and "store", and by
    "blocks" those of all lanes of the loads of keys and values.
    """
    counts = {"load": 0, "store": 0, "blocks": 0}
    block = (attention_config("interpret", 64, torch.float16).block_n, 64)

    def counting(name: str, kind: str) -> Callable[..., Any]:
        original = getattr(interpreter_builder, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            pointer = args[0]
            mask = next(
                (
                    a.data
                    for a in args[1:3]
                    if getattr(a, "data", None) is not None and np.asarray(a.data).dtype == np.bool_
                ),
                None,
            )
            lanes = int(np.sum(mask)) if mask is not None else int(np.asarray(pointer.data).size)
            width = pointer.get_element_ty().primitive_bitwidth // 8
            counts[kind] += lanes * width
            if kind == "load" and np.asarray(pointer.data).shape == block:
                counts["blocks"] += np.asarray(pointer.data).size * width
            return original(*args, **kwargs)

        return wrapper

    with monkeypatch.context() as patch:
        # create_load and create_store go through the masked forms.
        patch.setattr(
            interpreter_builder, "create_masked_load", counting("create_masked_load", "load")
        )
        patch.setattr(
            interpreter_builder, "create_masked_store", counting("create_masked_store", "store")
        )
        yield counts


def test_sde_step_moves_each_latent_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """x, v and noise in, x' out: at most 1.1x, all scalars and partials counted."""
    x, v, noise = draw_latents((3, 4096), torch.float16, 1, 3)
    with counted_bytes(monkeypatch) as counts:
        sde_step(x, v, coefficients_of("sde", 3), noise=noise, impl="triton")
    least = 4 * x.numel() * 2
    assert least <= counts["load"] + counts["store"] <= 1.1 * least


@pytest.mark.parametrize(
    ("kl", "forward", "backward"), [("none", 3, 4), ("latent_mean", 4, 5), ("log_prob_diff", 4, 4)]
)
def test_rpo_loss_moves_each_latent_once(
    kl: str, forward: int, backward: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Forward reads v, x, x' (and v_ref) once; backward the same (v_ref only if it has a gradient)
    and writes dv.
    """
    inputs = rpo_inputs((2, 4096), torch.float16, 5, kind="sde")
    inputs["v"].requires_grad_()
    with counted_bytes(monkeypatch) as counts:
        result = rpo_loss(
            inputs["v"],
            inputs["x"],
            inputs["x_next"],
            coefficients_of("sde", 2),
            log_prob_old=inputs["log_prob_old"],
            advantage=inputs["advantage"],
            clip_low=0.2,
            clip_high=0.2,
            beta=0.1,
            kl=kl,
            v_ref=None if kl == "none" else inputs["v_ref"],
            impl="triton",
        )
        one_pass = counts["load"] + counts["store"]
        result.loss.sum().backward()
        other_pass = counts["load"] + counts["store"] - one_pass
    latents = inputs["v"].numel() * 2
    assert forward * latents <= one_pass <= 1.1 * forward * latents
    assert backward * latents <= other_pass <= 1.1 * backward * latents


@pytest.mark.parametrize("heads", [(2, 1), (4, 2)], ids=str)
def test_attention_requests_each_path_once_per_tile(
    heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Requested bytes equal the model exactly, without masked lanes and with them: every tile and
    KV head streams its path once, whatever the siblings.
    """
    shape = ForestShape(pairs=1, text=17, images=21, criteria=5, criterion=7)
    config = attention_config("interpret", 64, torch.float16)
    group = heads[0] // heads[1]
    tables = tables_of_paths(shape.paths(), config.block_m // group)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(shape.rows, count, 64, generator=generator).half()
        for count in (*heads, heads[1])
    )
    with counted_bytes(monkeypatch) as counts:
        prefix_attention(
            q=q,
            k=k,
            v=v,
            k_pool=k[:0],
            v_pool=v[:0],
            own_start=tables[0],
            runs=tables[1],
            tiles=tables[2],
            scale=0.125,
        )
    model = attention_traffic(shape, tables, *heads, 64, config, 2)
    table_bytes = _table_bytes(tables[2], heads[1], group, config.block_m)
    assert counts["load"] == model["requested"] + model["query_bytes"] / 2 + table_bytes
    assert counts["store"] == model["query_bytes"] / 2
    assert counts["blocks"] == model["blocks"] > model["requested"] == model["path"]
    assert len(tables[2]) == model["tiles"] == model["tile_limit"]


def _table_bytes(tiles: torch.Tensor, kv_heads: int, group: int, block_m: int) -> int:
    """What the tables cost: 6 + 1 numbers a tile, one own_start a query slot, 3 a run; then the
    merge's look at each slot.
    """
    numbers = 0
    for _, rows, begin, end, _, _ in tiles.tolist():
        numbers += 7 + rows * group + 3 * (end - begin)
    return 4 * kv_heads * (numbers + len(tiles) * block_m // MERGE_BLOCK_M)
