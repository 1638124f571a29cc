"""sde_step: one step of a flow SDE (coefficients, schema, checks and dispatch).

With sigma' the next sigma, dt = sigma' - sigma < 0, v = noise - data, x0 = x - sigma v and
x1 = x + (1 - sigma) v, every kind of step is

    mu = (1 - sigma') x0 + c x1        x' = mu + S eps

    dance_sde  s = eta                           c = sigma' + s^2 dt / (2 sigma),  S = s sqrt(-dt)
    sde        s = eta sqrt(sigma/(1 - sigma))   the same c and S; sigma_after_first where sigma = 1
    cps        S = sigma' sin(eta pi / 2)        c = sqrt(sigma'^2 - S^2)
    ode        S = 0                             c = sigma'

and log_prob is the mean over a sample's elements of the Gaussian log density of x', rounded to its
storage dtype first. Sources: flow_grpo flow_grpo/diffusers_patch/sd3_sde_with_logprob.py (sde,
cps), the ARR reference's fastvideo/train_rpo_flux.py `flux_step` (dance_sde).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

StepKind = Literal["dance_sde", "sde", "cps", "ode"]


@dataclass(frozen=True, slots=True)
class StepCoefficients:
    """One step's numbers, each float32 [B]: mu = x_scale x + v_scale v, x' = mu + std eps."""

    x_scale: Tensor
    v_scale: Tensor
    std: Tensor
    dt: Tensor

    def __getitem__(self, index: int | slice | Tensor) -> StepCoefficients:
        """Picks steps: compute a whole schedule once, then index it inside the loop."""
        return StepCoefficients(
            self.x_scale[index], self.v_scale[index], self.std[index], self.dt[index]
        )

    def to(self, device: torch.device | str) -> StepCoefficients:
        """Moves the numbers to a device."""
        return StepCoefficients(
            *(t.to(device) for t in (self.x_scale, self.v_scale, self.std, self.dt))
        )


def step_coefficients(
    kind: StepKind,
    sigma: Tensor,
    sigma_next: Tensor,
    *,
    eta: float = 0.0,
    sigma_after_first: float | None = None,
) -> StepCoefficients:
    """Computes the coefficients of steps in float64 and rounds them once to float32.

    The values are checked, which waits for the device: call it on CPU tensors for a whole schedule.

    Args:
        kind: "dance_sde", "sde", "cps" or "ode".
        sigma: [B] noise level before the step, in (0, 1].
        sigma_next: [B] noise level after the step, in [0, sigma).
        eta: The noise level parameter: eta of dance_sde, a of sde and cps; unused by ode.
        sigma_after_first: The schedule's second sigma, which sde needs where sigma = 1.

    Returns:
        float32 [B] coefficients on sigma's device.

    Raises:
        ValueError: An unknown kind, or a value out of its range (NaN included).
    """
    if kind not in get_args(StepKind):
        raise ValueError(f"kind must be one of {', '.join(get_args(StepKind))}, got {kind!r}")
    if sigma.ndim != 1 or sigma.shape != sigma_next.shape:
        raise ValueError(
            f"sigma and sigma_next must be [B], got {tuple(sigma.shape)}, {tuple(sigma_next.shape)}"
        )
    if not math.isfinite(eta) or eta < 0 or (kind != "ode" and eta == 0):
        raise ValueError(f"eta must be finite and above 0 for {kind}, got {eta}")
    sigma, sigma_next = sigma.double(), sigma_next.double()
    if not bool(((sigma > 0) & (sigma <= 1)).all()):
        raise ValueError(f"sigma must be in (0, 1], got {sigma.tolist()}")
    if not bool(((sigma_next >= 0) & (sigma_next < sigma)).all()):
        raise ValueError(f"sigma_next must be in [0, sigma), got {sigma_next.tolist()}")
    dt = sigma_next - sigma
    if kind in ("dance_sde", "sde"):
        rate = torch.full_like(sigma, eta)
        if kind == "sde":
            is_first = sigma >= 1
            if bool(is_first.any()) and sigma_after_first is None:
                raise ValueError("sigma_after_first is needed by sde where sigma = 1")
            inner = torch.where(is_first, sigma_after_first or 0.0, sigma)
            rate = eta * torch.sqrt(sigma / (1 - inner))
        noise_scale = sigma_next + rate.square() * dt / (2 * sigma)
        std = rate * torch.sqrt(-dt)
    elif kind == "cps":
        std = sigma_next * math.sin(eta * math.pi / 2)
        noise_scale = torch.sqrt(sigma_next.square() - std.square())
    else:
        std = torch.zeros_like(sigma)
        noise_scale = sigma_next
    x_scale = (1 - sigma_next) + noise_scale
    v_scale = noise_scale * (1 - sigma) - (1 - sigma_next) * sigma
    return StepCoefficients(x_scale.float(), v_scale.float(), std.float(), dt.float())


def sde_step(
    x: Tensor,
    v: Tensor,
    coefficients: StepCoefficients,
    *,
    noise: Tensor | None = None,
    seed: Tensor | None = None,
    normalised: bool = True,
    impl: str = "torch",
) -> tuple[Tensor, Tensor]:
    """Takes one step; mean, next latents and log_prob in one pass over the latents.

    x' is differentiable in x and v (a reparameterised sample); log_prob is not.

    Args:
        x: [B, ...] latents, float32, bfloat16 or float16.
        v: [B, ...] predicted velocity, any of these dtypes.
        coefficients: This step's numbers, from `step_coefficients`.
        noise: [B, ...] standard normals. Without noise and seed the step is deterministic.
        seed: int64 [B]; draws the noise in place with Philox, one seed per sample.
        normalised: False gives flow_grpo's cps log_prob: no variance and no constants.
        impl: "torch", "triton" or "reference".

    Returns:
        (x' [B, ...] in x's dtype, log_prob float32 [B]; NaN for a deterministic step).

    Raises:
        ValueError: Shapes, dtypes, devices or values that do not fit; the message names the
        argument.
    """
    step = coefficients
    x_next, log_prob = sde_step_op(
        x, v, step.x_scale, step.v_scale, step.std, noise, seed, normalised, impl
    )
    return x_next, log_prob.detach()


@torch.library.custom_op("arr_fast::sde_step", mutates_args=())
def sde_step_op(
    x: Tensor,
    v: Tensor,
    x_scale: Tensor,
    v_scale: Tensor,
    std: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    normalised: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    """The op behind `sde_step`; scalars are float32 [B] tensors, so no value recompiles a graph."""
    check_sde_step(x, v, x_scale, v_scale, std, noise, seed)
    if impl == "torch":
        from arr_fast.ops.sde_step_torch import sde_step_torch as launch
    elif impl == "reference":
        from arr_fast.ops.step_reference import sde_step_reference as launch
    elif impl == "triton":
        from arr_fast_kernels.sde_step import sde_step as launch
    else:
        raise ValueError(f"impl must be torch, triton or reference, got {impl!r}")
    result: tuple[Tensor, Tensor] = launch(
        x=x,
        v=v,
        x_scale=x_scale,
        v_scale=v_scale,
        std=std,
        noise=noise,
        seed=seed,
        normalised=normalised,
    )
    return result


@sde_step_op.register_fake
def _(
    x: Tensor,
    v: Tensor,
    x_scale: Tensor,
    v_scale: Tensor,
    std: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
    normalised: bool,
    impl: str,
) -> tuple[Tensor, Tensor]:
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return x_next, torch.empty(x.shape[0], dtype=torch.float32, device=x.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, v, x_scale, v_scale = inputs[:4]
    ctx.save_for_backward(x_scale, v_scale)
    ctx.v_dtype = v.dtype


def _backward(ctx: Any, grad_x_next: Tensor, grad_log_prob: Tensor) -> tuple[Tensor | None, ...]:
    x_scale, v_scale = ctx.saved_tensors
    shape = (-1, *[1] * (grad_x_next.ndim - 1))
    grad = grad_x_next.float()
    grad_x = (grad * x_scale.view(shape)).to(grad_x_next.dtype)
    grad_v = (grad * v_scale.view(shape)).to(ctx.v_dtype)
    return grad_x, grad_v, *[None] * 7


sde_step_op.register_autograd(_backward, setup_context=_setup_context)


def check_sde_step(
    x: Tensor,
    v: Tensor,
    x_scale: Tensor,
    v_scale: Tensor,
    std: Tensor,
    noise: Tensor | None,
    seed: Tensor | None,
) -> None:
    """Checks shapes, dtypes, devices and values; raises a ValueError that names the argument."""
    check_latents({"x": x, "v": v, "noise": noise}, like="x")
    check_scalars({"x_scale": x_scale, "v_scale": v_scale, "std": std}, x)
    if noise is not None and seed is not None:
        raise ValueError("noise and seed are both given; pass one of them")
    if seed is not None and (seed.shape != x.shape[:1] or seed.dtype != torch.int64):
        raise ValueError(f"seed must be int64 [{x.shape[0]}], got {seed.dtype} {tuple(seed.shape)}")
    if seed is not None and seed.device != x.device:
        raise ValueError(f"seed is on {seed.device}, x is on {x.device}")
    if noise is None and seed is None and std.device.type == "cpu" and bool((std > 0).any()):
        raise ValueError("noise or seed is needed: std is above 0")


def check_latents(latents: dict[str, Tensor | None], *, like: str) -> None:
    """Checks that latents are floating, of one shape [B, ...] and on one device."""
    first = latents[like]
    assert first is not None
    if first.ndim < 2:
        raise ValueError(f"{like} must be [B, ...], got {tuple(first.shape)}")
    for name, tensor in latents.items():
        if tensor is None:
            continue
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have {like}'s shape {tuple(first.shape)}, got {tuple(tensor.shape)}"
            )
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
        if tensor.device != first.device:
            raise ValueError(f"{name} is on {tensor.device}, {like} is on {first.device}")


def check_scalars(scalars: dict[str, Tensor], latents: Tensor) -> None:
    """Checks per-sample scalars: float32 [B] on the latents' device; values only on a CPU.

    On a GPU a look at the values would wait for the device; there NaN shows in the result.
    """
    for name, scalar in scalars.items():
        if scalar.shape != latents.shape[:1] or scalar.dtype != torch.float32:
            raise ValueError(
                f"{name} must be float32 [{latents.shape[0]}], "
                f"got {scalar.dtype} {tuple(scalar.shape)}"
            )
        if scalar.device != latents.device:
            raise ValueError(f"{name} is on {scalar.device}, the latents are on {latents.device}")
    if latents.device.type == "cpu" and bool(torch.stack([*scalars.values()]).isnan().any()):
        name, scalar = next(item for item in scalars.items() if bool(item[1].isnan().any()))
        raise ValueError(f"{name} holds NaN: {scalar.tolist()}")
