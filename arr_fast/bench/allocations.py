"""Peak memory of one call, from the allocator's own events: compiled code counts as eager does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def peak_allocated(run: Callable[[], Any]) -> int:
    """Most bytes that one call holds above what was held before it; a call to warm up goes first.

    Args:
        run: What to measure; on a GPU its device is the current one.
    """
    run()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    kineto: Any = trace.profiler.kineto_results
    held = peak = 0
    for event in sorted(kineto.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak
