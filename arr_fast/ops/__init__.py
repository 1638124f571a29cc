"""Custom operators. An op has one meaning; `impl` picks who computes it.

`impl` is "torch" | "triton" | "flash" | "xformers" | "reference". An explicit choice never falls
back. "auto" is resolved once by the caller with `resolve_impl`, never inside an op.
"""

from __future__ import annotations

import importlib.util
import logging
from functools import lru_cache

import torch

from arr_fast.errors import MissingDependencyError
from arr_fast.ops.prefix_attention import prefix_attention
from arr_fast.ops.verdict_head import verdict_head

logger = logging.getLogger("arr_fast")

IMPLS = ("torch", "triton", "flash", "xformers", "reference")

__all__ = ["IMPLS", "impl_status", "prefix_attention", "resolve_impl", "verdict_head"]


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
    for name, package, extra in (
        ("triton", "triton", ""),
        ("flash", "flash_attn", "cuda"),
        ("xformers", "xformers", "cuda"),
    ):
        if importlib.util.find_spec(package) is None:
            hint = f'; pip install "arr-fast[{extra}]"' if extra else ""
            status[name] = f"{package} is not installed{hint}"
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
        MissingDependencyError: An explicit impl that cannot run here.
    """
    if impl != "auto":
        if impl not in IMPLS:
            raise ValueError(f"impl must be auto or one of {', '.join(IMPLS)}, got {impl!r}")
        reason = impl_status(device)[impl]
        if reason != "available":
            raise MissingDependencyError(f"impl {impl!r} cannot run: {reason}")
        return impl
    status = impl_status(device)
    chosen = "triton" if status["triton"] == "available" else "torch"
    logger.info("impl auto -> %s on %s (triton: %s)", chosen, device, status["triton"])
    return chosen
