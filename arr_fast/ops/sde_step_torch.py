"""The PyTorch implementation of sde_step: cache-sized blocks on a CPU, whole latents on a GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arr_fast.ops.latent_blocks import Scalars, Scratch, SquareSums, add_scaled, blocks
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
    """`sde_step` with float32 arithmetic; x' is rounded to x's dtype before log_prob.

    The error x' - mu is formed as rpo_loss forms it, in the same order and the same blocks, so that
    the ratio of an unchanged policy is exactly 1.
    """
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    elements = x[0].numel()
    if noise is None and seed is not None:
        noise = philox_normal(seed, elements).view(x.shape)
    of_x, of_v, of_noise = Scalars(x_scale), Scalars(v_scale), Scalars(std)
    minus_x, minus_v = Scalars(-x_scale), Scalars(-v_scale)
    sums = SquareSums(x)
    next_scratch, error_scratch = Scratch(), Scratch()
    for block in blocks([x, v] if noise is None else [x, v, noise], [x_next]):
        sample, (target,) = block.sample, block.outputs
        x_piece, v_piece = block.inputs[:2]
        is_float = target.dtype == torch.float32
        drawn = target if is_float else next_scratch.like(target)
        torch.mul(x_piece, of_x.at(sample), out=drawn)
        add_scaled(drawn, [(v_piece, of_v.at(sample))], drawn)
        if noise is not None:
            add_scaled(drawn, [(block.inputs[2], of_noise.at(sample))], drawn)
        if not is_float:
            drawn.copy_(target.copy_(drawn))
        if noise is not None:
            terms = [(x_piece, minus_x.at(sample)), (v_piece, minus_v.at(sample))]
            error = add_scaled(drawn, terms, error_scratch.like(drawn))
            sums.add(sample, error)
    if noise is None:
        return x_next, torch.full_like(std, float("nan"))
    return x_next, log_prob_of(sums.total(), elements, std, normalised).float()


def log_prob_of(square_sums: Tensor, elements: int, std: Tensor, normalised: bool) -> Tensor:
    """log_prob float64 [B] from sums of (x' - mu)^2; NaN where std is 0."""
    mean_square = square_sums / elements
    if not normalised:
        return -mean_square
    s = std.double()
    density = -mean_square / (2 * s.square()) - torch.log(s) - 0.5 * math.log(2 * math.pi)
    return torch.where(s > 0, density, float("nan"))
