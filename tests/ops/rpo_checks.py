"""What every impl of sde_step and rpo_loss must satisfy; run for torch and reference here, for
triton in tests/kernels/interpret."""

from __future__ import annotations

import torch

from arr_fast.ops.rpo_loss import rpo_loss
from arr_fast.ops.sde_step import StepCoefficients, sde_step, step_coefficients
from tests.ops.rpo_cases import (
    ETA,
    draw_latents,
    published_log_prob,
    published_loss,
    published_step,
    rpo_inputs,
    sigmas,
    spread,
)

EPS32 = torch.finfo(torch.float32).eps


def coefficients_of(kind: str, batch: int) -> StepCoefficients:
    sigma, sigma_next = sigmas(batch)
    return step_coefficients(kind, sigma, sigma_next, eta=ETA[kind])


def check_step(
    impl: str, kind: str, shape: tuple[int, ...], dtype: torch.dtype, *, normalised: bool = True
) -> None:
    """x' within one rounding of the published formula; log_prob that of x' as stored, to fp32
    precision."""
    x, v, noise = draw_latents(shape, dtype, 7, 3)
    step = coefficients_of(kind, shape[0])
    given = None if kind == "ode" else noise
    x_next, log_prob = sde_step(x, v, step, noise=given, normalised=normalised, impl=impl)
    mean, std = published_step(kind, x, v, *sigmas(shape[0]))
    expected = mean + spread(std, x) * noise.double() if given is not None else mean
    largest = expected.abs().max().item()
    bound = (torch.finfo(dtype).eps / 2 + 8 * EPS32) * largest
    assert x_next.dtype == dtype and x_next.shape == x.shape
    assert (x_next.double() - expected).abs().max().item() <= bound
    assert log_prob.dtype == torch.float32
    if kind == "ode":
        assert bool(log_prob.isnan().all())
        return
    exact = published_log_prob(x_next, mean, std, normalised)
    # A mean of squares is computed to a few eps of itself, plus the fp32 rounding of mu over std.
    rounding = 4 * EPS32 * largest / std.min().item()
    assert (
        log_prob.double() - exact
    ).abs().max().item() <= 16 * EPS32 * exact.abs().max().item() + rounding


def check_loss(
    impl: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    *,
    kind: str = "sde",
    kl: str = "none",
    beta: float = 0.03,
    clip: tuple[float, float] = (0.2, 0.2),
    guard: bool = False,
    normalised: bool = True,
    with_ref: bool = True,
    quadrants: bool = False,
) -> None:
    """Loss, diagnostics and dv: err(impl, fp64) <= err(eager fp32, fp64) + a bound from eps.

    `quadrants` puts rho near 0.74 and 1.35 under either sign of the advantage: a clip of 0.2
    binds on both sides, and on both sides is passed without binding.
    """
    inputs = rpo_inputs(shape, dtype, 3, kind=kind)
    options = {
        "kind": kind,
        "kl": kl,
        "beta": beta,
        "clip": clip,
        "guard": guard,
        "normalised": normalised,
    }
    if not normalised:
        mean, std = published_step(kind, inputs["x"], inputs["v_old"], *sigmas(shape[0]))
        inputs["log_prob_old"] = published_log_prob(inputs["x_next"], mean, std, False).float()
    if quadrants:
        index = torch.arange(shape[0])
        inputs["log_prob_old"] += torch.where(index % 4 < 2, 0.3, -0.3)
        inputs["advantage"] = torch.where(index % 2 == 0, 1.5, -0.7)
    exact, exact_grad = published_loss(inputs, **options)
    if quadrants:
        assert exact["clipped"].tolist() == [1.0] * shape[0]
    eager, eager_grad = published_loss(inputs, **options, dtype=torch.float32)
    v = inputs["v"].detach().clone().requires_grad_()
    result = rpo_loss(
        v,
        inputs["x"],
        inputs["x_next"],
        coefficients_of(kind, shape[0]),
        log_prob_old=inputs["log_prob_old"],
        advantage=inputs["advantage"],
        clip_low=clip[0],
        clip_high=clip[1],
        beta=beta,
        kl=kl,
        v_ref=inputs["v_ref"] if with_ref and kl != "none" else None,
        v_old=inputs["v_old"] if guard else None,
        normalised=normalised,
        impl=impl,
    )
    weights = torch.linspace(0.5, 2.0, shape[0])
    (grad,) = torch.autograd.grad((result.loss * weights).sum(), v)
    for name in ("log_prob", "ratio", "clipped", "kl", "loss"):
        got, want = getattr(result, name).double(), exact[name]
        if not with_ref and name == "kl":
            assert bool(got.isnan().all())
            continue
        if not with_ref and name == "loss":
            want = want - beta * exact["kl"]
        error = (got - want).abs().max().item()
        allowed = (eager[name].double() - exact[name]).abs().max().item()
        bound = 64 * EPS32 * (1 + want.abs().max().item())
        assert error <= allowed + bound, (name, error, allowed, bound)
    scaled_grad = exact_grad * spread(weights, exact_grad)
    assert grad.dtype == dtype and grad.shape == v.shape
    largest = scaled_grad.abs().max().item()
    error = (grad.double() - scaled_grad).abs().max().item()
    allowed = (eager_grad.double() - exact_grad).abs().max().item() * 2
    bound = (torch.finfo(dtype).eps / 2 + 64 * EPS32) * largest
    # fp16 holds no gradient below its smallest subnormal.
    bound += torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    assert error <= allowed + bound, ("grad", error, allowed, bound)
    assert largest > 0
