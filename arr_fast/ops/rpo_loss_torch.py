"""The PyTorch implementation of rpo_loss: one blocked pass forward, one backward, no saved
tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from arr_fast.ops.latent_blocks import Scalars, Scratch, SquareSums, add_scaled, blocks
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
    minus_x, minus_v = Scalars(-x_scale), Scalars(-v_scale)
    minus_one = Scalars(-torch.ones_like(std))
    latents = {"v": v, "x": x, "x_next": x_next}
    latents |= {k: t for k, t in (("v_ref", v_ref), ("v_old", v_old)) if t is not None}
    names = ("error", *(n for n in ("v_ref", "v_old") if n in latents))
    sums = {name: SquareSums(v) for name in names}
    scratch = Scratch()
    for block in blocks(list(latents.values())):
        sample = block.sample
        piece = dict(zip(latents, block.inputs, strict=True))
        out = scratch.like(piece["v"])
        step = [(piece["x"], minus_x.at(sample)), (piece["v"], minus_v.at(sample))]
        sums["error"].add(sample, add_scaled(piece["x_next"], step, out))
        for name in ("v_ref", "v_old"):
            if name not in latents:
                continue
            if name == "v_ref" and kl == "log_prob_diff":  # x' - mu_ref
                terms = [step[0], (piece["v_ref"], minus_v.at(sample))]
                add_scaled(piece["x_next"], terms, out)
            else:
                add_scaled(piece["v"], [(piece[name], minus_one.at(sample))], out)
            sums[name].add(sample, out)
    return _finalise(
        {name: each.total() for name, each in sums.items()},
        v[0].numel(),
        v_scale.double(),
        std,
        dt.double(),
        log_prob_old.double(),
        advantage.double(),
        (1 - clip_low, 1 + clip_high),
        beta,
        kl,
        normalised,
    )


def _finalise(
    sums: dict[str, Tensor],
    elements: int,
    v_scale: Tensor,
    std: Tensor,
    dt: Tensor,
    log_prob_old: Tensor,
    advantage: Tensor,
    clip: tuple[float, float],
    beta: float,
    kl: str,
    normalised: bool,
) -> tuple[Tensor, Tensor]:
    """Loss [B] and stats [7, B] from the sums of squares; all inputs float64 [B]."""
    log_prob = log_prob_of(sums["error"], elements, std, normalised)
    gaussian_weight = 0.5 / std.double().square()
    weight = gaussian_weight if normalised else torch.ones_like(gaussian_weight)
    log_ratio = log_prob - log_prob_old
    policy_scale = ratio_slope = torch.ones_like(log_prob)
    if "v_old" in sums:
        drift = v_scale.square() * sums["v_old"] / elements
        log_ratio = std.double() * (log_ratio + weight * drift)
        policy_scale, ratio_slope = -1 / dt, std.double()
    ratio = log_ratio.exp()
    policy, clipped_policy = -advantage * ratio, -advantage * ratio.clamp(*clip)
    loss = torch.maximum(policy, clipped_policy) * policy_scale
    slope = torch.where(policy >= clipped_policy, policy, 0.0) * policy_scale * ratio_slope
    log_prob_slope = slope
    kl_value, ref_scale, old_scale = (torch.zeros_like(log_prob) for _ in range(3))
    if kl == "log_prob_diff":
        log_prob_slope = slope + beta
        if "v_ref" in sums:
            kl_value = weight * (sums["v_ref"] - sums["error"]) / elements
            loss = loss + beta * kl_value
        else:
            kl_value = torch.full_like(kl_value, float("nan"))
    elif kl in ("latent_mean", "velocity"):
        kl_weight = torch.ones_like(weight)
        if kl == "latent_mean":
            kl_weight = gaussian_weight * v_scale.square()
        kl_value = kl_weight * sums["v_ref"] / elements
        loss = loss + beta * kl_value
        ref_scale = 2 * beta * kl_weight / elements
    error_scale = log_prob_slope * 2 * weight * v_scale / elements
    if "v_old" in sums:
        old_scale = slope * 2 * weight * v_scale.square() / elements
    is_clipped = (ratio < clip[0]) | (ratio > clip[1])
    stats = (log_prob, ratio, is_clipped, kl_value, error_scale, ref_scale, old_scale)
    return loss.float(), torch.stack([row.float() for row in stats])


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
    """dv = error_scale (x' - mu) + ref_scale (v - v_ref) + old_scale (v - v_old), written once.

    The terms of each difference nearly cancel, so a difference is formed first and scaled last.
    """
    error_scale, ref_scale, old_scale = (Scalars(stats[row] * grad_loss) for row in (4, 5, 6))
    minus_x, minus_v = Scalars(-x_scale), Scalars(-v_scale)
    minus_one = Scalars(-torch.ones_like(x_scale))
    others = [(s, t) for s, t in ((ref_scale, v_ref), (old_scale, v_old)) if t is not None]
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    total_scratch, gap_scratch = Scratch(), Scratch()
    for block in blocks([v, x, x_next, *(t for _, t in others)], [grad_v]):
        sample, (target,) = block.sample, block.outputs
        v_piece, x_piece, next_piece = block.inputs[:3]
        total = target if target.dtype == torch.float32 else total_scratch.like(target)
        terms = [(x_piece, minus_x.at(sample)), (v_piece, minus_v.at(sample))]
        add_scaled(next_piece, terms, total).mul_(error_scale.at(sample))
        for (scale, _), other in zip(others, block.inputs[3:], strict=True):
            gap = gap_scratch.like(total)
            add_scaled(v_piece, [(other, minus_one.at(sample))], gap)
            add_scaled(total, [(gap, scale.at(sample))], total)
        if total is not target:
            target.copy_(total)
    return grad_v
