"""The RPO loss and its gradient to the predicted velocity: one pass forward, one pass backward.

    mu       = x_scale x + v_scale v
    log_prob = -w mean_i (x'_i - mu_i)^2 - log std - log(2 pi) / 2        w = 1 / (2 std^2)
    rho      = exp(log_prob - log_prob_old)
    policy   = max(-A rho, -A clip(rho, 1 - low, 1 + high))               loss = policy + beta KL

KL forms: latent_mean is w mean_i (v_scale (v_i - v_ref_i))^2, velocity is mean_i (v_i - v_ref_i)^2,
log_prob_diff is log_prob - log_prob_ref, whose reference term carries no gradient: there v_ref only
serves the reported value. GRPO-Guard, with the rollout's velocity v_old:

    rho = exp(std (log_prob - log_prob_old + w mean_i (v_scale (v_i - v_old_i))^2))
    policy is divided by -dt

    dv_i = g (error_scale (x'_i - mu_i) + ref_scale (v_i - v_ref_i) + old_scale (v_i - v_old_i))

The three scales are per-sample numbers that the forward leaves behind, so the backward needs
nothing else. `normalised=False` takes w = 1 and no constants in log_prob (flow_grpo's `cps`); the
KL keeps its Gaussian w.

Legend: B samples, E elements of a sample, P blocks per sample. v, x, x', v_ref and v_old may be
fp32, bf16 or fp16; arithmetic and sums are fp32. Per-block sums go to partials [3, B, P] and are
added in a fixed order: no atomics, the same input gives the same bits.
Sources: flow_grpo flow_grpo/diffusers_patch/sd3_sde_with_logprob.py (log_prob, GRPO-Guard); DESIGN
of the KL forms in arr_fast.ops.rpo_loss.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arr_fast_kernels.configs import ElementwiseConfig, arch_of, elementwise_config
from arr_fast_kernels.launching import on_its_device
from arr_fast_kernels.samples import sample_stride

KL_FORMS = ("none", "latent_mean", "velocity", "log_prob_diff")
KL_NONE, KL_LATENT_MEAN, KL_VELOCITY, KL_LOG_PROB_DIFF = (tl.constexpr(k) for k in range(4))
STATS = ("log_prob", "ratio", "clipped", "kl", "error_scale", "ref_scale", "old_scale")
HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _load_block(pointer, sample, stride_b, element_E, is_element_E):
    """One block of one sample in fp32; elements past the end are 0."""
    return tl.load(
        pointer + sample.to(tl.int64) * stride_b + element_E, mask=is_element_E, other=0.0
    ).to(tl.float32)


@triton.jit
def _rpo_sums_kernel(
    partial_ptr,
    v_ptr,
    x_ptr,
    x_next_ptr,
    v_ref_ptr,
    v_old_ptr,
    x_scale_ptr,
    v_scale_ptr,
    stride_vb,
    stride_xb,
    stride_xnb,
    stride_refb,
    stride_oldb,
    elements,
    KL: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_OLD: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """Sums of squares of one block of one sample: axis 0 blocks, axis 1 samples."""
    block = tl.program_id(0)
    sample = tl.program_id(1)
    element_E = block * BLOCK_E + tl.arange(0, BLOCK_E)
    is_element_E = element_E < elements
    x_scale = tl.load(x_scale_ptr + sample)
    v_scale = tl.load(v_scale_ptr + sample)
    v_E = _load_block(v_ptr, sample, stride_vb, element_E, is_element_E)
    x_E = _load_block(x_ptr, sample, stride_xb, element_E, is_element_E)
    x_next_E = _load_block(x_next_ptr, sample, stride_xnb, element_E, is_element_E)
    # Elements past the end are 0 in every input, so they add 0 to every sum.
    error_E = x_next_E - (x_scale * x_E + v_scale * v_E)
    blocks = tl.num_programs(0)
    plane = tl.num_programs(1).to(tl.int64) * blocks
    partial_ptr += sample.to(tl.int64) * blocks + block
    tl.store(partial_ptr, tl.sum(error_E * error_E))
    if HAS_REF:
        gap_E = v_E - _load_block(v_ref_ptr, sample, stride_refb, element_E, is_element_E)
        if KL == KL_LOG_PROB_DIFF:
            gap_E = error_E + v_scale * gap_E  # x' - mu_ref
        tl.store(partial_ptr + plane, tl.sum(gap_E * gap_E))
    if HAS_OLD:
        drift_E = v_E - _load_block(v_old_ptr, sample, stride_oldb, element_E, is_element_E)
        tl.store(partial_ptr + 2 * plane, tl.sum(drift_E * drift_E))


@triton.jit
def _sum_partials(partial_ptr, blocks, BLOCK_P: tl.constexpr):
    """Adds one sample's block sums in a fixed order."""
    offsets_p = tl.arange(0, BLOCK_P)
    sum_P = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, blocks, BLOCK_P):
        offset_P = start + offsets_p
        sum_P += tl.load(partial_ptr + offset_P, mask=offset_P < blocks, other=0.0)
    return tl.sum(sum_P)


@triton.jit
def _rpo_loss_kernel(
    loss_ptr,
    stats_ptr,
    partial_ptr,
    v_scale_ptr,
    std_ptr,
    dt_ptr,
    log_prob_old_ptr,
    advantage_ptr,
    clip_low,
    clip_high,
    beta,
    elements,
    blocks,
    KL: tl.constexpr,
    HAS_REF: tl.constexpr,
    HAS_OLD: tl.constexpr,
    NORMALISED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Loss, diagnostics and gradient scales of one sample."""
    sample = tl.program_id(0)
    batch = tl.num_programs(0)
    # Inductor passes Python floats as fp64.
    clip_low = tl.cast(clip_low, tl.float32)
    clip_high = tl.cast(clip_high, tl.float32)
    beta = tl.cast(beta, tl.float32)
    v_scale = tl.load(v_scale_ptr + sample)
    std = tl.load(std_ptr + sample)
    advantage = tl.load(advantage_ptr + sample)
    partial_ptr += sample.to(tl.int64) * blocks
    plane = batch.to(tl.int64) * blocks
    mean_error = _sum_partials(partial_ptr, blocks, BLOCK_P) / elements

    gaussian_weight = 1.0 / (2.0 * std * std)
    if NORMALISED:
        weight = gaussian_weight
        log_prob = -mean_error * weight - tl.log(std) - HALF_LOG_TWO_PI
    else:
        weight = 1.0
        log_prob = -mean_error
    log_ratio = log_prob - tl.load(log_prob_old_ptr + sample)
    policy_scale = 1.0
    ratio_slope = 1.0
    if HAS_OLD:
        mean_drift = _sum_partials(partial_ptr + 2 * plane, blocks, BLOCK_P) / elements
        log_ratio = std * (log_ratio + weight * v_scale * v_scale * mean_drift)
        policy_scale = -1.0 / tl.load(dt_ptr + sample)
        ratio_slope = std
    ratio = tl.exp(log_ratio)
    clipped_ratio = tl.minimum(tl.maximum(ratio, 1.0 - clip_low), 1.0 + clip_high)
    policy = -advantage * ratio
    clipped_policy = -advantage * clipped_ratio
    # d loss / d log_prob: that of -A rho is -A rho itself, that of the clipped term is 0.
    slope = tl.where(policy >= clipped_policy, policy, 0.0) * policy_scale * ratio_slope
    loss = tl.where(policy >= clipped_policy, policy, clipped_policy) * policy_scale

    log_prob_slope = slope
    ref_scale = 0.0
    kl = 0.0
    if KL == KL_LOG_PROB_DIFF:
        log_prob_slope += beta
        if HAS_REF:
            mean_ref = _sum_partials(partial_ptr + plane, blocks, BLOCK_P) / elements
            kl = weight * (mean_ref - mean_error)
            loss += beta * kl
        else:
            kl = float("nan")  # its gradient needs no reference, its value does
    elif KL == KL_LATENT_MEAN:
        mean_gap = _sum_partials(partial_ptr + plane, blocks, BLOCK_P) / elements
        kl_weight = gaussian_weight * v_scale * v_scale
        kl = kl_weight * mean_gap
        loss += beta * kl
        ref_scale = beta * 2.0 * kl_weight / elements
    elif KL == KL_VELOCITY:
        kl = _sum_partials(partial_ptr + plane, blocks, BLOCK_P) / elements
        loss += beta * kl
        ref_scale = beta * 2.0 / elements
    error_scale = log_prob_slope * 2.0 * weight * v_scale / elements
    old_scale = 0.0
    if HAS_OLD:
        old_scale = slope * 2.0 * weight * v_scale * v_scale / elements
    is_clipped = (ratio < 1.0 - clip_low) | (ratio > 1.0 + clip_high)

    tl.store(loss_ptr + sample, loss)
    tl.store(stats_ptr + sample, log_prob)
    tl.store(stats_ptr + batch + sample, ratio)
    tl.store(stats_ptr + 2 * batch + sample, is_clipped.to(tl.float32))
    tl.store(stats_ptr + 3 * batch + sample, kl)
    tl.store(stats_ptr + 4 * batch + sample, error_scale)
    tl.store(stats_ptr + 5 * batch + sample, ref_scale)
    tl.store(stats_ptr + 6 * batch + sample, old_scale)


@triton.jit
def _rpo_backward_kernel(
    grad_v_ptr,
    grad_loss_ptr,
    stats_ptr,
    v_ptr,
    x_ptr,
    x_next_ptr,
    v_ref_ptr,
    v_old_ptr,
    x_scale_ptr,
    v_scale_ptr,
    stride_vb,
    stride_xb,
    stride_xnb,
    stride_refb,
    stride_oldb,
    elements,
    HAS_REF: tl.constexpr,
    HAS_OLD: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """dv of one block of one sample: axis 0 blocks, axis 1 samples."""
    block = tl.program_id(0)
    sample = tl.program_id(1)
    batch = tl.num_programs(1)
    element_E = block * BLOCK_E + tl.arange(0, BLOCK_E)
    is_element_E = element_E < elements
    grad_loss = tl.load(grad_loss_ptr + sample)
    error_scale = grad_loss * tl.load(stats_ptr + 4 * batch + sample)
    x_scale = tl.load(x_scale_ptr + sample)
    v_scale = tl.load(v_scale_ptr + sample)
    v_E = _load_block(v_ptr, sample, stride_vb, element_E, is_element_E)
    x_E = _load_block(x_ptr, sample, stride_xb, element_E, is_element_E)
    x_next_E = _load_block(x_next_ptr, sample, stride_xnb, element_E, is_element_E)
    grad_E = error_scale * (x_next_E - (x_scale * x_E + v_scale * v_E))
    if HAS_REF:
        ref_scale = grad_loss * tl.load(stats_ptr + 5 * batch + sample)
        grad_E += ref_scale * (
            v_E - _load_block(v_ref_ptr, sample, stride_refb, element_E, is_element_E)
        )
    if HAS_OLD:
        old_scale = grad_loss * tl.load(stats_ptr + 6 * batch + sample)
        grad_E += old_scale * (
            v_E - _load_block(v_old_ptr, sample, stride_oldb, element_E, is_element_E)
        )
    tl.store(
        grad_v_ptr + sample.to(tl.int64) * elements + element_E,
        grad_E.to(grad_v_ptr.dtype.element_ty),
        mask=is_element_E,
    )


@on_its_device
def rpo_loss(
    *,
    v: torch.Tensor,
    x: torch.Tensor,
    x_next: torch.Tensor,
    v_ref: torch.Tensor | None,
    v_old: torch.Tensor | None,
    x_scale: torch.Tensor,
    v_scale: torch.Tensor,
    std: torch.Tensor,
    dt: torch.Tensor,
    log_prob_old: torch.Tensor,
    advantage: torch.Tensor,
    clip_low: float,
    clip_high: float,
    beta: float,
    kl: str,
    normalised: bool,
    config: ElementwiseConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches the forward; arguments are those of `arr_fast.ops.rpo_loss`, validated there.

    Args:
        v: [B, ...] predicted velocity.
        x: [B, ...] latents.
        x_next: [B, ...] latents after the step, as stored by the rollout.
        v_ref: [B, ...] velocity of the reference, or None.
        v_old: [B, ...] velocity at the rollout, given for GRPO-Guard only, or None.
        x_scale: fp32 [B].
        v_scale: fp32 [B].
        std: fp32 [B].
        dt: fp32 [B], negative.
        log_prob_old: fp32 [B].
        advantage: fp32 [B].
        clip_low: width of the clip below 1.
        clip_high: width of the clip above 1.
        beta: weight of the KL.
        kl: one of KL_FORMS.
        normalised: False drops variance and constants from log_prob.
        config: block size; None takes the shipped one for this device.

    Returns:
        (loss fp32 [B], stats fp32 [7, B] in the order of STATS).
    """
    config = config or elementwise_config(arch_of(v.device))
    batch, elements = v.shape[0], v[0].numel() if v.shape[0] else 0
    blocks = triton.cdiv(elements, config.block)
    loss = torch.empty(batch, dtype=torch.float32, device=v.device)
    stats = torch.empty((len(STATS), batch), dtype=torch.float32, device=v.device)
    if batch == 0:
        return loss, stats
    # Scalars are read by sample, without a stride.
    x_scale, v_scale, std, dt, log_prob_old, advantage = (
        scalar.contiguous() for scalar in (x_scale, v_scale, std, dt, log_prob_old, advantage)
    )
    partial = torch.empty((3, batch, blocks), dtype=torch.float32, device=v.device)
    _rpo_sums_kernel[(blocks, batch)](
        partial_ptr=partial,
        **_sample_arguments(v, x, x_next, v_ref, v_old, x_scale, v_scale),
        KL=KL_FORMS.index(kl),
        HAS_REF=v_ref is not None,
        HAS_OLD=v_old is not None,
        BLOCK_E=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    _rpo_loss_kernel[(batch,)](
        loss_ptr=loss,
        stats_ptr=stats,
        partial_ptr=partial,
        v_scale_ptr=v_scale,
        std_ptr=std,
        dt_ptr=dt,
        log_prob_old_ptr=log_prob_old,
        advantage_ptr=advantage,
        clip_low=clip_low,
        clip_high=clip_high,
        beta=beta,
        elements=elements,
        blocks=blocks,
        KL=KL_FORMS.index(kl),
        HAS_REF=v_ref is not None,
        HAS_OLD=v_old is not None,
        NORMALISED=normalised,
        BLOCK_P=128,
        num_warps=1,
        enable_fp_fusion=True,
    )
    return loss, stats


@on_its_device
def rpo_loss_backward(
    *,
    grad_loss: torch.Tensor,
    stats: torch.Tensor,
    v: torch.Tensor,
    x: torch.Tensor,
    x_next: torch.Tensor,
    v_ref: torch.Tensor | None,
    v_old: torch.Tensor | None,
    x_scale: torch.Tensor,
    v_scale: torch.Tensor,
    config: ElementwiseConfig | None = None,
) -> torch.Tensor:
    """Launches the backward.

    Args:
        grad_loss: fp32 [B], gradient of the per-sample loss.
        stats: fp32 [7, B], the forward's second result.
        v: and the tensors below as in the forward.
        x: [B, ...].
        x_next: [B, ...].
        v_ref: [B, ...] or None; only where the KL form gives it a gradient.
        v_old: [B, ...] or None.
        x_scale: fp32 [B].
        v_scale: fp32 [B].
        config: block size; None takes the shipped one for this device.

    Returns:
        dv, contiguous, in v's shape and dtype.
    """
    config = config or elementwise_config(arch_of(v.device))
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    if grad_v.numel() == 0:
        return grad_v
    grad_loss, stats, x_scale, v_scale = (
        scalar.contiguous() for scalar in (grad_loss, stats, x_scale, v_scale)
    )
    _rpo_backward_kernel[(triton.cdiv(v[0].numel(), config.block), v.shape[0])](
        grad_v_ptr=grad_v,
        grad_loss_ptr=grad_loss,
        stats_ptr=stats,
        **_sample_arguments(v, x, x_next, v_ref, v_old, x_scale, v_scale),
        HAS_REF=v_ref is not None,
        HAS_OLD=v_old is not None,
        BLOCK_E=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    return grad_v


def _sample_arguments(
    v: torch.Tensor,
    x: torch.Tensor,
    x_next: torch.Tensor,
    v_ref: torch.Tensor | None,
    v_old: torch.Tensor | None,
    x_scale: torch.Tensor,
    v_scale: torch.Tensor,
) -> dict[str, torch.Tensor | int]:
    """Pointers and strides that forward and backward share; an absent tensor is never read."""
    arguments: dict[str, torch.Tensor | int] = {"x_scale_ptr": x_scale, "v_scale_ptr": v_scale}
    for name, stride, tensor in (
        ("v_ptr", "stride_vb", v),
        ("x_ptr", "stride_xb", x),
        ("x_next_ptr", "stride_xnb", x_next),
        ("v_ref_ptr", "stride_refb", v if v_ref is None else v_ref),
        ("v_old_ptr", "stride_oldb", v if v_old is None else v_old),
    ):
        arguments[name], arguments[stride] = sample_stride(tensor)
    arguments["elements"] = v[0].numel()
    return arguments
