"""The training step: policy forward, rpo_loss and backward, compiled into one graph each way.

Rollout, training and reference have a graph each (`sampler.rollout_step`, and two here). Shapes are
fixed by packing, and everything that changes from step to step (timesteps, advantages, weights) is
a tensor, so nothing recompiles; `graph_count` lets a caller hold that to account.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from arr_fast.errors import ArrFastError
from arr_fast.rpo.loss import Objective, RowStats, row_loss, stack_stats
from arr_fast.rpo.packing import MicroBatch, PackedRows
from arr_fast.rpo.policies.base import Conditions, Policy
from arr_fast.rpo.sharding import own_share

logger = logging.getLogger("arr_fast")


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one accumulation of gradients did.

    Attributes:
        stats: Diagnostics of its rows.
        skipped: Why no gradient may be applied, or None.
    """

    stats: RowStats
    skipped: str | None = None


class TrainStep:
    """Accumulates the gradient of packed rows into the policy's parameters.

    Args:
        policy: The generator.
        objective: Options of the loss.
        compile: Compile the two graphs.

    Raises:
        ValueError: An objective that needs velocities of the rollout gets none, or latents whose
            shape is not the policy's.
    """

    def __init__(self, policy: Policy, objective: Objective, *, compile: bool = False) -> None:
        self.policy = policy
        self.objective = objective
        self._loss = training_loss(policy, objective, compile=compile)
        self._reference = reference_velocity(policy, compile=compile)
        self._reference_cache: tuple[PackedRows, list[Tensor]] | None = None

    def accumulate(
        self,
        packed: PackedRows,
        *,
        total_rows: float | None = None,
        keep_reference: bool = False,
        no_sync: Callable[[], AbstractContextManager[object]] = nullcontext,
        backward: Callable[[Tensor], None] | None = None,
    ) -> StepReport:
        """Forward and backward over all micro-batches; gradients add up in `.grad`.

        Args:
            packed: The rows.
            total_rows: See `PackedRows.batches`.
            keep_reference: Keep the reference's velocities for a further update on these rows.
            no_sync: Context of all micro-batches but the last (DDP's `no_sync`).
            backward: In place of `loss.backward()` (accelerate's `backward`).

        Returns:
            The report. Where `skipped` is set, the caller drops the gradients: nothing was
            decided, or a loss or a gradient is not finite.
        """
        self._check(packed)
        stats = RowStats(kl_form=self.objective.effective_kl)
        if len(packed) == 0:
            return StepReport(stats, "no decided pair")
        divisor = packed.rows if total_rows is None else total_rows
        collected = []
        for number in range(len(packed)):
            batch = packed.batch(number, divisor)
            v_ref = self._reference_of(packed, number, batch, keep_reference)
            is_last = number == len(packed) - 1
            with nullcontext() if is_last else no_sync():
                loss, row_stats = self._run(batch, v_ref)
                if backward is None:
                    loss.backward()
                else:
                    backward(loss)
            collected.append((row_stats, batch.weight))
        # Read only now: on a GPU every look waits for the device.
        for row_stats, weight in collected:
            stats.add(row_stats, weight)
        if not keep_reference:
            self._reference_cache = None
        return StepReport(stats, self._reason_to_skip(stats, divisor))

    def recompute_log_probs(self, packed: PackedRows) -> float:
        """Replaces the rollout's log_probs by the training graph's own.

        Returns:
            The largest |difference| over rows with weight.
        """
        self._check(packed)
        largest, values = 0.0, []
        for batch in packed.batches():
            v_ref = self._dummy_reference(batch)
            row_stats = self._run(batch, v_ref)[1]
            values.append(row_stats[1].cpu())
            drift = row_stats[5][batch.weight > 0].abs()
            largest = max(largest, float(drift.max()) if len(drift) else 0.0)
        if values:
            packed.log_prob_old = torch.cat(values)
        return largest

    def _run(self, batch: MicroBatch, v_ref: Tensor | None) -> tuple[Tensor, Tensor]:
        step = batch.coefficients
        return self._loss(
            batch.latents,
            batch.next_latents,
            batch.times,
            (step.x_scale, step.v_scale, step.std, step.dt),
            batch.log_prob_old,
            batch.advantage,
            batch.weight,
            batch.conditions,
            v_ref,
            batch.v_old if self.objective.guard else None,
        )

    def _reference_of(
        self, packed: PackedRows, number: int, batch: MicroBatch, keep: bool
    ) -> Tensor | None:
        if not self.objective.needs_reference:
            return None
        if self._reference_cache is None or self._reference_cache[0] is not packed:
            self._reference_cache = (packed, [])
        cached = self._reference_cache[1]
        if number < len(cached):
            return cached[number]
        velocity = self._reference(batch.latents, batch.times, batch.conditions)
        if keep:
            cached.append(velocity)
        return velocity

    def _dummy_reference(self, batch: MicroBatch) -> Tensor | None:
        """The log_prob does not depend on it, but the graph has the argument."""
        if not self.objective.needs_reference:
            return None
        return self._reference(batch.latents, batch.times, batch.conditions)

    def _check(self, packed: PackedRows) -> None:
        shape = packed.chunks[0].latents.shape[2:]
        if tuple(shape) != tuple(self.policy.latent_shape):
            raise ValueError(
                f"latents have shape {tuple(shape)}, the policy {tuple(self.policy.latent_shape)}"
            )
        if self.objective.guard and packed.chunks[0].velocities is None:
            raise ValueError("guard needs trajectories sampled with keep_velocity=True")
        if bool((packed.chunks[0].schedule.coefficients.std[packed.chunks[0].trained] <= 0).any()):
            raise ValueError("a deterministic step (ode) has no log_prob and cannot be trained")

    def _reason_to_skip(self, stats: RowStats, total_rows: float) -> str | None:
        if total_rows == 0:
            return "no decided pair"
        if not stats.finite:
            return "a loss is not finite"
        if not gradients_finite(self.policy.trainable_parameters().values()):
            return "a gradient is not finite"
        return None


TrainingLoss = Callable[..., tuple[Tensor, Tensor]]
ReferenceVelocity = Callable[[Tensor, Tensor, Conditions], Tensor]


def training_loss(policy: Policy, objective: Objective, *, compile: bool) -> TrainingLoss:
    """The differentiable half: rows in, (weighted loss [], stats [6, R]) out."""
    from arr_fast.ops.sde_step import StepCoefficients

    def weighted_loss(
        latents: Tensor,
        next_latents: Tensor,
        times: Tensor,
        coefficients: tuple[Tensor, Tensor, Tensor, Tensor],
        log_prob_old: Tensor,
        advantage: Tensor,
        weight: Tensor,
        conditions: Conditions,
        v_ref: Tensor | None,
        v_old: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        v = policy.velocity(latents, times, conditions)
        result = row_loss(
            objective,
            v,
            latents,
            next_latents,
            StepCoefficients(*coefficients),
            log_prob_old=log_prob_old,
            advantage=advantage,
            v_ref=v_ref,
            v_old=v_old,
        )
        # where, not a product: a row of weight 0 stays out of the loss even if it is NaN.
        loss = torch.where(weight > 0, result.loss * weight, 0.0).sum()
        return loss, stack_stats(result, log_prob_old)

    if not compile:
        return weighted_loss
    compiled: TrainingLoss = torch.compile(weighted_loss, fullgraph=True, dynamic=False)
    return compiled


def reference_velocity(policy: Policy, *, compile: bool) -> ReferenceVelocity:
    """The reference policy's forward, without gradients."""

    def forward(latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        return policy.velocity(latents, times, conditions)

    run: ReferenceVelocity = forward
    if compile:
        run = torch.compile(forward, fullgraph=True, dynamic=False)

    def velocity(latents: Tensor, times: Tensor, conditions: Conditions) -> Tensor:
        with torch.no_grad(), policy.reference():
            return run(latents, times, conditions)

    return velocity


def gradients_finite(parameters: Iterable[torch.nn.Parameter]) -> bool:
    """Whether every gradient that exists is finite."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return True
    # Every rank sees to its own share.
    norms = torch.stack([torch.linalg.vector_norm(own_share(g)) for g in gradients])
    return bool(norms.isfinite().all())


def check_on_policy(report: StepReport, objective: Objective, share: float = 0.1) -> float:
    """Holds the first update to account: before it, every ratio must be 1.

    Args:
        report: Of the first accumulation, before the optimizer stepped.
        objective: Its options.
        share: Largest |ratio - 1| as a share of the narrower clip.

    Returns:
        The largest |ratio - 1|.

    Raises:
        ArrFastError: It is larger: rollout and training disagree about the same policy.
    """
    stats = report.stats
    drift = max(stats.ratio_max - 1, 1 - stats.ratio_min) if stats.rows else 0.0
    limit = share * min(objective.clip_low, objective.clip_high)
    if not drift <= limit:
        raise ArrFastError(
            f"before the first update the ratio differs from 1 by {drift:.3g}, more than "
            f"{limit:.3g} ({share:g} of the clip): rollout and training disagree (precision, "
            "schedule, dropout); try recomputed log_probs or float32"
        )
    return drift


def graph_count() -> int:
    """Graphs that dynamo has compiled in this process so far."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])
