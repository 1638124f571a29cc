"""The ops with impl="triton": dispatch, schema and compiled graphs, on top of the launchers' own
tests.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from arr_fast.ops.prefix_attention import prefix_attention
from arr_fast.ops.rpo_loss import rpo_loss, rpo_loss_backward_op, rpo_loss_op
from arr_fast.ops.sde_step import StepCoefficients, sde_step_op
from arr_fast.ops.verdict_head import verdict_head
from tests.kernels.forests import Node, draw_tensors, pack
from tests.kernels.interpret.test_verdict_head import draw
from tests.ops.rpo_cases import draw_latents, rpo_inputs
from tests.ops.rpo_checks import coefficients_of


def attention_arguments(impl: str) -> tuple[object, ...]:
    nodes = [Node(None, 12, cached=True, children=[1, 2]), Node(0, 5), Node(0, 9)]
    forest = pack([nodes], rows_per_tile=16)
    t = draw_tensors(forest, query_heads=4, kv_heads=2, head_dim=64, dtype=torch.float32, seed=0)
    # opcheck compares results bit by bit, and NaN is equal to nothing.
    pools = [t[n].nan_to_num() for n in ("k_pool", "v_pool")]
    tables = (forest.own_start, forest.runs, forest.tiles)
    return t["q"], t["k"], t["v"], *pools, *tables, 0.125, impl


def test_prefix_attention() -> None:
    arguments = attention_arguments("triton")
    torch.library.opcheck(prefix_attention, arguments)
    ours, exact = (prefix_attention(*attention_arguments(i)) for i in ("triton", "reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


def test_verdict_head() -> None:
    a = draw(5, 96, (2, 1), 70, torch.float32)
    shared = (a["hidden"], a["norm_weight"], 1e-6, True)
    rows = (a["label_rows"], a["label_ptr"], a["vocab_weight"])
    torch.library.opcheck(verdict_head, (*shared, *rows, "triton"))
    ours, exact = (verdict_head(*shared, *rows, impl) for impl in ("triton", "reference"))
    for got, want in zip(ours, exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_tables_and_pools_may_have_gaps() -> None:
    q, k, v, k_pool, v_pool, own_start, runs, tiles, scale, _ = attention_arguments("triton")
    pools = [torch.stack([p + 9, p], -1)[..., 1] for p in (k_pool, v_pool)]
    tables = [torch.stack([0 * t, t], -1)[..., 1] for t in (own_start, runs, tiles)]
    ours = prefix_attention(q, k, v, *pools, *tables, scale, "triton")
    exact = prefix_attention(*attention_arguments("reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)
    a = draw(5, 96, (2, 1), 70, torch.float32)
    a["label_ptr"] = torch.stack([0 * a["label_ptr"], a["label_ptr"]], 1)[:, 1]
    rows = (a["label_rows"], a["label_ptr"], a["vocab_weight"][:0])
    labels, expected = (
        verdict_head(a["hidden"], a["norm_weight"], 1e-6, True, *rows, impl)[0]
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(labels, expected, rtol=1e-5, atol=1e-5)


def test_every_launcher_runs_under_the_device_of_its_tensors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """No second device is needed: what a launcher allocates must lie between enter and exit."""
    inside: list[Tensor] = []
    entered: list[Tensor] = []

    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        entered.append(tensor)
        inside.append(tensor)
        yield
        inside.pop()

    allocate = torch.empty

    def checked(*args: Any, **kwargs: Any) -> Tensor:
        assert inside, "allocated outside of the device"
        return allocate(*args, **kwargs)

    inputs = rpo_inputs((2, 50), torch.float32, 5, kind="sde")
    step = coefficients_of("sde", 2)
    latents = [inputs[n] for n in ("v", "x", "x_next", "v_ref", "v_old")]
    scales = (step.x_scale, step.v_scale)
    scalars = (*scales, step.std, step.dt, inputs["log_prob_old"], inputs["advantage"])
    a = draw(5, 96, (2, 1), 70, torch.float32)
    head = (a["label_rows"], a["label_ptr"], a["vocab_weight"], "triton")
    attention = attention_arguments("triton")
    noisy = (*latents[:2], *scales, step.std, latents[2], None, True, "triton")
    grads = (torch.ones(2), torch.ones(7, 2), *latents, *scales, "triton")
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(torch, "empty", checked)
    prefix_attention(*attention)
    verdict_head(a["hidden"], a["norm_weight"], 1e-6, True, *head)
    sde_step_op(*noisy)
    rpo_loss_op(*latents, *scalars, 0.2, 0.2, 0.03, "latent_mean", True, "triton")
    rpo_loss_backward_op(*grads)
    firsts = (attention[0], a["hidden"], latents[0], latents[0], grads[0])
    assert [t.data_ptr() for t in entered] == [t.data_ptr() for t in firsts]
    assert not inside


def test_sde_step() -> None:
    x, v, noise = draw_latents((2, 3, 50), torch.float32, 4, 3)
    step = coefficients_of("sde", 2)
    scalars = (step.x_scale, step.v_scale, step.std)
    torch.library.opcheck(sde_step_op, (x, v, *scalars, noise, None, True, "triton"))
    seed = torch.tensor([3, 4])
    torch.library.opcheck(sde_step_op, (x, v, *scalars, None, seed, True, "triton"))


def test_compiled_rpo_loss_equals_eager() -> None:
    def objective(v: Tensor, x: Tensor, x_next: Tensor, *scalars: Tensor) -> Tensor:
        result = rpo_loss(
            v * 1.0,
            x,
            x_next,
            StepCoefficients(*scalars[:4]),
            log_prob_old=scalars[4],
            advantage=scalars[5],
            clip_low=0.2,
            clip_high=0.2,
            impl="triton",
        )
        return result.loss.mean()

    torch.compiler.reset()
    compiled = torch.compile(objective, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 140), (3, 77)):
        inputs = rpo_inputs(shape, torch.float32, 5, kind="sde")
        step = coefficients_of("sde", shape[0])
        rest = (inputs["x"], inputs["x_next"], step.x_scale, step.v_scale, step.std, step.dt)
        rest = (*rest, inputs["log_prob_old"], inputs["advantage"])
        grads = []
        for function in (objective, compiled):
            leaf = inputs["v"].clone().requires_grad_()
            function(leaf, *rest).backward()
            grads.append(leaf.grad)
        assert torch.equal(*grads)


def test_the_kernels_refuse_wide_heads() -> None:
    rows = torch.zeros(2, 1, 257)
    table = torch.tensor([[0, 2, 0, 0, 1, -1]], dtype=torch.int32)
    start = torch.zeros(2, dtype=torch.int32)
    with pytest.raises(ValueError, match="q has head dim 257"):
        prefix_attention(
            rows, rows, rows, rows[:0], rows[:0], start, table[:0, :3], table, 1.0, "triton"
        )
