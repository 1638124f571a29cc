"""The objective of RPO, and how a batch of rows becomes one number.

The op `arr_fast.ops.rpo_loss` does the arithmetic; here are its options in one validated place and
the weighting: a row is one trained step of one candidate, and

    loss = sum_rows weight_r loss_r     weight_r = 1 / (T_trained * candidates with an advantage)

over all ranks, so ties, failures and padding (weight 0) neither count nor dilute. For pairs the
divisor is 2 T_trained times the number of decided pairs, as in eq. 13 of the paper.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import get_args

import torch
from torch import Tensor

from arr_fast.ops.rpo_loss import KLForm, RPOLoss, rpo_loss
from arr_fast.ops.sde_step import StepCoefficients


@dataclass(frozen=True, slots=True)
class Objective:
    """Options of the loss.

    Attributes:
        clip_low, clip_high: Widths of the clip below and above a ratio of 1.
        beta: Weight of the KL.
        kl: Its form; see arr_fast.ops.rpo_loss.
        guard: GRPO-Guard's ratio and weighting; needs the rollout's velocities.
        normalised: False takes flow_grpo's cps log_prob.
        log_reference: Run the reference forward though the loss has no gradient through it, to
            report the value of log_prob_diff.
        impl: "torch", "triton" or "reference": who computes the op.
    """

    clip_low: float = 1e-4
    clip_high: float = 1e-4
    beta: float = 0.0
    kl: KLForm = "none"
    guard: bool = False
    normalised: bool = True
    log_reference: bool = False
    impl: str = "torch"

    def __post_init__(self) -> None:
        if not 0 < self.clip_low <= 1:
            raise ValueError(f"clip_low must be in (0, 1], got {self.clip_low}")
        if not (self.clip_high > 0 and math.isfinite(self.clip_high)):
            raise ValueError(f"clip_high must be finite and above 0, got {self.clip_high}")
        if not (self.beta >= 0 and math.isfinite(self.beta)):
            raise ValueError(f"beta must be finite and at least 0, got {self.beta}")
        if self.kl not in get_args(KLForm):
            raise ValueError(f"kl must be one of {', '.join(get_args(KLForm))}, got {self.kl!r}")
        if self.guard and not self.normalised:
            raise ValueError("guard (GRPO-Guard) needs normalised=True")

    @property
    def needs_reference(self) -> bool:
        """Whether the reference policy must run: its KL has a gradient, or its value is logged."""
        has_gradient = self.beta > 0 and self.kl in ("latent_mean", "velocity")
        return has_gradient or (self.log_reference and self.kl != "none")

    @property
    def effective_kl(self) -> KLForm:
        """The form that the op computes: without beta and logging there is nothing to compute."""
        return self.kl if self.beta > 0 or self.log_reference else "none"


def clip_from_nats(nats: float, elements: int) -> float:
    """The clip on the ratio that is worth so many nats of a sample with D = elements latents.

    log_prob is a mean over the D elements, so a clip c is worth c D nats.
    """
    return nats / elements


def row_loss(
    objective: Objective,
    v: Tensor,
    latents: Tensor,
    next_latents: Tensor,
    coefficients: StepCoefficients,
    *,
    log_prob_old: Tensor,
    advantage: Tensor,
    v_ref: Tensor | None = None,
    v_old: Tensor | None = None,
) -> RPOLoss:
    """The loss of R rows, one number each.

    Args:
        objective: Options.
        v: [R, ...] predicted velocity, with a gradient.
        latents, next_latents: [R, ...] before and after the step, as the rollout stored them.
        coefficients: float32 [R] each.
        log_prob_old, advantage: float32 [R].
        v_ref: [R, ...] velocity of the reference, where `objective.needs_reference`.
        v_old: [R, ...] velocity at the rollout, for GRPO-Guard.

    Raises:
        ValueError: Shapes or values that do not fit; the message names the argument.
    """
    if objective.guard and v_old is None:
        raise ValueError("v_old is needed by guard: sample with keep_velocity=True")
    return rpo_loss(
        v,
        latents,
        next_latents,
        coefficients,
        log_prob_old=log_prob_old,
        advantage=advantage,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        beta=objective.beta,
        kl=objective.effective_kl,
        v_ref=v_ref if objective.effective_kl != "none" else None,
        v_old=v_old if objective.guard else None,
        normalised=objective.normalised,
        impl=objective.impl,
    )


@dataclass
class RowStats:
    """Diagnostics of the rows of a step, added up over micro-batches; only rows with weight count.

    Attributes:
        rows: Rows with weight.
        loss: The weighted loss.
        ratio_sum, ratio_min, ratio_max: Of rho.
        clipped: Rows outside the clip range.
        kl_sum, kl_rows: KL in its form's own unit, over the rows where it was computed.
        drift: Largest |log_prob - log_prob_old|.
        finite: Whether every row's loss was finite.
    """

    rows: int = 0
    loss: float = 0.0
    ratio_sum: float = 0.0
    ratio_min: float = math.inf
    ratio_max: float = -math.inf
    clipped: int = 0
    kl_sum: float = 0.0
    kl_rows: int = 0
    drift: float = 0.0
    finite: bool = True
    kl_form: str = field(default="none")

    def add(self, stats: Tensor, weight: Tensor) -> None:
        """Adds a micro-batch.

        Args:
            stats: float32 [6, R]: loss, log_prob, ratio, clipped, kl, log_prob - log_prob_old.
            weight: float32 [R].
        """
        counted = stats[:, weight > 0].double().cpu()
        if counted.shape[1] == 0:
            return
        loss, _, ratio, clipped, kl, drift = counted
        self.rows += counted.shape[1]
        self.loss += float((loss * weight[weight > 0].double().cpu()).sum())
        self.ratio_sum += float(ratio.sum())
        self.ratio_min = min(self.ratio_min, float(ratio.min()))
        self.ratio_max = max(self.ratio_max, float(ratio.max()))
        self.clipped += int(clipped.sum())
        known = kl[~kl.isnan()]
        self.kl_sum += float(known.sum())
        self.kl_rows += len(known)
        self.drift = max(self.drift, float(drift.abs().max()))
        self.finite = self.finite and bool(loss.isfinite().all() and ratio.isfinite().all())

    def summary(self, objective: Objective, elements: int) -> dict[str, float]:
        """Numbers to log; `elements` is D, for the clip in nats."""
        rows = max(self.rows, 1)
        numbers = {
            "loss": self.loss,
            "ratio_mean": self.ratio_sum / rows,
            "ratio_min": self.ratio_min,
            "ratio_max": self.ratio_max,
            "clip_fraction": self.clipped / rows,
            "clip": objective.clip_high,
            "clip_nats": objective.clip_high * elements,
            "log_prob_drift": self.drift,
        }
        if self.kl_rows and self.kl_form != "none":
            numbers["kl"] = self.kl_sum / self.kl_rows
            if self.kl_form in ("latent_mean", "log_prob_diff"):
                numbers["kl_nats"] = numbers["kl"] * elements
        return numbers


def stack_stats(result: RPOLoss, log_prob_old: Tensor) -> Tensor:
    """What `RowStats.add` reads, as one tensor [6, R] that leaves the compiled graph."""
    return torch.stack(
        [
            result.loss.detach(),
            result.log_prob,
            result.ratio,
            result.clipped,
            result.kl,
            result.log_prob - log_prob_old,
        ]
    )
