"""One step of a flow SDE: mean, next latents and log_prob in one pass over the latents.

    mu = x_scale x + v_scale v        x' = round(mu + std eps)
    log_prob = mean_i log N(x'_i; mu_i, std^2)

x' is rounded to its storage dtype before log_prob, so that a trainer that reads x' back finds the
same value. `normalised=False` drops variance and constants: log_prob = mean_i -(x'_i - mu_i)^2
(flow_grpo's `cps`).

Legend: B samples, E elements of a sample, P blocks per sample. x, v and noise may be fp32, bf16 or
fp16; all arithmetic is fp32. The step's scalars are fp32 [B] tensors, so a compiled graph never
sees a new constant. Every program sums its block's squared errors into partial [B, P];
`_log_prob_kernel` adds them in a fixed order (no atomics: the same input gives the same bits).

In-kernel noise is Philox-4x32-10 with key = the sample's 64-bit seed and counter = (element, 0, 0,
0); its first two words feed Box-Muller. Source of the rounds: Salmon et al., "Parallel random
numbers: as easy as 1, 2, 3" (SC 2011), as in triton.language.random.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from arr_fast_kernels.configs import ElementwiseConfig, arch_of, elementwise_config
from arr_fast_kernels.launching import on_its_device
from arr_fast_kernels.samples import sample_stride

NOISE_NONE, NOISE_GIVEN, NOISE_DRAWN = (tl.constexpr(mode) for mode in range(3))
HALF_LOG_TWO_PI = tl.constexpr(0.9189385332046727)


@triton.jit
def _philox_normal(seed, element_E):
    """Standard normals for int32 counters; the words agree bit for bit with arr_fast.ops.philox."""
    word_0, word_1, _, _ = tl.randint4x(seed, element_E)
    uniform_0 = tl.maximum(tl.uint_to_uniform_float(word_0), 1.0e-7)
    uniform_1 = tl.uint_to_uniform_float(word_1)
    radius = tl.sqrt(-2.0 * tl.log(uniform_0))
    return radius * tl.cos(6.283185307179586 * uniform_1)


@triton.jit
def _sde_step_kernel(
    x_next_ptr,
    partial_ptr,
    x_ptr,
    v_ptr,
    noise_ptr,
    seed_ptr,
    x_scale_ptr,
    v_scale_ptr,
    std_ptr,
    stride_xb,
    stride_vb,
    stride_nb,
    elements,
    NOISE: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """One block of one sample: axis 0 blocks, axis 1 samples."""
    block = tl.program_id(0)
    sample = tl.program_id(1)
    sample64 = sample.to(tl.int64)
    element_E = block * BLOCK_E + tl.arange(0, BLOCK_E)
    is_element_E = element_E < elements
    x_scale = tl.load(x_scale_ptr + sample)
    v_scale = tl.load(v_scale_ptr + sample)
    x_E = tl.load(x_ptr + sample64 * stride_xb + element_E, mask=is_element_E, other=0.0).to(
        tl.float32
    )
    v_E = tl.load(v_ptr + sample64 * stride_vb + element_E, mask=is_element_E, other=0.0).to(
        tl.float32
    )
    mean_E = x_scale * x_E + v_scale * v_E
    x_next_E = mean_E
    if NOISE == NOISE_GIVEN:
        noise_E = tl.load(
            noise_ptr + sample64 * stride_nb + element_E, mask=is_element_E, other=0.0
        )
        x_next_E = mean_E + tl.load(std_ptr + sample) * noise_E.to(tl.float32)
    if NOISE == NOISE_DRAWN:
        noise_E = _philox_normal(tl.load(seed_ptr + sample), element_E)
        x_next_E = mean_E + tl.load(std_ptr + sample) * noise_E
    stored_E = x_next_E.to(x_next_ptr.dtype.element_ty)
    tl.store(x_next_ptr + sample64 * elements + element_E, stored_E, mask=is_element_E)
    if NOISE != NOISE_NONE:
        error_E = tl.where(is_element_E, stored_E.to(tl.float32) - mean_E, 0.0)
        tl.store(partial_ptr + sample64 * tl.num_programs(0) + block, tl.sum(error_E * error_E))


@triton.jit
def _log_prob_kernel(
    log_prob_ptr,
    partial_ptr,
    std_ptr,
    elements,
    blocks,
    NORMALISED: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """log_prob of one sample from its blocks' squared errors, added in a fixed order."""
    sample = tl.program_id(0)
    offsets_p = tl.arange(0, BLOCK_P)
    sum_P = tl.zeros([BLOCK_P], tl.float32)
    for start in range(0, blocks, BLOCK_P):
        is_block_P = start + offsets_p < blocks
        offset_P = sample.to(tl.int64) * blocks + start + offsets_p
        sum_P += tl.load(partial_ptr + offset_P, mask=is_block_P, other=0.0)
    mean_square = tl.sum(sum_P) / elements
    if NORMALISED:
        std = tl.load(std_ptr + sample)
        log_prob = -mean_square / (2.0 * std * std) - tl.log(std) - HALF_LOG_TWO_PI
        # A deterministic step has no density.
        log_prob = tl.where(std > 0.0, log_prob, float("nan"))
    else:
        log_prob = -mean_square
    tl.store(log_prob_ptr + sample, log_prob)


@on_its_device
def sde_step(
    *,
    x: torch.Tensor,
    v: torch.Tensor,
    x_scale: torch.Tensor,
    v_scale: torch.Tensor,
    std: torch.Tensor,
    noise: torch.Tensor | None,
    seed: torch.Tensor | None,
    normalised: bool,
    config: ElementwiseConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launches one step; arguments are those of `arr_fast.ops.sde_step`, validated there.

    Args:
        x: [B, ...] latents.
        v: [B, ...] predicted velocity.
        x_scale: fp32 [B].
        v_scale: fp32 [B].
        std: fp32 [B].
        noise: [B, ...] standard normals, or None.
        seed: int64 [B], read when noise is None; both None: a deterministic step.
        normalised: False drops the variance and the constants from log_prob.
        config: block size; None takes the shipped one for this device.

    Returns:
        (x' [B, ...] in x's dtype, log_prob fp32 [B], NaN for a deterministic step).
    """
    config = config or elementwise_config(arch_of(x.device))
    batch = x.shape[0]
    elements = x[0].numel() if batch else 0
    x_next = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    mode = NOISE_NONE if seed is None else NOISE_DRAWN
    if noise is not None:
        mode = NOISE_GIVEN
    log_prob = torch.empty(batch, dtype=torch.float32, device=x.device)
    if mode == NOISE_NONE:
        log_prob.fill_(float("nan"))
    if elements == 0:
        return x_next, log_prob.fill_(float("nan"))
    x, stride_xb = sample_stride(x)
    v, stride_vb = sample_stride(v)
    noise, stride_nb = sample_stride(x if noise is None else noise)
    # Scalars are read by sample, without a stride.
    x_scale, v_scale, std = (scalar.contiguous() for scalar in (x_scale, v_scale, std))
    seed = std if seed is None else seed.contiguous()
    blocks = triton.cdiv(elements, config.block)
    partial = torch.empty((batch, blocks), dtype=torch.float32, device=x.device)
    _sde_step_kernel[(blocks, batch)](
        x_next_ptr=x_next,
        partial_ptr=partial,
        x_ptr=x,
        v_ptr=v,
        noise_ptr=noise,
        seed_ptr=seed,
        x_scale_ptr=x_scale,
        v_scale_ptr=v_scale,
        std_ptr=std,
        stride_xb=stride_xb,
        stride_vb=stride_vb,
        stride_nb=stride_nb,
        elements=elements,
        NOISE=mode.value,
        BLOCK_E=config.block,
        num_warps=config.num_warps,
        enable_fp_fusion=True,
    )
    if mode != NOISE_NONE:
        _log_prob_kernel[(batch,)](
            log_prob_ptr=log_prob,
            partial_ptr=partial,
            std_ptr=std,
            elements=elements,
            blocks=blocks,
            NORMALISED=normalised,
            BLOCK_P=128,
            num_warps=1,
            enable_fp_fusion=True,
        )
    return x_next, log_prob
