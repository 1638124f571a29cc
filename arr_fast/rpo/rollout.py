"""Rollout: candidates of every prompt in one batch, each chunk judged while the next is sampled.

Shapes: P prompts, G candidates per prompt, T steps of the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from arr_fast.ops.sde_step import StepCoefficients, StepKind
from arr_fast.rpo.judging import Judgement
from arr_fast.rpo.policies.base import Conditions


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How an iteration samples.

    Attributes:
        steps: T, steps of the schedule; the last one returns the clean latents.
        kind: The kind of step.
        eta: Its noise level (eta of dance_sde, a of sde and cps).
        candidates: G.
        chunks: M, chunks of prompts per iteration; while one is judged the next is sampled.
        train_steps: How many steps of a trajectory are trained (all of the first T - 1: None).
        train_window: From the first how many steps they are drawn (None: T - 1).
        shared_initial_noise: All candidates of a prompt start from the same noise.
        normalised: False reproduces flow_grpo's cps log_prob.
        keep_velocity: Keep the rollout's velocities, which GRPO-Guard needs.
        max_staleness: Policy updates between sampling and training a chunk that are allowed.
        judge_timeout: Seconds to wait for one chunk's judgement before it counts as failed.
        seed: Of all noise.
        impl: Of the ops.
    """

    steps: int = 8
    kind: StepKind = "sde"
    eta: float = 0.7
    candidates: int = 2
    chunks: int = 6
    train_steps: int | None = 4
    train_window: int | None = None
    shared_initial_noise: bool = False
    normalised: bool = True
    keep_velocity: bool = False
    max_staleness: int = 0
    judge_timeout: float = 600.0
    seed: int = 0
    impl: str = "torch"


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """P prompts of one chunk, encoded.

    Attributes:
        ids: P stable prompt numbers; with the seed and the epoch they key the noise.
        prompts: P texts.
        conditions: P items, as the policy encodes them.
        sources: P images to edit, or None.
        metadata: P rows for the judge.
        epoch: How often the prompt set has been walked, so that a prompt's noise is new each time.
    """

    ids: tuple[int, ...]
    prompts: tuple[str, ...]
    conditions: Conditions
    sources: tuple[Image.Image, ...] | None = None
    metadata: tuple[Mapping[str, Any], ...] = ()
    epoch: int = 0


@dataclass(frozen=True, slots=True)
class Trajectories:
    """What was sampled for P prompts; row p G + g is candidate g of prompt p.

    Attributes:
        batch: The prompts.
        sigmas: float64 [T + 1].
        coefficients: Of the T steps, on the latents' device.
        latents: float32 [P G, T + 1, *latent_shape], the initial noise first, clean latents last.
        log_probs: float32 [P G, T]; NaN where a step is deterministic.
        velocities: [P G, T, *latent_shape], or None.
        trained: int64 [P G, n] numbers of the steps that are trained, ascending.
        policy_version: Optimizer steps behind the weights that sampled them.
    """

    batch: PromptBatch
    sigmas: Tensor
    coefficients: StepCoefficients
    latents: Tensor
    log_probs: Tensor
    velocities: Tensor | None
    trained: Tensor
    policy_version: int = 0


@dataclass(frozen=True, slots=True)
class JudgedChunk:
    """A chunk with what every judge said about it.

    Attributes:
        trajectories: What was sampled.
        judgements: By the judge's name; a judge that failed is absent.
        failures: By the judge's name, why it failed.
        seconds: Seconds by phase: sampling, judging (from submit to answer), waiting (not hidden).
    """

    trajectories: Trajectories
    judgements: dict[str, Judgement]
    failures: dict[str, str] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def repeat_candidates(conditions: Conditions, candidates: int) -> Conditions:
    """Conditions of P prompts for P G rows."""
    return {
        name: torch.repeat_interleave(tensor, candidates, dim=0)
        for name, tensor in conditions.items()
    }
