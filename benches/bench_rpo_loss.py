"""rpo_loss forward and backward against the eager formula of the published trainers.

`pytest benches/bench_rpo_loss.py`. The gate: loss and dv agree with eager in the same run. With
fused loops on a CPU ours must be 5 times faster, and hold a third of what eager holds above the
inputs and dv; without a C++ compiler, where blocks run, it must be ahead at all. On 4 MB latents
(the two smaller shapes) eager's intermediates stay in a 32 MB cache too, and the [B] numbers and
the dispatch take half of our millisecond.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from arr_fast.ops.latent_fused import why_not_fused
from arr_fast.ops.rpo_loss import rpo_loss
from arr_fast.ops.sde_step import sde_step, step_coefficients
from benches.measure import ROUNDS, report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ETA = 0.3
# Samples and latents: FLUX at 512 and 1024 px.
SHAPES = {
    "16x1024x64": (16, 1024, 64),
    "4x4096x64": (4, 4096, 64),
    "16x4096x64": (16, 4096, 64),
}


@pytest.mark.parametrize("kl", ["none", "latent_mean"])
@pytest.mark.parametrize("shape", SHAPES)
def test_rpo_loss(shape: str, kl: str, benchmark: Any) -> None:
    batch = SHAPES[shape][0]
    generator = torch.Generator().manual_seed(0)
    x, v, noise, change = (
        torch.randn(*SHAPES[shape], generator=generator).to(DEVICE) for _ in range(4)
    )
    sigma, sigma_next = torch.full((batch,), 0.75), torch.full((batch,), 0.6)
    step = step_coefficients("dance_sde", sigma, sigma_next, eta=ETA).to(DEVICE)
    x_next, log_prob_old = sde_step(x, v, step, noise=noise)
    v_ref = v + 0.01 * change
    current = (v - 0.01 * change).requires_grad_()
    advantage = torch.linspace(-1, 1, batch, device=DEVICE)
    sigma, sigma_next = sigma.to(DEVICE), sigma_next.to(DEVICE)

    def ours(impl: str) -> tuple[Tensor, Tensor]:
        result = rpo_loss(
            current,
            x,
            x_next,
            step,
            log_prob_old=log_prob_old,
            advantage=advantage,
            clip_low=0.2,
            clip_high=0.2,
            beta=0.03,
            kl=kl,  # type: ignore[arg-type]
            v_ref=v_ref if kl != "none" else None,
            impl=impl,
        )
        loss = result.loss.mean()
        return loss, torch.autograd.grad(loss, current)[0]

    def eager() -> tuple[Tensor, Tensor]:
        return eager_loss(current, x, x_next, v_ref, sigma, sigma_next, log_prob_old, advantage, kl)

    impl = "triton" if DEVICE == "cuda" else "torch"
    (loss, grad), (eager_value, eager_grad) = ours(impl), eager()
    torch.testing.assert_close(loss, eager_value, rtol=1e-4, atol=1e-6)
    scale = eager_grad.abs().max().item()
    torch.testing.assert_close(grad, eager_grad, rtol=1e-3, atol=1e-4 * scale)
    runs: dict[str, Callable[[], Any]] = {"ours": lambda: ours(impl), "eager": eager}
    if DEVICE == "cuda":
        runs["compiled eager"] = torch.compile(eager)
    rows = report(
        benchmark, "rpo_loss", f"{shape} {kl}", torch.float32, runs, rounds=max(25, ROUNDS)
    )
    is_fused = DEVICE == "cpu" and why_not_fused() is None
    least_time, least_memory = (5, 3) if is_fused else (1, 1)
    assert rows["eager"].ratio >= least_time
    peak_ratio = rows["eager"].peak_ratio
    assert peak_ratio is not None and peak_ratio >= least_memory


def eager_loss(
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    v_ref: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    kl: str,
) -> tuple[Tensor, Tensor]:
    """The step and loss as DanceGRPO and the ARR reference write them, with autograd."""
    std = ETA * torch.sqrt(sigma - sigma_next)[:, None, None]

    def mean_of(velocity: Tensor) -> Tensor:
        s, n = sigma[:, None, None], sigma_next[:, None, None]
        dt = n - s
        score = -(x - (x - s * velocity) * (1 - s)) / s**2
        return x + velocity * dt - 0.5 * ETA**2 * score * dt

    mean = mean_of(v)
    log_prob = (
        -((x_next - mean) ** 2) / (2 * std**2) - torch.log(std) - 0.5 * math.log(2 * math.pi)
    ).mean((1, 2))
    ratio = torch.exp(log_prob - log_prob_old)
    loss = torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 0.8, 1.2)).mean()
    if kl == "latent_mean":
        with torch.no_grad():
            mean_ref = mean_of(v_ref)
        loss = loss + 0.03 * ((mean - mean_ref) ** 2 / (2 * std**2)).mean()
    return loss, torch.autograd.grad(loss, v)[0]
