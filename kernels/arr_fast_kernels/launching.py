"""The device that a launcher runs under."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """Runs a launcher under the device of its first tensor; on a CPU that changes nothing.

    Triton launches on the thread's current device, whatever device its pointers are of.
    """

    @wraps(launcher)
    def launch(*args: P.args, **kwargs: P.kwargs) -> R:
        first = next(each for each in kwargs.values() if isinstance(each, torch.Tensor))
        with torch.cuda.device_of(first):
            return launcher(*args, **kwargs)

    return launch
