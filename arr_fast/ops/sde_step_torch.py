"""The PyTorch implementation of sde_step: cache-sized blocks on a CPU, whole latents on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arr_fast.ops.latent_blocks import Scalars, Scratch, add_scaled, blocks
from arr_fast.ops.latent_passes import error_square_sums
from arr_fast.ops.philox import philox_normal


def sde_step_torch(
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
    """`sde_step` with float32 arithmetic; x' is rounded to x's dtype before log_prob."""
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elements = x[0].numel()
    if noise is None and seed is not None:
        noise = philox_normal(seed, elements).view(x.shape)
    of_x, of_v, of_noise = Scalars(x_scale), Scalars(v_scale), Scalars(std)
    scratch = Scratch()
    for block in blocks([x, v] if noise is None else [x, v, noise], [x_next]):
        sample, (target,) = block.sample, block.outputs
        drawn = target if target.dtype == torch.float32 else scratch.like(target)
        torch.mul(block.inputs[0], of_x.at(sample), out=drawn)
        add_scaled(drawn, [(block.inputs[1], of_v.at(sample))], drawn)
        if noise is not None:
            add_scaled(drawn, [(block.inputs[2], of_noise.at(sample))], drawn)
        if drawn is not target:
            target.copy_(drawn)
    if noise is None:
        return x_next, torch.full_like(std, float("nan"))
    sums = error_square_sums(v, x, x_next, x_scale, v_scale)
    return x_next, log_prob_of(sums, elements, std, normalised).float()


def log_prob_of(square_sums: Tensor, elements: int, std: Tensor, normalised: bool) -> Tensor:
    """log_prob float64 [B] from float64 sums of (x' - mu)^2; NaN where std is 0."""
    mean_square = square_sums / elements
    if not normalised:
        return -mean_square
    s = std.double()
    density = mean_square / (-2 * s.square()) - s.log() - 0.5 * math.log(2 * math.pi)
    return density.masked_fill(s <= 0, float("nan"))
