"""rpo_loss: the clipped RPO objective of one denoising step (schema, checks and dispatch).

    log_prob = mean_i log N(x'_i; mu_i, std^2)        mu = x_scale x + v_scale v
    rho  = exp(log_prob - log_prob_old)
    loss = max(-A rho, -A clip(rho, 1 - clip_low, 1 + clip_high)) + beta KL

KL forms, with mu_ref from v_ref:
    latent_mean    mean (mu - mu_ref)^2 / (2 std^2), per element; times the elements: nats
    velocity       mean (v - v_ref)^2
    log_prob_diff  log_prob - log_prob_ref, the ARR reference's form: its reference term carries no
                   gradient, so v_ref may be None; the reported KL is then NaN and the loss leaves
                   its value out, with the same gradient
    none           0
GRPO-Guard (v_old given): rho = exp(std (log_prob - log_prob_old + mean (mu - mu_old)^2 / (2
std^2))) and the policy term is divided by -dt (flow_grpo README). log_prob is a mean over E
elements, so a clip c is worth c E nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _get_current_dispatch_mode

from arr_fast.ops.sde_step import StepCoefficients, check_latents, check_scalars

KLForm = Literal["none", "latent_mean", "velocity", "log_prob_diff"]


@dataclass(frozen=True, slots=True)
class RPOLoss:
    """Per-sample results, float32 [B]; only `loss` carries a gradient, to v.

    Attributes:
        loss: Policy term plus beta KL; average it over the batch.
        log_prob: Mean log density of x' under the current policy.
        ratio: rho.
        clipped: 1 where rho lies outside the clip range.
        kl: The KL in its form's own unit (per element), without beta.
    """

    loss: Tensor
    log_prob: Tensor
    ratio: Tensor
    clipped: Tensor
    kl: Tensor


def rpo_loss(
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    coefficients: StepCoefficients,
    *,
    log_prob_old: Tensor,
    advantage: Tensor,
    clip_low: float,
    clip_high: float,
    beta: float = 0.0,
    kl: KLForm = "none",
    v_ref: Tensor | None = None,
    v_old: Tensor | None = None,
    normalised: bool = True,
    impl: str = "torch",
) -> RPOLoss:
    """Computes the loss; forward and backward each read the latents once.

    Args:
        v: [B, ...] predicted velocity; the only input with a gradient.
        x: [B, ...] latents before the step.
        x_next: [B, ...] latents after the step, as the rollout stored them.
        coefficients: This step's numbers, from `step_coefficients`.
        log_prob_old: float32 [B] from the rollout.
        advantage: float32 [B].
        clip_low: Width of the clip below 1.
        clip_high: Width of the clip above 1.
        beta: Weight of the KL.
        kl: The form of the KL.
        v_ref: [B, ...] velocity of the reference model; see the KL forms.
        v_old: [B, ...] velocity at the rollout; turns GRPO-Guard on.
        normalised: False takes flow_grpo's cps log_prob; not with GRPO-Guard.
        impl: "torch", "triton" or "reference".

    Returns:
        The per-sample loss and its diagnostics.

    Raises:
        ValueError: Shapes, dtypes, devices or values that do not fit; the message names the
        argument.
    """
    step = coefficients
    run: Any = _RPOLossFunction.apply if _is_plain(v) else rpo_loss_op
    loss, stats = run(
        v,
        x,
        x_next,
        v_ref,
        v_old,
        step.x_scale,
        step.v_scale,
        step.std,
        step.dt,
        log_prob_old,
        advantage,
        clip_low,
        clip_high,
        beta,
        kl,
        normalised,
        impl,
    )
    log_prob, ratio, clipped, kl_value = stats.detach()[:4].unbind(0)
    return RPOLoss(loss, log_prob, ratio, clipped, kl_value)


def _rpo_loss(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    """Checks and runs the forward.

    Returns:
        (loss [B], stats [7, B]: log_prob, ratio, clipped, kl, and the three gradient scales
        error_scale, ref_scale, old_scale that the backward reads).
    """
    scalars = {
        "x_scale": x_scale,
        "v_scale": v_scale,
        "std": std,
        "dt": dt,
        "log_prob_old": log_prob_old,
        "advantage": advantage,
    }
    check_rpo_loss(v, x, x_next, v_ref, v_old, scalars, clip_low, clip_high, kl, normalised)
    if impl == "torch":
        from arr_fast.ops.rpo_loss_torch import rpo_loss_torch as launch
    elif impl == "reference":
        from arr_fast.ops.step_reference import rpo_loss_reference as launch
    elif impl == "triton":
        from arr_fast_kernels.rpo_loss import rpo_loss as launch
    else:
        raise ValueError(f"impl must be torch, triton or reference, got {impl!r}")
    result: tuple[Tensor, Tensor] = launch(
        v=v,
        x=x,
        x_next=x_next,
        v_ref=None if kl == "none" else v_ref,
        v_old=v_old,
        **scalars,
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        kl=kl,
        normalised=normalised,
    )
    return result


# What a graph holds; eager calls take `_RPOLossFunction`.
rpo_loss_op = torch.library.custom_op("arr_fast::rpo_loss", _rpo_loss, mutates_args=())


@rpo_loss_op.register_fake
def _(
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
    impl: str,
) -> tuple[Tensor, Tensor]:
    batch = v.shape[0]
    loss = torch.empty(batch, dtype=torch.float32, device=v.device)
    return loss, torch.empty((7, batch), dtype=torch.float32, device=v.device)


def _rpo_loss_backward(
    grad_loss: Tensor,
    stats: Tensor,
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    x_scale: Tensor,
    v_scale: Tensor,
    impl: str,
) -> Tensor:
    """dv = grad (error_scale (x' - mu) + ref_scale (v - v_ref) + old_scale (v - v_old)), v's
    dtype."""
    if impl == "torch":
        from arr_fast.ops.rpo_loss_torch import rpo_loss_backward_torch as launch
    elif impl == "reference":
        from arr_fast.ops.step_reference import rpo_loss_backward_reference as launch
    else:
        from arr_fast_kernels.rpo_loss import rpo_loss_backward as launch
    grad_v: Tensor = launch(
        grad_loss=grad_loss,
        stats=stats,
        v=v,
        x=x,
        x_next=x_next,
        v_ref=v_ref,
        v_old=v_old,
        x_scale=x_scale,
        v_scale=v_scale,
    )
    return grad_v


rpo_loss_backward_op = torch.library.custom_op(
    "arr_fast::rpo_loss_backward", _rpo_loss_backward, mutates_args=()
)


@rpo_loss_backward_op.register_fake
def _(
    grad_loss: Tensor,
    stats: Tensor,
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    x_scale: Tensor,
    v_scale: Tensor,
    impl: str,
) -> Tensor:
    return torch.empty(v.shape, dtype=v.dtype, device=v.device)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    v, x, x_next, v_ref, v_old, x_scale, v_scale = inputs[:7]
    kl, _, impl = inputs[14:]
    # log_prob_diff has no gradient through the reference: the backward need not read v_ref.
    v_ref = v_ref if kl in ("latent_mean", "velocity") else None
    ctx.save_for_backward(output[1], v, x, x_next, v_ref, v_old, x_scale, v_scale)
    ctx.impl = impl


def _backward(
    ctx: Any, grad_loss: Tensor, grad_stats: Tensor, run: Any = rpo_loss_backward_op
) -> tuple[Tensor | None, ...]:
    # A mean over the batch hands back an expanded scalar; the kernel reads one number per sample.
    return run(grad_loss.contiguous(), *ctx.saved_tensors, ctx.impl), *[None] * 16


rpo_loss_op.register_autograd(_backward, setup_context=_setup_context)


class _RPOLossFunction(torch.autograd.Function):
    """The op without its dispatch, which costs as much as a pass over 4 MB latents.

    With a `setup_context` of its own, PyTorch would look up the signature of forward in each call.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _rpo_loss(*inputs)
        _setup_context(ctx, inputs, output)
        ctx.mark_non_differentiable(output[1])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, grad_stats: Tensor) -> tuple[Tensor | None, ...]:
        return _backward(ctx, grad_loss, grad_stats, _rpo_loss_backward)


def _is_plain(tensor: Tensor) -> bool:
    """Whether a call is eager, on a tensor that no mode or subclass watches."""
    if torch.compiler.is_compiling() or type(tensor) not in (Tensor, nn.Parameter):
        return False
    return _get_current_dispatch_mode() is None


def check_rpo_loss(
    v: Tensor,
    x: Tensor,
    x_next: Tensor,
    v_ref: Tensor | None,
    v_old: Tensor | None,
    scalars: dict[str, Tensor],
    clip_low: float,
    clip_high: float,
    kl: str,
    normalised: bool,
) -> None:
    """Checks shapes, dtypes, devices and values; raises a ValueError that names the argument."""
    check_latents({"v": v, "x": x, "x_next": x_next, "v_ref": v_ref, "v_old": v_old}, like="v")
    check_scalars(scalars, v)
    std, dt = scalars["std"], scalars["dt"]
    if std.device.type == "cpu" and not bool((std > 0).all()):
        raise ValueError(f"std must be above 0 to have a log_prob (ode has none): {std.tolist()}")
    if v_old is not None and dt.device.type == "cpu" and not bool((dt < 0).all()):
        raise ValueError(f"dt must be below 0: {dt.tolist()}")
    if not (0 <= clip_low <= 1 and clip_high >= 0):
        raise ValueError(
            f"clip_low must be in [0, 1] and clip_high at least 0, got {clip_low}, {clip_high}"
        )
    if kl not in get_args(KLForm):
        raise ValueError(f"kl must be one of {', '.join(get_args(KLForm))}, got {kl!r}")
    if kl in ("latent_mean", "velocity") and v_ref is None:
        raise ValueError(f"v_ref is needed by kl={kl!r}")
    if v_old is not None and not normalised:
        raise ValueError("v_old turns GRPO-Guard on, which needs normalised=True")
