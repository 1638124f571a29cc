"""sde_step against the eager formula: `pytest benches/bench_sde_step.py`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arr_fast.ops.sde_step import sde_step, step_coefficients
from benches.measure import report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ETA = 0.3
SHAPES = {"16x1024x64": (16, 1024, 64), "4x4096x64": (4, 4096, 64)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_sde_step(shape: str, dtype: torch.dtype, benchmark: Any) -> None:
    batch = SHAPES[shape][0]
    x, v, noise = (torch.randn(*SHAPES[shape], device=DEVICE).to(dtype) for _ in range(3))
    sigma, sigma_next = torch.full((batch,), 0.75), torch.full((batch,), 0.6)
    step = step_coefficients("dance_sde", sigma, sigma_next, eta=ETA).to(DEVICE)
    sigma, sigma_next = sigma.to(DEVICE), sigma_next.to(DEVICE)
    impl = "triton" if DEVICE == "cuda" else "torch"

    def ours() -> tuple[Tensor, Tensor]:
        return sde_step(x, v, step, noise=noise, impl=impl)

    def eager() -> tuple[Tensor, Tensor]:
        return eager_step(x, v, noise, sigma, sigma_next)

    (x_next, log_prob), (eager_next, eager_log_prob) = ours(), eager()
    torch.testing.assert_close(
        x_next, eager_next, rtol=2e-2 if dtype != torch.float32 else 1e-5, atol=1e-5
    )
    torch.testing.assert_close(log_prob, eager_log_prob, rtol=1e-3, atol=1e-3)
    runs: dict[str, Callable[[], Any]] = {"ours": ours, "eager": eager}
    if DEVICE == "cuda":
        runs["compiled eager"] = torch.compile(eager)
    rows = report(benchmark, "sde_step", shape, dtype, runs)
    assert rows["eager"].ratio > 1


def eager_step(
    x: Tensor, v: Tensor, noise: Tensor, sigma: Tensor, sigma_next: Tensor
) -> tuple[Tensor, Tensor]:
    """DanceGRPO's step in float32, x' rounded to its storage dtype before log_prob."""
    s, n = sigma[:, None, None], sigma_next[:, None, None]
    dt = n - s
    std = ETA * torch.sqrt(-dt)
    x32, v32 = x.float(), v.float()
    score = -(x32 - (x32 - s * v32) * (1 - s)) / s**2
    mean = x32 + v32 * dt - 0.5 * ETA**2 * score * dt
    x_next = (mean + std * noise.float()).to(x.dtype)
    density = -((x_next.float() - mean) ** 2) / (2 * std**2)
    return x_next, (density - torch.log(std) - 0.5 * math.log(2 * math.pi)).mean((1, 2))
