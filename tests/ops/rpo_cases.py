"""Inputs and fp64 oracles for sde_step and rpo_loss, written from the published formulas.

The oracles use the repositories' own forms (flow_grpo's and DanceGRPO's means, autograd through the
eager loss), not the two coefficients or the gradient scales of the implementation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

SIGMA, SIGMA_NEXT = (0.9, 0.6, 0.3), (0.75, 0.45, 0.1)
ETA = {"dance_sde": 0.3, "sde": 0.7, "cps": 0.8, "ode": 0.0}


def sigmas(batch: int) -> tuple[Tensor, Tensor]:
    """Sigma and next sigma, float64 [B], cycling through three steps."""
    index = [i % 3 for i in range(batch)]
    return (
        torch.tensor([SIGMA[i] for i in index], dtype=torch.float64),
        torch.tensor([SIGMA_NEXT[i] for i in index], dtype=torch.float64),
    )


def spread(scalar: Tensor, like: Tensor) -> Tensor:
    return scalar.double().view(-1, *[1] * (like.ndim - 1))


def published_step(
    kind: str, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean [B, ...] and standard deviation [B], float64, as each repository writes them."""
    eta = ETA[kind]
    s, n = spread(sigma, x), spread(sigma_next, x)
    dt = n - s
    x, v = x.double(), v.double()
    if kind == "dance_sde":
        std = eta * torch.sqrt(sigma - sigma_next)
        score = -(x - (x - s * v) * (1 - s)) / s**2
        return x + v * dt - 0.5 * eta**2 * score * dt, std
    if kind == "sde":
        rate = torch.sqrt(s / (1 - s)) * eta
        mean = x * (1 + rate**2 / (2 * s) * dt) + v * (1 + rate**2 * (1 - s) / (2 * s)) * dt
        return mean, (eta * torch.sqrt(sigma / (1 - sigma)) * torch.sqrt(sigma - sigma_next))
    if kind == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        x0, x1 = x - s * v, x + (1 - s) * v
        return x0 * (1 - n) + x1 * torch.sqrt(n**2 - spread(std, x) ** 2), std
    return x + v * dt, torch.zeros_like(sigma)


def published_log_prob(x_next: Tensor, mean: Tensor, std: Tensor, normalised: bool) -> Tensor:
    square = (x_next.double() - mean) ** 2
    if not normalised:
        return -square.flatten(1).mean(1)
    s = spread(std, mean)
    density = (
        -square / (2 * s**2) - torch.log(s) - torch.log(torch.sqrt(2 * torch.as_tensor(math.pi)))
    )
    return density.flatten(1).mean(1)


def draw_latents(shape: tuple[int, ...], dtype: torch.dtype, seed: int, count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator).to(dtype) for _ in range(count)]


def rpo_inputs(
    shape: tuple[int, ...], dtype: torch.dtype, seed: int, *, kind: str, spread_of_v: float = 0.02
) -> dict[str, Any]:
    """A rollout by one policy (v_old) and slightly different current and reference policies."""
    x, v_old, change, ref_change, noise = draw_latents(shape, torch.float32, seed, 5)
    sigma, sigma_next = sigmas(shape[0])
    mean, std = published_step(kind, x, v_old, sigma, sigma_next)
    x_next = (mean + spread(std, x) * noise).to(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    advantage = torch.randn(shape[0], generator=generator)
    x, v_old = x.to(dtype), v_old.to(dtype)
    mean, _ = published_step(kind, x, v_old, sigma, sigma_next)
    return {
        "v": (v_old.float() + spread_of_v * change).to(dtype),
        "x": x,
        "x_next": x_next,
        "v_ref": (v_old.float() + spread_of_v * ref_change).to(dtype),
        "v_old": v_old,
        "sigma": sigma,
        "sigma_next": sigma_next,
        "log_prob_old": published_log_prob(x_next, mean, std, True).float(),
        "advantage": advantage,
    }


def published_loss(
    inputs: dict[str, Any],
    *,
    kind: str,
    kl: str,
    beta: float,
    clip: tuple[float, float],
    guard: bool,
    normalised: bool = True,
    dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Tensor], Tensor]:
    """Eager loss and its autograd gradient to v.

    With dtype float64 this is the oracle; with a lower one it is the eager rival of the
    error-relative rule.
    """
    t = {k: x.to(dtype) if torch.is_tensor(x) else x for k, x in inputs.items()}
    v = t["v"].detach().clone().requires_grad_()

    def mean_of(velocity: Tensor) -> tuple[Tensor, Tensor]:
        if dtype == torch.float64:
            return published_step(kind, t["x"], velocity, inputs["sigma"], inputs["sigma_next"])
        mean, std = _eager_step(kind, t["x"], velocity, t["sigma"], t["sigma_next"])
        return mean, std

    def log_prob_of(mean: Tensor, std: Tensor) -> Tensor:
        square = (t["x_next"] - mean) ** 2
        if not normalised:
            return -square.flatten(1).mean(1)
        s = std.view(-1, *[1] * (mean.ndim - 1))
        return (
            (-square / (2 * s**2) - torch.log(s) - 0.5 * math.log(2 * math.pi)).flatten(1).mean(1)
        )

    mean, std = mean_of(v)
    s = std.view(-1, *[1] * (mean.ndim - 1))
    log_prob = log_prob_of(mean, std)
    log_ratio = log_prob - t["log_prob_old"]
    if guard:
        mean_old, _ = mean_of(t["v_old"])
        log_ratio = (log_ratio + ((mean - mean_old) ** 2).flatten(1).mean(1) / (2 * std**2)) * std
    ratio = torch.exp(log_ratio)
    a = t["advantage"]
    policy = torch.maximum(-a * ratio, -a * torch.clamp(ratio, 1 - clip[0], 1 + clip[1]))
    if guard:
        policy = policy / (t["sigma"] - t["sigma_next"])
    mean_ref, _ = mean_of(t["v_ref"])
    if kl == "latent_mean":
        kl_value = ((mean - mean_ref) ** 2 / (2 * s**2)).flatten(1).mean(1)
    elif kl == "velocity":
        kl_value = ((v - t["v_ref"]) ** 2).flatten(1).mean(1)
    elif kl == "log_prob_diff":
        kl_value = log_prob - log_prob_of(mean_ref, std).detach()
    else:
        kl_value = torch.zeros_like(policy)
    loss = policy + beta * kl_value
    (grad,) = torch.autograd.grad(loss.sum(), v)
    results = {
        "loss": loss,
        "log_prob": log_prob,
        "ratio": ratio,
        "kl": kl_value,
        "clipped": ((ratio < 1 - clip[0]) | (ratio > 1 + clip[1])).to(dtype),
    }
    return {name: value.detach() for name, value in results.items()}, grad


def _eager_step(
    kind: str, x: Tensor, v: Tensor, sigma: Tensor, sigma_next: Tensor
) -> tuple[Tensor, Tensor]:
    """`published_step` in the tensors' own dtype."""
    shape = (-1, *[1] * (x.ndim - 1))
    s, n = sigma.view(shape), sigma_next.view(shape)
    dt = n - s
    eta = ETA[kind]
    if kind == "dance_sde":
        score = -(x - (x - s * v) * (1 - s)) / s**2
        return x + v * dt - 0.5 * eta**2 * score * dt, eta * torch.sqrt(sigma - sigma_next)
    if kind == "sde":
        rate = torch.sqrt(s / (1 - s)) * eta
        mean = x * (1 + rate**2 / (2 * s) * dt) + v * (1 + rate**2 * (1 - s) / (2 * s)) * dt
        return mean, eta * torch.sqrt(sigma / (1 - sigma)) * torch.sqrt(sigma - sigma_next)
    std = sigma_next * math.sin(eta * math.pi / 2)
    x0, x1 = x - s * v, x + (1 - s) * v
    return x0 * (1 - n) + x1 * torch.sqrt(n**2 - std.view(shape) ** 2), std
