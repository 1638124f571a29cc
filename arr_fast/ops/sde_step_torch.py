"""The PyTorch implementation of sde_step: cache-sized blocks on a CPU, plain operations on a
GPU."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from arr_fast.ops.latent_blocks import Combination, add_square_sums, blocks_of, flat
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
    flat_x, flat_v, flat_next = flat(x), flat(v), x_next.flatten(1)
    one = torch.ones_like(std)
    if noise is None and seed is not None:
        noise = philox_normal(seed, flat_x.shape[1])
    parts, scales = [flat_x, flat_v], [x_scale, v_scale]
    if noise is not None:
        parts, scales = [*parts, flat(noise)], [*scales, std]
    step = Combination(parts, scales)
    error = Combination([flat_next, flat_x, flat_v], [one, -x_scale, -v_scale])
    sums = torch.zeros(x.shape[0], dtype=torch.float64, device=x.device)
    for block in blocks_of(flat_x):
        target = flat_next[block.samples, block.elements]
        in_place = target.dtype == torch.float32
        buffer = torch.empty(target.shape, dtype=torch.float32, device=x.device)
        step(block, target if in_place else buffer)
        if not in_place:
            target.copy_(buffer)
        if noise is not None:
            add_square_sums(sums, block, error(block, buffer))
    if noise is None:
        return x_next, torch.full_like(std, float("nan"))
    return x_next, log_prob_of(sums, flat_x.shape[1], std, normalised).float()


def log_prob_of(square_sums: Tensor, elements: int, std: Tensor, normalised: bool) -> Tensor:
    """log_prob float64 [B] from sums of (x' - mu)^2; NaN where std is 0."""
    mean_square = square_sums / elements
    if not normalised:
        return -mean_square
    s = std.double()
    density = -mean_square / (2 * s.square()) - torch.log(s) - 0.5 * math.log(2 * math.pi)
    return torch.where(s > 0, density, float("nan"))
