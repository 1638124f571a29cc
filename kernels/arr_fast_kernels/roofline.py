"""Limits of the cards: how many programs a multiprocessor holds, and the least time of a kernel."""

from __future__ import annotations

from dataclasses import dataclass

from arr_fast_kernels.specs import Case


@dataclass(frozen=True, slots=True)
class Gpu:
    """A card's limits, from its data sheet: dense bf16 and fp32 peak, bandwidth, and what a
    multiprocessor holds.

    Attributes:
        name: Marketing name.
        matrix_tflops: Dense 16-bit matrix peak, TFLOP/s.
        fp32_tflops: Vector fp32 peak, TFLOP/s.
        bandwidth: HBM bandwidth, GB/s.
        shared_per_block: Most shared memory of one program, bytes.
        shared_per_sm: Shared memory of a multiprocessor, bytes.
        warps_per_sm: Resident warps (waves).
        registers_per_sm: 32-bit registers (NVIDIA); registers of one lane of a SIMD (AMD).
    """

    name: str
    matrix_tflops: float
    fp32_tflops: float
    bandwidth: float
    shared_per_block: int
    shared_per_sm: int
    warps_per_sm: int
    registers_per_sm: int


GPUS = {
    "sm_80": Gpu("A100", 312, 19.5, 2039, 163 * 1024, 164 * 1024, 64, 65536),
    "sm_90": Gpu("H100", 989, 67, 3350, 227 * 1024, 228 * 1024, 64, 65536),
    "sm_100": Gpu("B200", 2250, 80, 8000, 227 * 1024, 228 * 1024, 64, 65536),
    "gfx942": Gpu("MI300X", 1307, 163, 5300, 64 * 1024, 64 * 1024, 32, 512),
}


@dataclass(frozen=True, slots=True)
class Resources:
    """What the compiler made of one case.

    Attributes:
        registers: per thread (NVIDIA) or vector registers per lane, agprs included (AMD).
        spill_bytes: stack frame (NVIDIA) or private segment (AMD), bytes per thread.
        vgpr_spills: spilled vector registers (AMD; 0 elsewhere).
        shared: shared memory of a program, bytes.
        matrix: matrix instructions of the architecture's own kind in PTX or AMDGCN.
        async_copies: asynchronous copies to shared memory in PTX or AMDGCN.
        sass_matrix: matrix instructions in SASS (None on AMD).
        sass_async_copies: asynchronous copies in SASS (None on AMD).
        program_bytes: bytes of every load and store in Triton's IR, each once and masked lanes
            included: what a program requests, if it has no loop.
    """

    registers: int
    spill_bytes: int
    vgpr_spills: int
    shared: int
    matrix: int
    async_copies: int
    sass_matrix: int | None
    sass_async_copies: int | None
    program_bytes: int


def blocks_per_sm(case: Case, resources: Resources) -> int:
    """Programs that one multiprocessor holds, by registers, shared memory and warps."""
    gpu = GPUS[case.arch]
    if case.arch.startswith("gfx"):
        waves_per_simd = min(gpu.registers_per_sm // _round_up(resources.registers, 8), 8)
        by_registers = 4 * waves_per_simd // case.num_warps
        reserved = 0
    else:
        per_warp = _round_up(resources.registers, 8) * 32
        by_registers = gpu.registers_per_sm // per_warp // case.num_warps
        reserved = 1024  # the driver takes 1 KiB of each program's shared memory
    by_shared = gpu.shared_per_sm // max(resources.shared + reserved, 1)
    return min(by_registers, by_shared, gpu.warps_per_sm // case.num_warps, 32)


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


def roofline(case: Case) -> tuple[float, str]:
    """Least time on the card in microseconds, and what bounds it: "memory" or "compute"."""
    gpu = GPUS[case.arch]
    memory = case.hbm_bytes / (gpu.bandwidth * 1e9)
    peak = gpu.matrix_tflops if case.matrix and case.dtype != "fp32" else gpu.fp32_tflops
    compute = case.flops / (peak * 1e12)
    return max(memory, compute) * 1e6, "memory" if memory >= compute else "compute"
