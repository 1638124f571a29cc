"""How many rows a micro-batch may have: what a training step allocates, held against a budget.

The step runs eagerly with more and more rows under a counter of live tensor bytes. Its peak is a
convex function of the rows: gradients dominate it for few, activations for many. A compiled step
keeps fewer activations, so the answer is safe for it as well.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from arr_fast.errors import ArrFastError
from arr_fast.ops.sde_step import step_coefficients
from arr_fast.rpo.loss import Objective
from arr_fast.rpo.policies.base import Conditions, Policy, select_conditions
from arr_fast.rpo.step import reference_velocity, training_loss

logger = logging.getLogger("arr_fast")

# Kernels have scratch memory of their own, which no tensor shows.
_HEADROOM = 1.05


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operations allocate while it is active.

    Args:
        known: Tensors that were there before: their storages do not count.

    Attributes:
        live: Bytes alive now.
        peak: Its largest value.
    """

    def __init__(self, known: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live: int = 0
        self.peak: int = 0
        self._seen = {_address(tensor) for tensor in known}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf)
        return result

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        address = storage._cdata
        if address in self._seen:
            return
        size = storage.nbytes()
        self._seen.add(address)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._drop, address, size)

    def _drop(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.live -= size


def step_bytes(policy: Policy, objective: Objective, conditions: Conditions, rows: int) -> int:
    """Peak bytes that one eager micro-batch allocates above the weights, gradients included.

    Args:
        policy: The generator; its gradients are dropped.
        objective: Options of the loss.
        conditions: One item or more.
        rows: R.

    Raises:
        ValueError: The policy has gradients already.
    """
    parameters = policy.trainable_parameters().values()
    if any(parameter.grad is not None for parameter in parameters):
        raise ValueError("gradients are present: measure before training, or drop them")
    device = policy.device
    index = torch.zeros(rows, dtype=torch.int64, device=device)
    picked = select_conditions(conditions, index)
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(rows, *policy.latent_shape, generator=generator).to(device)
    step = step_coefficients("sde", torch.tensor([0.8]), torch.tensor([0.6]), eta=0.7).to(device)
    coefficients = tuple(t[index] for t in (step.x_scale, step.v_scale, step.std, step.dt))
    times = torch.full((rows,), 0.8, device=device)
    ones = torch.ones(rows, device=device)
    run = training_loss(policy, objective, compile=False)
    refer = reference_velocity(policy, compile=False)
    known = [*policy.module.parameters(), *policy.module.buffers(), *picked.values(), latents]
    with LiveBytes(known) as counter:
        v_ref = refer(latents, times, picked) if objective.needs_reference else None
        v_old = latents if objective.guard else None
        loss, _ = run(
            latents, latents, times, coefficients, -ones, ones, ones, picked, v_ref, v_old
        )
        loss.backward()
    for parameter in parameters:
        parameter.grad = None
    return int(counter.peak)


def rows_for_budget(
    policy: Policy,
    objective: Objective,
    conditions: Conditions,
    budget_bytes: float,
    *,
    limit: int = 256,
) -> int:
    """The largest R whose micro-batch stays within a budget.

    Args:
        policy: The generator.
        objective: Options of the loss.
        conditions: One item or more, of the size that training will see.
        budget_bytes: What a step may allocate above the weights and the optimizer's state.
        limit: At most so many rows.

    Raises:
        ArrFastError: Not even one row fits; says what it needs.
    """
    budget = budget_bytes / _HEADROOM
    fitting, peak = 1, step_bytes(policy, objective, conditions, 1)
    if peak > budget:
        raise ArrFastError(
            f"one row needs {peak * _HEADROOM / 1e9:.3g} GB, the budget is "
            f"{budget_bytes / 1e9:.3g} GB: raise it, or turn gradient checkpointing on"
        )
    while fitting < limit:
        rows = min(2 * fitting, limit)
        larger = step_bytes(policy, objective, conditions, rows)
        if larger > budget:
            # The chord of a convex curve lies above it, so what the chord allows does fit.
            slope = (larger - peak) / (rows - fitting)
            fitting += int((budget - peak) / slope)
            break
        fitting, peak = rows, larger
    logger.info("%d rows per micro-batch for %.3g MB", fitting, budget_bytes / 1e6)
    return fitting


def _address(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)
