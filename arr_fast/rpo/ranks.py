"""What the processes of a run tell each other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from arr_fast.errors import MissingDependencyError, TrainingError
from arr_fast.rpo.config import RunConfig
from arr_fast.rpo.sharding import is_split


class Ranks:
    """The processes of a run.

    Attributes:
        own: This process's number.
        count: How many there are.

    Raises:
        TrainingError: A launch whose own plugin would split the network.
    """

    def __init__(self, accelerator: Accelerator) -> None:
        self._accelerator = accelerator
        self.own = int(accelerator.process_index)
        self.count = int(accelerator.num_processes)
        kind = str(accelerator.distributed_type.value)
        if kind in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
            raise TrainingError(
                f"launched with {kind}, but the trainer splits networks itself: launch plain "
                "processes (--multi_gpu) and set shard: true in the configuration (FSDP2)"
            )

    def gathered(self, value: Any) -> list[Any]:
        """The value of every rank, in order."""
        if self.count == 1:
            return [value]
        from accelerate.utils import gather_object

        found: list[Any] = gather_object([value])
        return found

    def added(self, sums: dict[str, float]) -> dict[str, float]:
        """Sums over ranks; a key that a rank lacks counts as 0."""
        total: Counter[str] = Counter()
        for each in self.gathered(sums):
            for key, value in each.items():
                total[key] += value
        return dict(total)

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Averages gradients in one flat float32 reduction; a missing one counts as zero. Those of
        split parameters are averages already."""
        trained = [parameter for parameter in parameters if not is_split(parameter)]
        if self.count == 1 or not trained:
            return
        grads = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        flat = torch.cat([grad.float().flatten() for grad in grads])
        flat = self._accelerator.reduce(flat, reduction="mean")
        parts = flat.split([grad.numel() for grad in grads])
        for parameter, grad, part in zip(trained, grads, parts, strict=True):
            parameter.grad = part.view_as(grad).to(grad.dtype)

    @torch.no_grad()
    def broadcast(self, parameters: Iterable[nn.Parameter]) -> None:
        """Gives every rank rank 0's values; shares of split parameters come from one file."""
        if self.count == 1:
            return
        from accelerate.utils import broadcast

        for parameter in parameters:
            if is_split(parameter):
                continue
            parameter.copy_(broadcast(parameter.detach().clone()))


def make_accelerator(config: RunConfig, device: torch.device) -> Accelerator:
    """An Accelerator for the policy's device, or the GPU that its share will go to, with the
    configured trackers.

    Raises:
        MissingDependencyError: A tracker's package is missing.
    """
    from accelerate.tracking import get_available_trackers

    available = {str(getattr(name, "value", name)) for name in get_available_trackers()}
    for name in config.trackers:
        if name not in available:
            raise MissingDependencyError(name, "track")
    return Accelerator(
        cpu=device.type == "cpu" and not (config.shard and torch.cuda.is_available()),
        log_with=list(config.trackers) or None,
        project_dir=str(config.output) if config.trackers else None,
    )
