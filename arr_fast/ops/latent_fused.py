"""Formulas over latents that torch.compile fuses into one loop each, on a CPU with a C++ compiler.

A graph is built at the first call per combination of dtypes and terms, and Inductor keeps its
binaries on disk. It serves all shapes, but for a batch of one and for samples up to 4096 numbers,
which PyTorch tells apart. `run_fused` answers None where a formula has to be done otherwise.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
from collections.abc import Callable
from functools import cache, lru_cache
from typing import Any

import torch
from torch import Tensor

logger = logging.getLogger("arr_fast")

# 8 samples of 512 px FLUX latents. Smaller passes run in the caches, where a graph would have to
# run tens of thousands of times to earn its compilation.
FUSED_ELEMENTS = 8 * 1024 * 64
# From latents, scalars as one table [n, B] or None, and constants [n] where there are some.
Formula = Callable[..., Any]


def error_square_sums(latents: list[Tensor], scalars: Tensor | None) -> Tensor:
    """[B] sums of (x' - x_scale x - v_scale v)^2, from (v, x, x') and (x_scale, v_scale)."""
    assert scalars is not None
    return _error(latents, scalars).square().sum(1)


def gap_square_sums(v: Tensor, other: Tensor) -> Tensor:
    """[B] sums of (v - other)^2, for formulas that are made of it."""
    return (v.float() - other.float()).square().sum(1)


def velocity_gradient(latents: list[Tensor], scalars: Tensor | None) -> Tensor:
    """[B, E] dv, from (v, x, x', others) and (x_scale, v_scale, error_scale, a scale each)."""
    assert scalars is not None
    v = latents[0].float()
    total = scalars[2][:, None] * _error(latents, scalars)
    for i, other in enumerate(latents[3:], start=3):
        total = total + scalars[i][:, None] * (v - other.float())
    return total.to(latents[0].dtype)


def _error(latents: list[Tensor], scalars: Tensor) -> Tensor:
    v, x, x_next = (tensor.float() for tensor in latents[:3])
    return x_next - scalars[0][:, None] * x - scalars[1][:, None] * v


def run_fused(
    formula: Formula,
    latents: list[Tensor],
    scalars: list[Tensor],
    constants: tuple[float, ...] = (),
) -> Any:
    """Runs a formula in one loop over the latents.

    Args:
        formula: One of this file's, or one that is made of them.
        latents: [B, ...] of one shape, read as [B, E].
        scalars: Float32 [B].
        constants: Numbers whose values build no graph of their own; float64.

    Returns:
        The result, or None for latents that are small or not on a CPU, and where `why_not_fused`
        has a reason; a reason is logged once.
    """
    if latents[0].device.type != "cpu" or latents[0].numel() < FUSED_ELEMENTS:
        return None
    reason = why_not_fused()
    if reason is None:
        from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException

        try:
            # The op runs below autograd, but its inputs still say requires_grad: without these two
            # the compiler would build a joint graph with a backward.
            with torch.no_grad():
                flat = [tensor.detach().flatten(1) for tensor in latents]
                # One table, never a view: guards look at the base of a view as well.
                table = _static_rows(torch.stack(scalars)) if scalars else None
                more = (_as_tensor(constants),) if constants else ()
                return _compiled(formula)(flat, table, *more)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:
            said = str(error).split("\n\n")[0]
            reason = f"torch.compile failed: {' '.join(said.split()) or repr(error)}"
            _failures.append(reason)
    _log_once(reason)
    return None


def why_not_fused() -> str | None:
    """Why a CPU runs large latents in blocks; None where it fuses them.

    TORCH_COMPILE_DISABLE=1 turns fusing off, as it does every torch.compile.
    """
    if "1" in (os.environ.get("TORCH_COMPILE_DISABLE"), os.environ.get("TORCHDYNAMO_DISABLE")):
        return "torch.compile is disabled"
    names = {"darwin": "clang++", "win32": "cl"}
    compiler = os.environ.get("CXX") or names.get(sys.platform, "g++")
    if not _is_found(compiler, os.environ.get("PATH")):
        return f"there is no C++ compiler ({compiler})"
    return _failures[0] if _failures else None


@cache
def _is_found(program: str, _path: str | None) -> bool:
    # Looking through PATH took a sixth of a pass over 4 MB latents.
    return shutil.which(program) is not None


# The first failure of this process: a compiler that failed is not asked again.
_failures: list[str] = []


@lru_cache(maxsize=64)
def _as_tensor(constants: tuple[float, ...]) -> Tensor:
    return _static_rows(torch.tensor(constants, dtype=torch.float64))


def _static_rows(table: Tensor) -> Tensor:
    # Else a batch as large as the number of rows is taken for the same size, in a graph of its own.
    torch._dynamo.mark_static(table, 0)
    return table


@cache
def _compiled(formula: Formula) -> Formula:
    compiled: Formula = torch.compile(formula, fullgraph=True, dynamic=True)
    return compiled


@cache
def _log_once(reason: str) -> None:
    logger.warning("large latents run in blocks, at about half the speed: %s", reason)
