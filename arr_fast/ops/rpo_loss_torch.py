"""The PyTorch implementation of rpo_loss: sums of squares forward, one pass backward, nothing
saved but [B] numbers."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor

from arr_fast.ops import latent_fused
from arr_fast.ops.latent_fused import run_fused
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
    clip = (1 - clip_low, 1 + clip_high)
    others = [other for other in (v_ref, v_old) if other is not None]
    formula = _fused(kl, normalised, v_ref is not None, v_old is not None)
    scalars = [x_scale, v_scale, std, dt, log_prob_old, advantage]
    fused = run_fused(formula, [v, x, x_next, *others], scalars, (*clip, beta))
    if fused is not None:
        loss, stats = fused
        return loss, stats
    sums = {"error": error_square_sums(v, x, x_next, x_scale, v_scale)}
    if v_ref is not None and kl == "log_prob_diff":
        sums["v_ref"] = error_square_sums(v_ref, x, x_next, x_scale, v_scale)
    elif v_ref is not None:
        sums["v_ref"] = gap_square_sums(v, v_ref)
    if v_old is not None:
        sums["v_old"] = gap_square_sums(v, v_old)
    # A dozen conversions of [B] numbers would cost more than a pass over small latents.
    numbers = torch.stack((v_scale, std, dt, log_prob_old, advantage)).double()
    loss, stats = _finalise(sums, v[0].numel(), numbers, clip, beta, kl, normalised)
    return loss.float(), stats.float()


@cache
def _fused(kl: str, normalised: bool, has_ref: bool, has_old: bool) -> latent_fused.Formula:
    """The whole forward as one loop over the latents, with the [B] numbers behind it."""

    def loss_and_stats(
        latents: list[Tensor], table: Tensor | None, constants: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        assert table is not None and constants is not None
        v, x, x_next, *others = latents
        sums = {"error": latent_fused.error_square_sums(latents, table).double()}
        if has_ref and kl == "log_prob_diff":
            of_ref = latent_fused.error_square_sums([others[0], x, x_next], table)
            sums["v_ref"] = of_ref.double()
        elif has_ref:
            sums["v_ref"] = latent_fused.gap_square_sums(v, others[0]).double()
        if has_old:
            sums["v_old"] = latent_fused.gap_square_sums(v, others[-1]).double()
        clip, beta = (constants[0], constants[1]), constants[2]
        numbers = table[1:].double()
        loss, stats = _finalise(sums, v.shape[1], numbers, clip, beta, kl, normalised)
        return loss.float(), stats.float()

    # torch.compile counts graphs per code object, and gives up after eight.
    code = loss_and_stats.__code__
    own_name = f"{code.co_name}_{kl}_{normalised}_{has_ref}_{has_old}"
    loss_and_stats.__code__ = code.replace(co_name=own_name)
    return loss_and_stats


def _finalise(
    sums: dict[str, Tensor],
    elements: int,
    numbers: Tensor,
    clip: tuple[float | Tensor, float | Tensor],
    beta: float | Tensor,
    kl: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [B] and stats [7, B] from sums of squares [B] and (v_scale, std, dt, log_prob_old,
    advantage) [5, B]; everything float64."""
    v_scale, std, dt, log_prob_old, advantage = (numbers[row] for row in range(5))
    log_prob = log_prob_of(sums["error"], elements, std, normalised)
    gaussian_weight = 0.5 / std.square()
    zero = torch.zeros_like(std)
    weight = gaussian_weight if normalised else zero + 1
    log_ratio = log_prob - log_prob_old
    if "v_old" in sums:
        drift = v_scale.square() * sums["v_old"] / elements
        log_ratio = std * (log_ratio + weight * drift)
    ratio = log_ratio.exp()
    bounds: Any = clip
    policy, clipped_policy = -advantage * ratio, -advantage * ratio.clamp(*bounds)
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
    others = [(t, stats[row] * grad_loss) for t, row in ((v_ref, 5), (v_old, 6)) if t is not None]
    return velocity_gradient(v, x, x_next, x_scale, v_scale, stats[4] * grad_loss, others)
