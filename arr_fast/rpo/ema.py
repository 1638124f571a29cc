"""An exponential moving average of the trained parameters, and of nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from arr_fast.rpo.sharding import split_like


class ParameterEma:
    """Averages parameters in float32.

    Args:
        parameters: By name.
        decay: Its limit; average number t uses min(decay, (1 + t) / (10 + t)), so that the start is
            forgotten soon (flow_grpo flow_grpo/ema.py).
        every: Updates between two averagings.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, every: int = 1
    ) -> None:
        self._parameters = dict(parameters)
        self._decay, self._every = decay, every
        self._means = {name: p.detach().float().clone() for name, p in self._parameters.items()}
        self._updates = 0

    @torch.no_grad()
    def update(self) -> None:
        """Call after every optimizer step."""
        self._updates += 1
        if self._updates % self._every:
            return
        count = self._updates // self._every
        decay = min(self._decay, (1 + count) / (10 + count))
        for name, parameter in self._parameters.items():
            self._means[name].lerp_(parameter.detach().float(), 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The parameters are the means within the context, and afterwards what they were."""
        kept = {name: p.detach().clone() for name, p in self._parameters.items()}
        self._copy(self._means)
        try:
            yield
        finally:
            self._copy(kept)

    def state(self) -> dict[str, object]:
        """What `restore` needs."""
        return {"updates": self._updates, "means": dict(self._means)}

    def restore(self, state: Mapping[str, object]) -> None:
        """Takes up a saved state."""
        means, updates = state["means"], state["updates"]
        assert isinstance(means, dict) and isinstance(updates, int)
        self._updates = updates
        for name, mean in self._means.items():
            mean.copy_(split_like(means[name], mean))

    @torch.no_grad()
    def _copy(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])
