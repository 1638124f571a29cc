"""The PyTorch implementation of rpo_loss: sums of squares forward, one pass backward, nothing
saved but [B] numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from arr_fast.ops.latent_passes import error_square_sums, gap_square_sums, velocity_gradient
from arr_fast.ops.sde_step_torch import log_prob_of


def rpo_loss_torch(
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
    """`rpo_loss`: float32 over the latents, float64 over the [B] numbers."""
    sums = {"error": error_square_sums(v, x, x_next, x_scale, v_scale)}
    if v_ref is not None and kl == "log_prob_diff":
        sums["v_ref"] = error_square_sums(v_ref, x, x_next, x_scale, v_scale)
    elif v_ref is not None:
        sums["v_ref"] = gap_square_sums(v, v_ref)
    if v_old is not None:
        sums["v_old"] = gap_square_sums(v, v_old)
    # A dozen conversions of [B] numbers would cost more than a pass over small latents.
    numbers = torch.stack((v_scale, std, dt, log_prob_old, advantage)).double()
    clip = (1 - clip_low, 1 + clip_high)
    loss, stats = _finalise(sums, v[0].numel(), numbers, clip, beta, kl, normalised)
    return loss.float(), stats.float()


def _finalise(
    sums: dict[str, Tensor],
    elements: int,
    numbers: Tensor,
    clip: tuple[float, float],
    beta: float,
    kl: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [B] and stats [7, B] from sums of squares [B] and (v_scale, std, dt, log_prob_old,
    advantage) [5, B]; everything float64."""
    v_scale, std, dt, log_prob_old, advantage = numbers.unbind(0)
    log_prob = log_prob_of(sums["error"], elements, std, normalised)
    gaussian_weight = 0.5 / std.square()
    zero = torch.zeros_like(std)
    weight = gaussian_weight if normalised else zero + 1
    log_ratio = log_prob - log_prob_old
    if "v_old" in sums:
        drift = v_scale.square() * sums["v_old"] / elements
        log_ratio = std * (log_ratio + weight * drift)
    ratio = log_ratio.exp()
    policy, clipped_policy = -advantage * ratio, -advantage * ratio.clamp(*clip)
    loss = torch.maximum(policy, clipped_policy)
    slope = torch.where(policy >= clipped_policy, policy, zero)
    if "v_old" in sums:
        loss, slope = -loss / dt, -slope * std / dt
    log_prob_slope = slope
    kl_value = ref_scale = old_scale = zero
    if kl == "log_prob_diff":
        log_prob_slope = slope + beta
        if "v_ref" in sums:
            kl_value = weight * (sums["v_ref"] - sums["error"]) / elements
            loss = loss + beta * kl_value
        else:
            kl_value = torch.full_like(zero, float("nan"))
    elif kl in ("latent_mean", "velocity"):
        kl_weight = gaussian_weight * v_scale.square() if kl == "latent_mean" else zero + 1
        kl_value = kl_weight * sums["v_ref"] / elements
        loss = loss + beta * kl_value
        ref_scale = 2 * beta * kl_weight / elements
    error_scale = log_prob_slope * 2 * weight * v_scale / elements
    if "v_old" in sums:
        old_scale = slope * 2 * weight * v_scale.square() / elements
    is_clipped = ((ratio < clip[0]) | (ratio > clip[1])).double()
    return loss, torch.stack(
        (log_prob, ratio, is_clipped, kl_value, error_scale, ref_scale, old_scale)
    )


def rpo_loss_backward_torch(
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
    """dv = error_scale (x' - mu) + ref_scale (v - v_ref) + old_scale (v - v_old)."""
    error_scale, ref_scale, old_scale = (stats[row] * grad_loss for row in (4, 5, 6))
    others = [(t, s) for t, s in ((v_ref, ref_scale), (v_old, old_scale)) if t is not None]
    return velocity_gradient(v, x, x_next, x_scale, v_scale, error_scale, others)
