"""Custom operators. An op has one meaning; `impl` picks who computes it.

`impl` is "torch" | "triton" | "flash" | "xformers" | "reference". An explicit choice never falls
back. "auto" is resolved once by the caller with `resolve_impl`, never inside an op.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch

from arr_fast.errors import ArrFastError, MissingDependencyError
from arr_fast.ops.prefix_attention import prefix_attention
from arr_fast.ops.rpo_loss import RPOLoss, rpo_loss
from arr_fast.ops.sde_step import sde_step, step_coefficients
from arr_fast.ops.verdict_head import verdict_head

logger = logging.getLogger("arr_fast")

_PACKAGES = {
    "triton": ("triton", ""),
    "flash": ("flash_attn", "cuda"),
    "xformers": ("xformers", "cuda"),
}
IMPLS = ("torch", "triton", "flash", "xformers", "reference")

__all__ = [
    "IMPLS",
    "RPOLoss",
    "impl_status",
    "prefix_attention",
    "resolve_impl",
    "rpo_loss",
    "sde_step",
    "step_coefficients",
    "verdict_head",
]


def impl_status(device: torch.device | str) -> dict[str, str]:
    """Says for every impl whether it can run on a device.

    Args:
        device: Where the tensors live.

    Returns:
        impl -> "available", or the reason why not.
    """
    device = torch.device(device)
    on_gpu = device.type == "cuda"
    status = {"torch": "available", "reference": "available"}
    for name, (package, extra) in _PACKAGES.items():
        if importlib.util.find_spec(package) is None:
            status[name] = str(MissingDependencyError(package, extra))
        elif not on_gpu:
            status[name] = f"needs a GPU; the device is {device}"
        else:
            status[name] = "available"
    return status


@lru_cache(maxsize=16)
def resolve_impl(impl: str, device: str) -> str:
    """Resolves "auto" for a device, and checks an explicit choice.

    Args:
        impl: "auto" or one of `IMPLS`.
        device: Device string, for example "cpu" or "cuda:0".

    Raises:
        ValueError: An unknown impl.
        MissingDependencyError: An explicit impl whose package is missing.
        ArrFastError: An explicit impl that cannot run on the device.
    """
    if impl != "auto":
        if impl not in IMPLS:
            raise ValueError(f"impl must be auto or one of {', '.join(IMPLS)}, got {impl!r}")
        if impl in _PACKAGES and importlib.util.find_spec(_PACKAGES[impl][0]) is None:
            raise MissingDependencyError(*_PACKAGES[impl])
        reason = impl_status(device)[impl]
        if reason != "available":
            raise ArrFastError(f"impl {impl!r} cannot run: {reason}")
        return impl
    status = impl_status(device)
    chosen = "triton" if status["triton"] == "available" else "torch"
    logger.info("impl auto -> %s on %s (triton: %s)", chosen, device, status["triton"])
    return chosen
