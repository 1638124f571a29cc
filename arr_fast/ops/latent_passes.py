"""The passes over latents that sde_step and rpo_loss share: sums of squares, and the gradient dv.

On a CPU these are bound by memory traffic. In reads and writes per element, forward and backward:
the published formula under autograd makes 77 (124 with a latent-mean KL), blocks that stay in the
cache 15 (25), a loop that fuses everything 7 (10). So large latents are fused where a compiler can
do it (`latent_fused`), and all others take the blocks (`latent_blocks`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from arr_fast.ops import latent_fused
from arr_fast.ops.latent_blocks import Scalars, Scratch, SquareSums, add_scaled, blocks


def error_square_sums(
    v: Tensor, x: Tensor, x_next: Tensor, x_scale: Tensor, v_scale: Tensor
) -> Tensor:
    """Sums of (x' - x_scale x - v_scale v)^2 per sample.

    The rollout and the loss both add up in this order, fused or in blocks, so the ratio of an
    unchanged policy is exactly 1.

    Args:
        v: [B, ...] velocity.
        x: [B, ...] latents before the step.
        x_next: [B, ...] latents after it.
        x_scale: Float32 [B].
        v_scale: Float32 [B].

    Returns:
        Float64 [B].
    """
    formula = latent_fused.error_square_sums
    fused: Tensor | None = latent_fused.run_fused(formula, [v, x, x_next], [x_scale, v_scale])
    if fused is not None:
        return fused.double()
    minus_x, minus_v = Scalars(-x_scale), Scalars(-v_scale)
    sums, scratch = SquareSums(v), Scratch()
    for block in blocks([v, x, x_next]):
        v_piece, x_piece, next_piece = block.inputs
        terms = [(x_piece, minus_x.at(block.sample)), (v_piece, minus_v.at(block.sample))]
        sums.add(block.sample, add_scaled(next_piece, terms, scratch.like(v_piece)))
    return sums.total()


def gap_square_sums(v: Tensor, other: Tensor) -> Tensor:
    """Sums of (v - other)^2 per sample, in blocks: where latents are fused, so is the whole loss.

    Args:
        v: [B, ...] velocity.
        other: [B, ...] velocity of another policy.

    Returns:
        Float64 [B].
    """
    sums, scratch = SquareSums(v), Scratch()
    for block in blocks([v, other]):
        v_piece, other_piece = block.inputs
        sums.add(block.sample, torch.sub(v_piece, other_piece, out=scratch.like(v_piece)))
    return sums.total()


def velocity_gradient(
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    x_scale: Tensor,
    v_scale: Tensor,
    error_scale: Tensor,
    others: list[tuple[Tensor, Tensor]],
) -> Tensor:
    """dv = error_scale (x' - x_scale x - v_scale v) + sum of scale (v - other), written once.

    The terms of each difference nearly cancel, so a difference is formed first and scaled last.

    Args:
        v: [B, ...] velocity.
        x: [B, ...] latents before the step.
        x_next: [B, ...] latents after it.
        x_scale: Float32 [B].
        v_scale: Float32 [B].
        error_scale: Float32 [B].
        others: (velocity [B, ...], scale float32 [B]) of other policies.

    Returns:
        [B, ...] in v's dtype.
    """
    latents = [v, x, x_next, *(other for other, _ in others)]
    numbers = [x_scale, v_scale, error_scale, *(scale for _, scale in others)]
    fused: Tensor | None = latent_fused.run_fused(latent_fused.velocity_gradient, latents, numbers)
    if fused is not None:
        return fused.view(v.shape)
    minus_x, minus_v = Scalars(-x_scale), Scalars(-v_scale)
    error, *gap_scales = (Scalars(scale) for scale in numbers[2:])
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    total_scratch, gap_scratch = Scratch(), Scratch()
    for block in blocks(latents, [grad_v]):
        sample, (target,) = block.sample, block.outputs
        v_piece, x_piece, next_piece = block.inputs[:3]
        total = target if target.dtype == torch.float32 else total_scratch.like(target)
        terms = [(x_piece, minus_x.at(sample)), (v_piece, minus_v.at(sample))]
        add_scaled(next_piece, terms, total).mul_(error.at(sample))
        for scale, piece in zip(gap_scales, block.inputs[3:], strict=True):
            gap = torch.sub(v_piece, piece, out=gap_scratch.like(total))
            add_scaled(total, [(gap, scale.at(sample))], total)
        if total is not target:
            target.copy_(total)
    return grad_v
