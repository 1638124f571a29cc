"""Shipped launch configurations per architecture, each with its reason. Pure Python: needs neither
triton nor a GPU.

Nothing is tuned at run time and nothing depends on a sequence length, so one shape always runs one
binary. Registers and shared memory quoted here are what `arr-fast kernels report` reads from the
compiled kernels.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (64, 96, 128, 256)

# Splits exist for forests with too few tiles to fill a card. A table this small bounds the fp32
# scratch; a larger one may hold none.
MAX_SPLIT_TILES = 512
# Tokens of the vocabulary that one program of the verdict head covers: fixed, so that a row's sum
# does not depend on its batch.
VOCAB_PART = 512
# A [64, 128] fp32 tile of products on 4 warps is 64 registers a thread: the most label rows still
# fit.
LABEL_BLOCK_H = 128
LABEL_WARPS = 4


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Block sizes of `prefix_attention`: query slots (rows x group) and keys per block, warps,
    pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reason: str


@dataclass(frozen=True, slots=True)
class VocabConfig:
    """Block sizes of the verdict head's vocabulary kernel: rows, tokens, hidden columns, warps,
    pipeline stages."""

    block_n: int
    block_v: int
    block_h: int
    num_warps: int
    num_stages: int
    reason: str


@dataclass(frozen=True, slots=True)
class ElementwiseConfig:
    """Elements per program and warps of `sde_step` and `rpo_loss`."""

    block: int
    num_warps: int
    reason: str


_A = AttentionConfig
_ATTENTION: dict[str, dict[int, AttentionConfig]] = {
    # At most 99 KiB of shared memory, so that the 8.6, 8.9 and 12.x cards run the same table.
    "sm_80": {
        64: _A(128, 64, 8, 2, "190 registers; 4 warps spill at 128 slots"),
        128: _A(128, 32, 8, 2, "200 registers, 64 KiB; 64 keys spill 40 bytes at 8 warps"),
        256: _A(64, 32, 8, 2, "180 registers, 68 KiB; 128 slots or 4 warps spill"),
    },
    # wgmma takes 64 slots per warp group: two groups of 4 warps share each block of keys.
    "sm_90": {
        64: _A(128, 64, 8, 3, "136 registers; a third stage hides the gather of short runs"),
        128: _A(128, 64, 8, 3, "208 registers, 128 KiB; 128 keys spill 64 bytes"),
        256: _A(128, 32, 8, 2, "248 registers, 128 KiB; 64 keys spill"),
    },
    # The accumulator lives in tensor memory and passes through registers at every rescale: 8 warps,
    # or it spills.
    "sm_100": {
        64: _A(128, 64, 8, 3, "190 registers; 16 warps lose tcgen05"),
        128: _A(128, 64, 8, 2, "238 registers, 104 KiB; two programs fit in shared memory"),
        256: _A(64, 32, 8, 2, "251 registers, 112 KiB; 128 slots or 64 keys spill"),
    },
    # A wave holds 64 lanes, so 4 waves here are 8 warps elsewhere; agprs extend the 256 vgprs.
    "gfx942": {
        64: _A(128, 32, 4, 2, "157 vgprs: three waves per SIMD"),
        128: _A(128, 32, 4, 2, "209 vgprs; 8 waves spill at 64 keys"),
        256: _A(64, 32, 4, 2, "287 vgprs and agprs; 128 slots spill"),
    },
}
_INTERPRET = _A(32, 16, 1, 1, "small blocks: many tiles and block edges in small tests")
# fp32 serves tests and debugging: twice the bytes, so fewer keys and one stage. block_m stays,
# because tiles are cut for it.
_FP32_KEYS = {64: 32, 128: 16, 256: 16}

_V = VocabConfig
_VOCAB: dict[str, VocabConfig] = {
    "sm_80": _V(128, 128, 32, 8, 3, "64 accumulators a thread, 48 KiB: fits the 99 KiB cards"),
    "sm_90": _V(128, 128, 64, 8, 3, "wgmma on two warp groups, 96 KiB"),
    "sm_100": _V(128, 128, 64, 8, 3, "tcgen05 at 128 rows, 96 KiB"),
    "gfx942": _V(128, 128, 32, 8, 2, "64 accumulators a lane, under 64 KiB of LDS"),
}
_VOCAB_FEW_ROWS = _V(
    16, 128, 64, 4, 3, "under 64 rows: bound by reading the vocabulary, not by products"
)


def padded_head_dim(head_dim: int) -> int:
    """The power of two that a head dim occupies in registers.

    Raises:
        ValueError: not in 16 .. 256.
    """
    if not 16 <= head_dim <= 256:
        raise ValueError(f"q has head dim {head_dim}; supported are 16 to 256")
    return 1 << (head_dim - 1).bit_length()


def attention_config(arch: str, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    """Returns the shipped configuration of `prefix_attention`.

    Args:
        arch: one of ARCHS, or "interpret".
        head_dim: D.
        dtype: of q, k and v.
    """
    padded = max(padded_head_dim(head_dim), 64)
    if arch == "interpret":
        return _INTERPRET
    config = _ATTENTION[arch][padded]
    if dtype == torch.float32:
        return AttentionConfig(
            config.block_m, _FP32_KEYS[padded], 8, 1, "fp32: few keys, one stage"
        )
    return config


def rows_per_tile(group: int, head_dim: int, arch: str | torch.device) -> int:
    """Rows of a query tile: how many rows times the GQA group fill one block of query slots.

    Args:
        group: query heads per KV head.
        head_dim: D.
        arch: one of ARCHS or "interpret", or the device that runs the kernel.

    Raises:
        ValueError: group is not in 1 .. BLOCK_M, so that not even one row fits.
    """
    if isinstance(arch, torch.device):
        arch = arch_of(arch)
    block_m = attention_config(arch, head_dim, torch.bfloat16).block_m
    if not 1 <= group <= block_m:
        raise ValueError(f"group must be 1 to {block_m}, got {group}")
    return block_m // group


def vocab_config(arch: str, rows: int, dtype: torch.dtype) -> VocabConfig:
    """Returns the shipped configuration of the verdict head's vocabulary kernel."""
    if arch == "interpret":
        return _V(16, 128, 64, 1, 1, "small blocks: many edges in small tests")
    config = _VOCAB_FEW_ROWS if rows < 64 else _VOCAB[arch]
    if dtype == torch.float32:
        return _V(config.block_n, config.block_v, 32, config.num_warps, 2, "fp32: half the columns")
    return config


def elementwise_config(arch: str) -> ElementwiseConfig:
    """Returns the shipped configuration of `sde_step` and `rpo_loss`."""
    if arch == "interpret":
        return ElementwiseConfig(128, 1, "several blocks in small tests")
    if arch == "gfx942":
        return ElementwiseConfig(2048, 4, "8 elements a lane: one 16-byte load of bf16")
    return ElementwiseConfig(1024, 4, "8 elements a thread: one 16-byte load of bf16, two of fp32")


def dot_precision(arch: str, head_dim: int = 0) -> str:
    """Returns `input_precision` of fp32 products: exact to fp32 rounding everywhere.

    Three tf32 products keep fp32 accuracy on NVIDIA's tensor cores, but hold both halves of their
    operands: at head dim 256 those pass the shared memory, and plain fp32 runs. AMD has fp32 mfma.
    """
    return "tf32x3" if arch.startswith("sm_") and head_dim <= 128 else "ieee"


def arch_of(device: torch.device) -> str:
    """Returns the architecture whose configurations a device takes.

    Raises:
        ValueError: the device runs no Triton kernels.
    """
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1":
        return "interpret"
    if device.type != "cuda":
        raise ValueError(f'impl="triton" needs a GPU tensor or TRITON_INTERPRET=1, got {device}')
    if torch.version.hip is not None:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major in (8, 12):  # consumer Blackwell has mma.sync and Ampere's shared memory, not tcgen05
        return "sm_80"
    if major == 9:
        return "sm_90"
    if major == 10:
        return "sm_100"
    raise ValueError(
        f'impl="triton" supports compute capability 8, 9, 10 and 12, got {major}.{minor}'
    )
