"""From a configuration to the parts of a run."""

from __future__ import annotations

from typing import Any

import torch

from arr_fast.rpo.advantages import RewardSpec
from arr_fast.rpo.config import RunConfig
from arr_fast.rpo.loss import Objective
from arr_fast.rpo.policies.base import Policy
from arr_fast.rpo.rollout import SamplingConfig
from arr_fast.rpo.schedule import shifted_sigmas
from arr_fast.rpo.sde import Schedule, build_schedule


def build_policy(config: RunConfig, device: torch.device | str) -> Policy:
    """Loads the generator onto a device, or into host memory where it is to be split.

    Raises:
        ArrFastError: It is missing or of another kind.
        ValueError: Options that it does not take.
    """
    from arr_fast.rpo.policies.diffusers_policy import LoraOptions

    section = config.policy
    device = "cpu" if config.shard else device
    lora = None
    if section.lora is not None:
        lora = LoraOptions(section.lora.rank, section.lora.alpha, section.lora.targets)
    # LoRA's first factors are drawn at random: alike on every rank.
    torch.manual_seed(config.seed)
    if section.kind == "shapes":
        from arr_fast.rpo.policies.shapes import ShapesPolicy

        _check_shapes(config)
        return ShapesPolicy.from_pretrained(section.model, device=device, lora=lora)
    from arr_fast.rpo.policies.loading import POLICY_CLASSES

    options = {} if section.guidance is None else {"guidance": section.guidance}
    policy: Any = POLICY_CLASSES[section.kind].from_pretrained(
        section.model,
        dtype=getattr(torch, section.dtype),
        device=device,
        revision=section.revision,
        height=section.height,
        width=section.width,
        lora=lora,
        true_cfg=section.true_cfg,
        negative_prompt=section.negative_prompt,
        gradient_checkpointing=section.gradient_checkpointing,
        **options,
    )
    found: Policy = policy
    return found


def _check_shapes(config: RunConfig) -> None:
    section = config.policy
    if (section.height, section.width) != (64, 64):
        raise ValueError(
            f"the shapes policy draws 64 x 64 pixels, got {section.height} x {section.width}"
        )
    if section.guidance is not None or section.true_cfg != 1:
        raise ValueError("the shapes policy has no guidance: leave guidance and true_cfg out")
    if section.dtype != "float32":
        raise ValueError(f"the shapes policy is float32, got {section.dtype}")


def _sigmas(config: RunConfig, policy: Policy, steps: int) -> torch.Tensor:
    if config.sampler.shift == "dynamic":
        return policy.sigmas(steps)
    return shifted_sigmas(steps, config.sampler.shift)


def build_schedule_of(config: RunConfig, policy: Policy) -> Schedule:
    """The rollout's schedule."""
    section = config.sampler
    sigmas = _sigmas(config, policy, section.steps)
    return build_schedule(sigmas, section.kind, section.eta, floor_times=section.floor_timesteps)


def build_evaluation_schedule(config: RunConfig, policy: Policy) -> Schedule:
    """The evaluation's schedule, on the rollout's shift."""
    section = config.evaluation
    eta = 0.0 if section.kind == "ode" else config.sampler.eta
    return build_schedule(_sigmas(config, policy, section.steps), section.kind, eta)


def build_sampling(config: RunConfig) -> SamplingConfig:
    """Options of the rollout."""
    return SamplingConfig(
        candidates=config.rollout.candidates,
        train_steps=config.sampler.trained,
        train_window=config.sampler.window,
        shared_initial_noise=config.sampler.shared_noise,
        keep_velocity=config.loss.guard,
        max_staleness=config.rollout.max_staleness,
        judge_timeouts={name: judge.timeout_s for name, judge in config.judges.items()},
        seed=config.seed,
        impl=_impl(config),
    )


def build_objective(config: RunConfig, elements: int) -> Objective:
    """Options of the loss, for latents of `elements` numbers."""
    clip = config.loss.clip_range(elements)
    return Objective(
        clip_low=min(clip, 1.0),
        clip_high=clip,
        beta=config.loss.beta,
        kl=config.loss.kl,
        guard=config.loss.guard,
        impl=_impl(config),
    )


def build_specs(config: RunConfig) -> dict[str, RewardSpec]:
    """How each reward takes part."""
    return {
        name: RewardSpec(judge.weight, judge.required, judge.veto, judge.threshold)
        for name, judge in config.judges.items()
    }


def _impl(config: RunConfig) -> str:
    if config.loss.impl != "auto":
        return config.loss.impl
    return "triton" if torch.cuda.is_available() else "torch"
