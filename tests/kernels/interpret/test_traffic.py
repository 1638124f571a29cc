"""Bytes by count: what the interpreted kernels load and store is what `specs` and `traffic` say."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from triton.runtime.interpreter import interpreter_builder

from arr_fast.ops.rpo_loss import rpo_loss
from arr_fast.ops.sde_step import sde_step
from arr_fast_kernels.configs import rows_per_tile
from arr_fast_kernels.prefix_attention import prefix_attention
from arr_fast_kernels.traffic import ForestShape, attention_traffic
from tests.kernels.forests import Node, draw_tensors, pack
from tests.ops.rpo_cases import draw_latents, rpo_inputs
from tests.ops.rpo_checks import coefficients_of


@contextmanager
def counted_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Counts the bytes of unmasked lanes of every load and store, by "load" and "store"."""
    counts = {"load": 0, "store": 0}

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
    """Requested bytes equal the model exactly: every tile and KV head streams its path once,
    whatever the siblings.
    """
    shape = ForestShape(pairs=1, text=9, images=21, criteria=5, criterion=7)
    nodes = [Node(None, shape.text, children=[1, 2])]
    nodes += [Node(0, shape.images, children=[3 + 5 * i + j for j in range(5)]) for i in range(2)]
    nodes += [Node(1 + i, shape.criterion) for i in range(2) for _ in range(5)]
    group = heads[0] // heads[1]
    forest = pack([nodes], rows_per_tile=rows_per_tile(group, 64, "interpret"))
    assert forest.real_rows == shape.rows
    tensors = draw_tensors(
        forest, query_heads=heads[0], kv_heads=heads[1], head_dim=64, dtype=torch.float16, seed=0
    )
    with counted_bytes(monkeypatch) as counts:
        prefix_attention(
            **tensors,
            own_start=forest.own_start,
            runs=forest.runs,
            tiles=forest.tiles,
            scale=0.125,
        )
    model = attention_traffic(shape, heads[0], heads[1], 64, "interpret", 2)
    tables = _table_bytes(forest, heads[1], group)
    assert counts["load"] == model["requested"] + model["query_bytes"] / 2 + tables
    assert counts["store"] == model["query_bytes"] / 2
    assert len(forest.tiles) == model["tiles"] == model["tile_limit"]


def _table_bytes(forest: Any, kv_heads: int, group: int) -> int:
    """What the tables cost: 6 + 1 numbers a tile, one own_start a query slot, 3 a run; then the
    merge's look at each slot.
    """
    numbers = 0
    for _, rows, begin, end, _, _ in forest.tiles.tolist():
        numbers += 7 + rows * group + 3 * (end - begin)
    block_m_parts = 2  # MERGE_BLOCK_M is 16, BLOCK_M under the interpreter 32
    return 4 * kv_heads * (numbers + len(forest.tiles) * block_m_parts)


def test_tiles_are_few_for_shipped_blocks() -> None:
    """At most ceil(rows x group / BLOCK_M) tiles per parent wherever group divides BLOCK_M."""
    rng = random.Random(0)
    for arch in ("sm_80", "sm_90", "sm_100", "gfx942"):
        for heads in ((16, 8), (32, 8), (64, 8)):
            shape = ForestShape(criteria=rng.randint(1, 30), criterion=rng.randint(5, 40))
            model = attention_traffic(shape, *heads, 128, arch, 2)
            assert model["tiles"] <= model["tile_limit"]
