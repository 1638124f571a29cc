"""The PyTorch implementation of rpo_loss: one blocked pass forward, one backward, no saved
tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from arr_fast.ops.latent_blocks import Combination, add_square_sums, blocks_of, flat
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
    one = torch.ones_like(std)
    flat_v, flat_x, flat_next = flat(v), flat(x), flat(x_next)
    terms = {"error": Combination([flat_next, flat_x, flat_v], [one, -x_scale, -v_scale])}
    if v_ref is not None and kl == "log_prob_diff":
        terms["gap"] = Combination([flat_next, flat_x, flat(v_ref)], [one, -x_scale, -v_scale])
    elif v_ref is not None:
        terms["gap"] = Combination([flat_v, flat(v_ref)], [one, -one])
    if v_old is not None:
        terms["drift"] = Combination([flat_v, flat(v_old)], [one, -one])
    sums = {name: torch.zeros(v.shape[0], dtype=torch.float64, device=v.device) for name in terms}
    for block in blocks_of(flat_v):
        buffer = flat_v.new_empty(flat_v[block.samples, block.elements].shape, dtype=torch.float32)
        for name, term in terms.items():
            add_square_sums(sums[name], block, term(block, buffer))
    return _finalise(
        sums,
        flat_v.shape[1],
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
    if "drift" in sums:
        drift = v_scale.square() * sums["drift"] / elements
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
        if "gap" in sums:
            kl_value = weight * (sums["gap"] - sums["error"]) / elements
            loss = loss + beta * kl_value
        else:
            kl_value = torch.full_like(kl_value, float("nan"))
    elif kl in ("latent_mean", "velocity"):
        kl_weight = torch.ones_like(weight)
        if kl == "latent_mean":
            kl_weight = gaussian_weight * v_scale.square()
        kl_value = kl_weight * sums["gap"] / elements
        loss = loss + beta * kl_value
        ref_scale = 2 * beta * kl_weight / elements
    error_scale = log_prob_slope * 2 * weight * v_scale / elements
    if "drift" in sums:
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
    error_scale, ref_scale, old_scale = (stats[row] * grad_loss for row in (4, 5, 6))
    one = torch.ones_like(x_scale)
    flat_v = flat(v)
    error = Combination([flat(x_next), flat(x), flat_v], [one, -x_scale, -v_scale])
    others = [
        (scale, Combination([flat_v, flat(other)], [one, -one]))
        for scale, other in ((ref_scale, v_ref), (old_scale, v_old))
        if other is not None
    ]
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    flat_grad = grad_v.flatten(1)
    for block in blocks_of(flat_v):
        target = flat_grad[block.samples, block.elements]
        total = target
        if target.dtype != torch.float32:
            total = torch.empty(target.shape, dtype=torch.float32, device=v.device)
        error(block, total).mul_(error_scale[block.samples, None])
        for scale, other in others:
            gap = other(block, torch.empty_like(total))
            total.addcmul_(gap, scale[block.samples, None])
        if total is not target:
            target.copy_(total)
    return grad_v
