"""Images from a policy, without training: for evaluation, `arr-fast sample` and demos."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from arr_fast.ops.sde_step import sde_step
from arr_fast.rpo.policies.base import Conditions, Policy
from arr_fast.rpo.sde import Schedule, initial_noise, noise_seeds


@torch.no_grad()
def generate(
    policy: Policy,
    conditions: Conditions,
    ids: Sequence[int],
    schedule: Schedule,
    *,
    seed: int,
    candidates: int = 1,
    impl: str = "torch",
) -> Tensor:
    """Samples clean latents; the noise depends on (seed, id, candidate, step) alone.

    Args:
        policy: The generator.
        conditions: B items.
        ids: B prompt numbers.
        schedule: Of T steps.
        seed: Of the noise.
        candidates: G images per prompt.
        impl: Of sde_step.

    Returns:
        float32 [B G, *latent_shape], candidates fastest.
    """
    schedule = schedule.to(policy.device)
    key = (seed, 0, ids)
    latents = initial_noise(*key, candidates, policy.latent_shape).to(policy.device)
    repeated = {
        name: torch.repeat_interleave(tensor, candidates, dim=0)
        for name, tensor in conditions.items()
    }
    for number in range(len(schedule)):
        step = schedule.coefficients[torch.full((len(latents),), number, device=policy.device)]
        times = schedule.times[number].expand(len(latents)).contiguous()
        seeds = noise_seeds(*key, candidates, number).to(policy.device)
        velocity = policy.velocity(latents, times, repeated)
        latents, _ = sde_step(latents, velocity, step, seed=seeds, impl=impl)
    return latents


def generate_images(
    policy: Policy,
    prompts: Sequence[str],
    sources: Sequence[Image.Image] | None,
    ids: Sequence[int],
    schedule: Schedule,
    *,
    seed: int,
    candidates: int = 1,
    batch: int = 16,
) -> list[Image.Image]:
    """Encodes, samples and decodes, `batch` prompts at a time.

    Returns:
        B G images, candidates fastest.
    """
    images: list[Image.Image] = []
    for first in range(0, len(prompts), batch):
        part = slice(first, first + batch)
        conditions = policy.encode(prompts[part], None if sources is None else sources[part])
        latents = generate(
            policy, conditions, ids[part], schedule, seed=seed, candidates=candidates
        )
        images += policy.decode(latents)
    return images
