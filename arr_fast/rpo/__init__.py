"""Rubric Policy Optimization: rollouts, judged pairs, and the compiled training step.

A loop of one's own needs these few (an `arr-fast train` run is `trainer.Trainer`):

    from arr_fast.rpo.advantages import advantages

    policy = load_policy("black-forest-labs/FLUX.1-dev", height=512, width=512, lora=LoraOptions())
    schedule = build_schedule(policy.sigmas(8), "sde", 0.7)
    sampler = Sampler(policy, schedule, SamplingConfig(), {"arr": submit}, compile=True)
    chunks = sampler.iterate(batches)
    given = [advantages(mix_preferences(chunk.judgements)) for chunk in chunks]
    packed = PackedRows([chunk.trajectories for chunk in chunks], given, rows_per_batch=8)
    report = TrainStep(policy, Objective(), compile=True).accumulate(packed)

The public names load on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_HOMES = {
    "JudgeRequest": "arr_fast.rpo.judging",
    "Judgement": "arr_fast.rpo.judging",
    "LoraOptions": "arr_fast.rpo.policies.diffusers_policy",
    "Objective": "arr_fast.rpo.loss",
    "PackedRows": "arr_fast.rpo.packing",
    "Policy": "arr_fast.rpo.policies.base",
    "PromptBatch": "arr_fast.rpo.rollout",
    "RewardSpec": "arr_fast.rpo.advantages",
    "Sampler": "arr_fast.rpo.sampler",
    "SamplingConfig": "arr_fast.rpo.rollout",
    "TrainStep": "arr_fast.rpo.step",
    "build_schedule": "arr_fast.rpo.sde",
    "load_policy": "arr_fast.rpo.policies.loading",
    "mix_preferences": "arr_fast.rpo.advantages",
}

__all__ = [
    "JudgeRequest",
    "Judgement",
    "LoraOptions",
    "Objective",
    "PackedRows",
    "Policy",
    "PromptBatch",
    "RewardSpec",
    "Sampler",
    "SamplingConfig",
    "TrainStep",
    "build_schedule",
    "load_policy",
    "mix_preferences",
]

if TYPE_CHECKING:
    from arr_fast.rpo.advantages import RewardSpec, mix_preferences
    from arr_fast.rpo.judging import Judgement, JudgeRequest
    from arr_fast.rpo.loss import Objective
    from arr_fast.rpo.packing import PackedRows
    from arr_fast.rpo.policies.base import Policy
    from arr_fast.rpo.policies.diffusers_policy import LoraOptions
    from arr_fast.rpo.policies.loading import load_policy
    from arr_fast.rpo.rollout import PromptBatch, SamplingConfig
    from arr_fast.rpo.sampler import Sampler
    from arr_fast.rpo.sde import build_schedule
    from arr_fast.rpo.step import TrainStep


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
