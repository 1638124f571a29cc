"""Noise schedules of flow matching: decreasing sigmas from 1 to 0, and what the model is told.

    sigma(t) = shift t / (1 + (shift - 1) t),   t = 1, 1 - 1/T, ..., 0

diffusers' dynamic shift is the same curve with shift = exp(mu) and mu linear in the number of
image tokens (diffusers pipelines/flux/pipeline_flux.py, calculate_shift; time_shift of
FlowMatchEulerDiscreteScheduler). The ARR reference takes a constant shift of 3.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def shifted_sigmas(steps: int, shift: float = 1.0) -> Tensor:
    """The linear schedule, shifted towards high noise.

    Args:
        steps: T.
        shift: 1 leaves the schedule linear; above 1 spends more steps at high noise.

    Returns:
        float64 [T + 1], from 1 to 0.

    Raises:
        ValueError: steps below 1, or a shift that is not finite and above 0.
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not (math.isfinite(shift) and shift > 0):
        raise ValueError(f"shift must be finite and above 0, got {shift}")
    t = torch.arange(steps, -1, -1, dtype=torch.float64) / steps
    return shift * t / (1 + (shift - 1) * t)


def dynamic_shift(
    tokens: int,
    *,
    base_tokens: int = 256,
    max_tokens: int = 4096,
    base_shift: float = 0.5,
    max_shift: float = 1.15,
) -> float:
    """The shift that FLUX pipelines use for an image of so many tokens.

    Args:
        tokens: Packed latent tokens of one image.
        base_tokens, base_shift: One end of the line for mu.
        max_tokens, max_shift: Its other end.

    Returns:
        exp(mu), for `shifted_sigmas`.
    """
    slope = (max_shift - base_shift) / (max_tokens - base_tokens)
    return math.exp(base_shift + slope * (tokens - base_tokens))


def check_sigmas(sigmas: Tensor) -> Tensor:
    """Returns a schedule as float64 on the CPU.

    Raises:
        ValueError: Not [T + 1] with T >= 1, not strictly decreasing, or not from (0, 1] to 0.
    """
    values = sigmas.detach().to("cpu", torch.float64)
    if values.ndim != 1 or len(values) < 2:
        raise ValueError(f"sigmas must be [T + 1] with T >= 1, got {tuple(values.shape)}")
    if not bool((values[1:] < values[:-1]).all()):
        raise ValueError(f"sigmas must decrease, got {values.tolist()}")
    if not (0 < values[0] <= 1) or values[-1] != 0:
        raise ValueError(f"sigmas must go from (0, 1] to 0, got {values.tolist()}")
    return values


def model_times(sigmas: Tensor, *, floor: bool = False) -> Tensor:
    """The noise level that the model is told at each step.

    Args:
        sigmas: float64 [T + 1].
        floor: True rounds down to thousandths, as the ARR reference does: int(1000 sigma) / 1000,
            computed in float32 like there.

    Returns:
        float32 [T].
    """
    times = sigmas[:-1].float()
    return (times * 1000).floor() / 1000 if floor else times
