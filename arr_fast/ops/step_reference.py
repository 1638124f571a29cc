"""fp64 oracles of sde_step and rpo_loss: the formulas of their docstrings, whole tensors at a
time."""

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
    """`rpo_loss` in float64."""
    s, scale = std.double(), v_scale.double()
    elements = v[0].numel()
    mean = _per_sample(x_scale, x) * x.double() + _per_sample(v_scale, x) * v.double()
    log_prob = _log_prob(x_next, mean, std, normalised)
    # Derivative of log_prob by mean_i (x'_i - mu_i)^2, up to sign.
    precision = 1 / (2 * s**2)
    weight = precision if normalised else torch.ones_like(s)
    log_ratio = log_prob - log_prob_old.double()
    ratio_slope = policy_scale = torch.ones_like(s)
    if v_old is not None:
        drift = scale**2 * _mean_square(v.double() - v_old.double())
        log_ratio = s * (log_ratio + precision * drift)
        ratio_slope, policy_scale = s, -1 / dt.double()
    ratio = torch.exp(log_ratio)
    unclipped = -advantage.double() * ratio
    clipped = -advantage.double() * ratio.clamp(1 - clip_low, 1 + clip_high)
    policy_slope = torch.where(unclipped >= clipped, unclipped, 0.0) * ratio_slope * policy_scale
    loss = torch.maximum(unclipped, clipped) * policy_scale
    kl_value, gap_slope, log_prob_slope = torch.zeros_like(s), torch.zeros_like(s), policy_slope
    if kl == "log_prob_diff":
        log_prob_slope = policy_slope + beta
        kl_value = torch.full_like(s, float("nan"))
        if v_ref is not None:
            mean_ref = (
                _per_sample(x_scale, x) * x.double() + _per_sample(v_scale, x) * v_ref.double()
            )
            kl_value = log_prob - _log_prob(x_next, mean_ref, std, normalised)
            loss = loss + beta * kl_value
    elif kl != "none":
        assert v_ref is not None
        kl_weight = scale**2 * precision if kl == "latent_mean" else torch.ones_like(s)
        kl_value = kl_weight * _mean_square(v.double() - v_ref.double())
        gap_slope = beta * kl_weight
        loss = loss + beta * kl_value
    error_scale = 2 * scale * weight * log_prob_slope / elements
    old_scale = torch.zeros_like(s)
    if v_old is not None:
        old_scale = 2 * scale**2 * precision * policy_slope / elements
    is_clipped = (ratio < 1 - clip_low) | (ratio > 1 + clip_high)
    rows = (log_prob, ratio, is_clipped, kl_value, error_scale, 2 * gap_slope / elements, old_scale)
    return loss.float(), torch.stack([row.float() for row in rows])


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
    error_scale, ref_scale, old_scale = (
        stats[row].double() * grad_loss.double() for row in (4, 5, 6)
    )
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
