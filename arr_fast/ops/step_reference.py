"""fp64 oracles of sde_step and rpo_loss: the formulas of their docstrings, and autograd."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arr_fast.ops.philox import philox_normal


def sde_step_reference(
    *,
    x: Tensor,
    v: Tensor,
    x_scale: Tensor,
    v_scale: Tensor,
    std: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """`sde_step` in float64; x' is rounded to x's dtype before log_prob."""
    mean = _per_sample(x_scale, x) * x.double() + _per_sample(v_scale, x) * v.double()
    if noise is None and seed is not None:
        noise = philox_normal(seed, x[0].numel()).view(x.shape)
    if noise is None:
        return mean.to(x.dtype), torch.full_like(std, float("nan"))
    x_next = (mean + _per_sample(std, x) * noise.double()).to(x.dtype)
    return x_next, _log_prob(x_next, mean, std, normalised).float()


def rpo_loss_reference(
    *,
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    x_scale: Tensor,
    v_scale: Tensor,
    std: Tensor,
    dt: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """`rpo_loss` in float64. The gradient scales in stats come from autograd, not from algebra."""
    # The whole gradient to v is a combination of x' - mu, v - v_ref and v - v_old; the weights are
    # the derivatives of the loss by the three means of squares that it is a function of.
    mean = _per_sample(x_scale, x) * x.double() + _per_sample(v_scale, x) * v.double()
    elements = v[0].numel()
    squares = [_mean_square(x_next.double() - mean)]
    squares += [_mean_square(v.double() - o.double()) if o is not None else None for o in (v_ref, v_old)]
    with torch.enable_grad():
        leaves = [None if s is None else s.detach().requires_grad_() for s in squares]
        error, gap, drift = leaves
        s, scale = std.double(), v_scale.double()
        log_prob = -error
        if normalised:
            log_prob = -error / (2 * s**2) - torch.log(s) - 0.5 * math.log(2 * math.pi)
        log_ratio = log_prob - log_prob_old.double()
        policy_scale = torch.ones_like(s)
        if drift is not None:
            log_ratio = s * (log_ratio + scale**2 * drift / (2 * s**2))
            policy_scale = -1 / dt.double()
        ratio = torch.exp(log_ratio)
        a = advantage.double()
        clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
        loss = torch.maximum(-a * ratio, -a * clipped) * policy_scale
        kl_value = torch.zeros_like(s)
        if kl == "latent_mean":
            kl_value = scale**2 * gap / (2 * s**2)
        elif kl == "velocity":
            kl_value = gap
        elif kl == "log_prob_diff":
            if v_ref is None:
                kl_value = log_prob - log_prob.detach()
            else:
                mean_ref = mean - _per_sample(v_scale, x) * (v.double() - v_ref.double())
                kl_value = log_prob - _log_prob(x_next, mean_ref, std, normalised)
        loss = loss + beta * kl_value
        present = [leaf for leaf in leaves if leaf is not None]
        slopes = iter(torch.autograd.grad(loss.sum(), present, allow_unused=True))
    if kl == "log_prob_diff" and v_ref is None:
        kl_value = torch.full_like(kl_value, float("nan"))
    by_error, by_gap, by_drift = (
        torch.zeros_like(s) if leaf is None or (slope := next(slopes)) is None else slope
        for leaf in leaves
    )
    is_clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    rows = (
        log_prob,
        ratio,
        is_clipped,
        kl_value,
        -by_error * 2 * scale / elements,
        by_gap * 2 / elements,
        by_drift * 2 / elements,
    )
    return loss.detach().float(), torch.stack([row.detach().float() for row in rows])


def rpo_loss_backward_reference(
    *,
    grad_loss: Tensor,
    stats: Tensor,
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    x_scale: Tensor,
    v_scale: Tensor,
) -> Tensor:
    """The backward in float64."""
    mean = _per_sample(x_scale, x) * x.double() + _per_sample(v_scale, x) * v.double()
    error_scale, ref_scale, old_scale = (stats[row].double() * grad_loss.double() for row in (4, 5, 6))
    grad = _per_sample(error_scale, x) * (x_next.double() - mean)
    if v_ref is not None:
        grad = grad + _per_sample(ref_scale, x) * (v.double() - v_ref.double())
    if v_old is not None:
        grad = grad + _per_sample(old_scale, x) * (v.double() - v_old.double())
    return grad.to(v.dtype)


def _per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.double().view(-1, *[1] * (like.ndim - 1))


def _mean_square(tensor: Tensor) -> Tensor:
    return tensor.square().flatten(1).mean(1)


def _log_prob(x_next: Tensor, mean: Tensor, std: Tensor, normalised: bool) -> Tensor:
    square = _mean_square(x_next.double() - mean)
    if not normalised:
        return -square
    s = std.double()
    density = -square / (2 * s**2) - torch.log(s) - 0.5 * math.log(2 * math.pi)
    return torch.where(s > 0, density, float("nan"))
