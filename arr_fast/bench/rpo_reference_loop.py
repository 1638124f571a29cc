"""An RPO iteration in the shape of the ARR reference's loop, at the mathematics of ours.

Written from the description in its paper and the structure of fastvideo/train_rpo_flux.py: one
image is sampled at a time, pairs are judged one by one after sampling, and training walks through
candidates and timesteps with a forward, a reference forward and a backward each.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from arr_fast.ops.sde_step import sde_step
from arr_fast.rpo.advantages import advantages, mix_preferences
from arr_fast.rpo.judging import Judgement, JudgeRequest, SubmitJudge
from arr_fast.rpo.loss import Objective, row_loss
from arr_fast.rpo.policies.base import Conditions, Policy
from arr_fast.rpo.rollout import PromptBatch
from arr_fast.rpo.sde import Schedule, initial_noise, noise_seeds, trained_steps


@dataclass(slots=True)
class _Path:
    """One candidate: latents [T + 1, ...], log_probs [T], its conditions of one item."""

    latents: Tensor
    log_probs: Tensor
    conditions: Conditions
    trained: Tensor


def reference_iteration(
    policy: Policy,
    batches: list[PromptBatch],
    schedule: Schedule,
    objective: Objective,
    judge: SubmitJudge,
    *,
    seed: int,
    trained: tuple[int, int],
) -> Mapping[str, float]:
    """One iteration; gradients add up in `.grad`, no optimizer step.

    Args:
        policy: The generator.
        batches: The iteration's prompts, as ours takes them.
        schedule: Of T steps.
        objective: Options of the loss.
        judge: Called with one pair at a time.
        seed: Of the noise; with it the trajectories are those of `Sampler`.
        trained: (steps trained, window), as in `SamplingConfig.trained`.

    Returns:
        Seconds of sampling, judging and training.
    """
    began = time.perf_counter()
    groups = []
    for batch in batches:
        for place in range(len(batch)):
            groups.append(
                [_sample(policy, batch, place, g, schedule, seed, trained) for g in (0, 1)]
            )
    sampled = time.perf_counter()
    judgements = []
    rows = [(batch, place) for batch in batches for place in range(len(batch))]
    for (batch, place), group in zip(rows, groups, strict=True):
        judgements.append(judge(_request(policy, batch, place, group)).result())
    judged = time.perf_counter()
    _train(policy, groups, judgements, schedule, objective)
    ended = time.perf_counter()
    return {
        "sampling": sampled - began,
        "judging": judged - sampled,
        "training": ended - judged,
        "total": ended - began,
    }


@torch.no_grad()
def _sample(
    policy: Policy,
    batch: PromptBatch,
    place: int,
    candidate: int,
    schedule: Schedule,
    seed: int,
    trained: tuple[int, int],
) -> _Path:
    ids = (batch.ids[place],)
    conditions = {name: tensor[place : place + 1] for name, tensor in batch.conditions.items()}
    both = initial_noise(seed, batch.epoch, ids, 2, policy.latent_shape)
    latents = both[candidate : candidate + 1]
    path, log_probs = [latents], []
    for number in range(len(schedule)):
        velocity = policy.velocity(latents, schedule.times[number : number + 1], conditions)
        seeds = noise_seeds(seed, batch.epoch, ids, 2, number)[candidate : candidate + 1]
        step = schedule.coefficients[number : number + 1]
        latents, log_prob = sde_step(latents, velocity, step, seed=seeds)
        path.append(latents)
        log_probs.append(log_prob)
    chosen = trained_steps(seed, batch.epoch, ids, *trained)[0]
    return _Path(torch.cat(path), torch.cat(log_probs), conditions, chosen)


def _request(policy: Policy, batch: PromptBatch, place: int, group: list[_Path]) -> JudgeRequest:
    images = tuple(policy.decode(path.latents[-1:])[0] for path in group)
    return JudgeRequest(
        prompt_ids=(batch.ids[place],),
        prompts=(batch.prompts[place],),
        images=(images,),
        sources=None if batch.sources is None else (batch.sources[place],),
        metadata=(batch.metadata[place],) if batch.metadata else ({},),
    )


def _train(
    policy: Policy,
    groups: list[list[_Path]],
    judgements: list[Judgement],
    schedule: Schedule,
    objective: Objective,
) -> None:
    given = [advantages(mix_preferences({"rubric": judged})) for judged in judgements]
    rows = sum(
        int(each.weight.sum()) * len(group[0].trained)
        for each, group in zip(given, groups, strict=True)
    )
    for group, each in zip(groups, given, strict=True):
        for candidate, path in enumerate(group):
            if not bool(each.weight[0, candidate]):
                continue
            for number in path.trained.tolist():
                x, x_next = path.latents[number : number + 1], path.latents[number + 1 : number + 2]
                at = schedule.times[number : number + 1]
                with torch.no_grad(), policy.reference():
                    v_ref = policy.velocity(x, at, path.conditions)
                result = row_loss(
                    objective,
                    policy.velocity(x, at, path.conditions),
                    x,
                    x_next,
                    schedule.coefficients[number : number + 1],
                    log_prob_old=path.log_probs[number : number + 1],
                    advantage=each.value[0, candidate : candidate + 1],
                    v_ref=v_ref,
                )
                (result.loss.sum() / rows).backward()
