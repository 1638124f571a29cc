"""The optimisers of training: Muon for hidden matrices, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor, steps: int = 4) -> Tensor:
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
    result: Tensor = x.T if flip else x
    return result


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for 2-d weights (Jordan, 2024).

    The workers of a run share the orthogonalisations out among them.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], momentum: float = 0.95) -> None:
        super().__init__(groups, {"lr": 0.0, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update; `closure` is not used."""
        rank, workers = 0, 1
        if dist.is_initialized():
            rank, workers = dist.get_rank(), dist.get_world_size()
        weights = [(w, group) for group in self.param_groups for w in group["params"]]
        updates = []
        for number, (weight, group) in enumerate(weights):
            state = self.state[weight]
            if not state:
                state["momentum"] = torch.zeros_like(weight)
            state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
            if number % workers == rank:
                mixed = weight.grad.lerp(state["momentum"], group["momentum"])
                updates.append(orthogonalise(mixed).flatten())
            else:
                updates.append(torch.zeros(weight.numel()))
        flat = torch.cat(updates)
        if workers > 1:
            dist.all_reduce(flat)
        at = 0
        for weight, group in weights:
            update = flat[at : at + weight.numel()].view_as(weight)
            at += weight.numel()
            scale = max(1.0, weight.shape[0] / weight.shape[1]) ** 0.5
            weight.mul_(1 - 0.01 * group["lr"]).add_(update, alpha=-group["lr"] * scale)


class Optimiser:
    """Muon on the 2-d weights inside layers, AdamW on embeddings, norms, biases and heads.

    Args:
        named: Parameters with their names; those that need no gradient are left out.
        muon_lr: Peak learning rate of Muon.
        adam_lr: Peak learning rate of AdamW.
        factors: (part of a name, factor of its learning rates); the first match counts.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        *,
        muon_lr: float,
        adam_lr: float,
        factors: Sequence[tuple[str, float]] = (),
    ) -> None:
        groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            hidden = parameter.ndim == 2 and ("blocks" in name or "layers" in name)
            factor = next((f for part, f in factors if part in name), 1.0)
            groups.setdefault((hidden, factor), []).append(parameter)
        self.parameters = [p for group in groups.values() for p in group]
        matrices, rest = (
            [
                {"params": params, "peak": peak * factor}
                for (is_hidden, factor), params in groups.items()
                if is_hidden == hidden
            ]
            for hidden, peak in ((True, muon_lr), (False, adam_lr))
        )
        self._parts: list[torch.optim.Optimizer] = [
            Muon(matrices),
            torch.optim.AdamW(rest, betas=(0.9, 0.98), weight_decay=0.0),
        ]

    def step(self, scale: float) -> float:
        """One update at a fraction of the peak learning rates.

        Returns:
            The norm of the gradient before it was clipped to 1.
        """
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = group["peak"] * scale
            part.step()
            part.zero_grad(set_to_none=True)
        return float(norm)

    def state(self) -> list[dict[str, Any]]:
        """What `restore` needs."""
        return [part.state_dict() for part in self._parts]

    def restore(self, state: list[dict[str, Any]]) -> None:
        """Takes up a saved state; the peak learning rates stay those of this optimiser."""
        for part, saved in zip(self._parts, state, strict=True):
            peaks = [group["peak"] for group in part.param_groups]
            part.load_state_dict(saved)
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["peak"] = peak
