"""Data-parallel workers of one thread each.

Small matrices gain little from threads, and threads that share a core with other programs wait for
each other in every operation. So each worker computes its share of a batch alone, and gradients
are averaged once per step, in a fixed order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn


class Interrupted(Exception):
    """SIGTERM or SIGINT came; the state is on disk."""


def start_or_say(target: Callable[..., None], count: int, meeting: Path, *args: Any) -> None:
    """`start` for a command line: an interruption ends in a line that says how to go on."""
    try:
        start(target, count, meeting, *args)
    except Interrupted as stop:
        print(f"{stop}; go on with --resume")


def start(target: Callable[..., None], count: int, meeting: Path, *args: Any) -> None:
    """Runs `target(rank, *args)` as rank 0 here and in `count - 1` child processes.

    Args:
        target: What every worker runs.
        count: Number of workers.
        meeting: A file through which the workers find each other; replaced.
        *args: Handed on to `target`.
    """
    meeting.parent.mkdir(parents=True, exist_ok=True)
    meeting.unlink(missing_ok=True)
    context = mp.get_context("spawn")
    children = [
        context.Process(target=_join, args=(target, rank, count, str(meeting), args), daemon=True)
        for rank in range(1, count)
    ]
    for child in children:
        child.start()
    _join(target, 0, count, str(meeting), args)
    for child in children:
        child.join()


def _join(
    target: Callable[..., None], rank: int, count: int, meeting: str, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    if rank > 0:
        os.setsid()
    dist.init_process_group(
        "gloo",
        init_method=f"file://{meeting}",
        rank=rank,
        world_size=count,
        timeout=timedelta(hours=12),
    )
    try:
        target(rank, *args)
    except Interrupted:
        # Every worker stops after the same step; the first one says so.
        if rank == 0:
            raise
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Sequence[nn.Parameter], flags: Sequence[float]) -> list[float]:
    """Averages gradients over the workers, in place.

    Args:
        parameters: All trained parameters; a missing gradient counts as zero.
        flags: Numbers to be averaged along with them (losses, a wish to stop).

    Returns:
        The averaged flags.
    """
    grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    flat = torch.cat([*(g.flatten() for g in grads), torch.tensor(list(flags))])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    at = 0
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = flat[at : at + grad.numel()].view_as(grad)
        at += grad.numel()
    return [float(v) for v in flat[at:]]
