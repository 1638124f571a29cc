"""Types of a rollout: what is sampled, how, and what came back from the judges.

Shapes: P prompts, G candidates per prompt, T steps of the schedule.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from arr_fast.rpo.judging import Judgement
from arr_fast.rpo.policies.base import Conditions, condition_count
from arr_fast.rpo.sde import Schedule


@dataclass(frozen=True, slots=True)
class SamplingConfig:
    """How trajectories are sampled; the schedule (steps, kind, eta) is a `sde.Schedule`.

    Attributes:
        candidates: G.
        train_steps: Steps of a trajectory that are trained; None trains the whole window.
        train_window: They are drawn from the first so many steps; None: all but the last.
        shared_initial_noise: All candidates of a prompt start from the same noise.
        normalised: False takes flow_grpo's cps log_prob.
        keep_velocity: Keep the rollout's velocities, which GRPO-Guard needs.
        max_staleness: Policy updates allowed between sampling and training. Above 0 the first
            chunk of the next iteration is sampled while the last judgement is awaited.
        judge_timeout: Seconds to wait for one judgement after sampling before it has failed.
        judge_timeouts: The same for judges by name; the others take `judge_timeout`.
        seed: Of all noise.
        impl: Of sde_step.
    """

    candidates: int = 2
    train_steps: int | None = None
    train_window: int | None = None
    shared_initial_noise: bool = False
    normalised: bool = True
    keep_velocity: bool = False
    max_staleness: int = 0
    judge_timeout: float = 600.0
    judge_timeouts: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    impl: str = "torch"

    def __post_init__(self) -> None:
        if self.candidates < 2:
            raise ValueError(f"candidates must be at least 2, got {self.candidates}")
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness must be at least 0, got {self.max_staleness}")
        for seconds in (self.judge_timeout, *self.judge_timeouts.values()):
            if not seconds > 0:
                raise ValueError(f"judge_timeout must be above 0, got {seconds}")

    def timeout_of(self, judge: str) -> float:
        """Seconds to wait for a judge."""
        return self.judge_timeouts.get(judge, self.judge_timeout)

    def trained(self, steps: int) -> tuple[int, int]:
        """(n, window) for a schedule of T steps.

        Raises:
            ValueError: More than there are, or none.
        """
        window = steps - 1 if self.train_window is None else self.train_window
        count = window if self.train_steps is None else self.train_steps
        if not 1 <= window <= steps - 1:
            raise ValueError(
                f"train_window must be in [1, {steps - 1}] (the last of {steps} steps is never "
                f"trained), got {window}"
            )
        if not 1 <= count <= window:
            raise ValueError(f"train_steps must be in [1, {window}], got {count}")
        return count, window


@dataclass(frozen=True, slots=True)
class PromptBatch:
    """P prompts of one chunk, encoded.

    Attributes:
        ids: P stable prompt numbers; with the seed and the epoch they key the noise.
        prompts: P texts.
        conditions: P items, as the policy encodes them.
        sources: P images to edit, or None.
        metadata: P rows for the judge, or empty.
        epoch: Walks over the prompt set so far, so that a prompt's noise is new each time.
    """

    ids: tuple[int, ...]
    prompts: tuple[str, ...]
    conditions: Conditions
    sources: tuple[Image.Image, ...] | None = None
    metadata: tuple[Mapping[str, Any], ...] = ()
    epoch: int = 0

    def __post_init__(self) -> None:
        sizes = {"ids": len(self.ids), "prompts": len(self.prompts)}
        sizes["conditions"] = condition_count(self.conditions)
        if self.sources is not None:
            sizes["sources"] = len(self.sources)
        if self.metadata:
            sizes["metadata"] = len(self.metadata)
        if len(set(sizes.values())) != 1 or not self.ids:
            raise ValueError(f"a prompt batch needs one or more prompts of one number, got {sizes}")

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Trajectories:
    """What was sampled for P prompts; row p G + g is candidate g of prompt p.

    Attributes:
        batch: The prompts.
        schedule: Of T steps, on the latents' device.
        latents: float32 [P G, T + 1, *latent_shape], the initial noise first, clean latents last.
        log_probs: float32 [P G, T]; NaN where a step is deterministic.
        velocities: [P G, T, *latent_shape], or None.
        trained: int64 [P, n] numbers of the steps that are trained, ascending.
        finite: bool [P], CPU: all latents of the prompt's candidates are finite.
        policy_version: Optimizer steps behind the weights that sampled them.
    """

    batch: PromptBatch
    schedule: Schedule
    latents: Tensor
    log_probs: Tensor
    velocities: Tensor | None
    trained: Tensor
    finite: Tensor
    policy_version: int = 0

    @property
    def candidates(self) -> int:
        """G."""
        return self.latents.shape[0] // len(self.batch)

    @property
    def final(self) -> Tensor:
        """Clean latents [P G, *latent_shape]."""
        return self.latents[:, -1]


@dataclass(frozen=True, slots=True)
class JudgedChunk:
    """A chunk with what every judge said about it.

    Attributes:
        trajectories: What was sampled.
        judgements: By the judge's name; one that failed says NaN for every pair.
        failures: By the judge's name, why it failed for the whole chunk.
        seconds: By phase: sampling, decoding, judging (while no earlier chunk was) and waiting
            (judging that sampling did not hide).
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
