"""The optimisers of training: Muon for hidden matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 5) -> Tensor:
    """The nearest orthogonal matrix, roughly: Newton-Schulz iterations of Muon (Jordan, 2024).

    Computed in float32, since bfloat16 products are emulated on most CPUs.
    """
    a, b, c = NEWTON_SCHULZ
    flip = matrix.shape[0] > matrix.shape[1]
    x = matrix.T if flip else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if flip else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for 2-d weights (Jordan, 2024)."""

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used."""
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                average = state["momentum"]
                average.lerp_(weight.grad, 1 - group["momentum"])
                update = orthogonalise(weight.grad.lerp(average, group["momentum"]))
                scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
                weight.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * scale)


class Optimiser:
    """Muon on the 2-d weights inside layers, AdamW on embeddings, norms, biases and heads.

    Args:
        named: Parameters with their names; those that need no gradient are left out.
        muon_lr: Peak learning rate of Muon.
        adam_lr: Peak learning rate of AdamW.
    """

    def __init__(
        self, named: Iterable[tuple[str, nn.Parameter]], *, muon_lr: float, adam_lr: float
    ) -> None:
        matrices: list[nn.Parameter] = []
        rest: list[nn.Parameter] = []
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            hidden = parameter.ndim == 2 and ("blocks" in name or "layers" in name)
            (matrices if hidden else rest).append(parameter)
        self.parameters = [*matrices, *rest]
        self._peaks = (muon_lr, adam_lr)
        self._parts: list[torch.optim.Optimizer] = [
            Muon(matrices, lr=muon_lr),
            torch.optim.AdamW(rest, lr=adam_lr, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, scale: float) -> float:
        """One update at a fraction of the peak learning rates.

        Returns:
            The norm of the gradient before it was clipped to 1.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part, peak in zip(self._parts, self._peaks, strict=True):
            for group in part.param_groups:
                group["lr"] = peak * scale
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> list[dict[str, Any]]:
        """What `restore` needs."""
        return [part.state_dict() for part in self._parts]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Takes up a saved state."""
        for part, saved in zip(self._parts, state, strict=True):
            part.load_state_dict(saved)
