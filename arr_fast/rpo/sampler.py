"""The sampler: all candidates of a chunk in one batch, each chunk judged while the next is sampled.

An iteration samples M chunks from one version of the policy. A chunk's images go to every judge as
soon as they are decoded; answers are collected when sampling has ended, so judging costs only what
is longer than the sampling that was left. No image is written anywhere.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, TimeoutError
from dataclasses import dataclass, field, replace

import torch
from PIL import Image
from torch import Tensor

from arr_fast.ops.sde_step import StepCoefficients, sde_step
from arr_fast.rpo.judging import Judgement, JudgeRequest, SubmitJudge
from arr_fast.rpo.policies.base import Conditions, Policy
from arr_fast.rpo.rollout import (
    JudgedChunk,
    PromptBatch,
    SamplingConfig,
    Trajectories,
    repeat_candidates,
)
from arr_fast.rpo.sde import Schedule, initial_noise, noise_seeds, trained_steps

logger = logging.getLogger("arr_fast")


@dataclass
class _Pending:
    """A chunk whose judgements are under way."""

    trajectories: Trajectories
    futures: dict[str, Future[Judgement]]
    failures: dict[str, str]
    seconds: dict[str, float]
    submitted: float
    answered: dict[str, float] = field(default_factory=dict)


class Sampler:
    """Samples chunks and has them judged.

    Args:
        policy: The generator.
        schedule: Steps of the trajectories.
        config: How to sample.
        judges: By name; each takes a request and returns a future. Empty samples only.
        compile: Compile policy forward and step into one graph.
    """

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule,
        config: SamplingConfig,
        judges: Mapping[str, SubmitJudge] | None = None,
        *,
        compile: bool = False,
    ) -> None:
        self.policy = policy
        self.schedule = schedule.to(policy.device)
        self.config = config
        self.judges = dict(judges or {})
        self._trained = config.trained(len(schedule))
        self._step = rollout_step(policy, config, compile=compile)
        self._ahead: _Pending | None = None
        self._last_answer = 0.0

    @torch.no_grad()
    def sample(self, batch: PromptBatch, policy_version: int = 0) -> Trajectories:
        """Samples G trajectories for every prompt of a chunk, in one batch.

        Args:
            batch: P prompts.
            policy_version: Optimizer steps behind the current weights.
        """
        config, schedule, device = self.config, self.schedule, self.policy.device
        key = (config.seed, batch.epoch, batch.ids)
        latents = initial_noise(
            *key,
            config.candidates,
            self.policy.latent_shape,
            shared=config.shared_initial_noise,
            device=device,
        )
        rows = latents.shape[0]
        conditions = repeat_candidates(batch.conditions, config.candidates)
        path, log_probs, velocities = [latents], [], []
        for number in range(len(schedule)):
            step = schedule.coefficients[torch.full((rows,), number, device=device)]
            seeds = noise_seeds(*key, config.candidates, number).to(device)
            times = schedule.times[number].expand(rows).contiguous()
            latents, log_prob, velocity = self._step(latents, times, step, seeds, conditions)
            path.append(latents)
            log_probs.append(log_prob)
            if config.keep_velocity:
                velocities.append(velocity)
        latents_path = torch.stack(path, dim=1)
        finite = latents_path.flatten(1).isfinite().all(1).view(len(batch), -1).all(1)
        return Trajectories(
            batch=batch,
            schedule=schedule,
            latents=latents_path,
            log_probs=torch.stack(log_probs, dim=1),
            velocities=torch.stack(velocities, dim=1) if velocities else None,
            trained=trained_steps(*key, *self._trained).to(device),
            finite=finite.cpu(),
            policy_version=policy_version,
        )

    def iterate(
        self,
        batches: Sequence[PromptBatch],
        policy_version: int = 0,
        *,
        upcoming: PromptBatch | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[JudgedChunk]:
        """One iteration's chunks, sampled and judged.

        Args:
            batches: M chunks of prompts.
            policy_version: Optimizer steps behind the current weights.
            upcoming: The first chunk of the next iteration, sampled ahead where `max_staleness`
                allows it.
            progress: Called with the number of chunks sampled so far.

        Returns:
            M chunks in order. A judge that failed or ran out of time has its reason in `failures`
            and NaN for every pair.
        """
        pending: list[_Pending] = []
        try:
            for number, batch in enumerate(batches):
                ahead = self._take_ahead(batch, policy_version) if number == 0 else None
                pending.append(ahead or self._start(batch, policy_version))
                if progress is not None:
                    progress(number + 1)
            if self.config.max_staleness > 0 and upcoming is not None:
                self._ahead = self._start(upcoming, policy_version)
            return [self._finish(each) for each in pending]
        except BaseException:
            for each in [*pending, *filter(None, [self._ahead])]:
                for future in each.futures.values():
                    future.cancel()
            self._ahead = None
            raise

    def discard_ahead(self) -> None:
        """Forgets a chunk that was sampled ahead, for example before a resume replays it."""
        if self._ahead is not None:
            for future in self._ahead.futures.values():
                future.cancel()
            self._ahead = None

    def _take_ahead(self, batch: PromptBatch, policy_version: int) -> _Pending | None:
        ahead, self._ahead = self._ahead, None
        if ahead is None:
            return None
        sampled = ahead.trajectories
        is_same = (sampled.batch.ids, sampled.batch.epoch) == (batch.ids, batch.epoch)
        age = policy_version - sampled.policy_version
        if is_same and age <= self.config.max_staleness:
            return ahead
        logger.warning(
            "the chunk sampled ahead is discarded: %s",
            f"{age} updates old" if is_same else "other prompts come next",
        )
        for future in ahead.futures.values():
            future.cancel()
        return None

    def _start(self, batch: PromptBatch, policy_version: int) -> _Pending:
        """Samples, decodes and submits one chunk."""
        began = time.perf_counter()
        trajectories = self.sample(batch, policy_version)
        sampled = time.perf_counter()
        seconds = {"sampling": sampled - began, "decoding": 0.0}
        futures: dict[str, Future[Judgement]] = {}
        failures: dict[str, str] = {}
        if not self.judges:
            return _Pending(trajectories, futures, failures, seconds, sampled)
        request = self._request(trajectories)
        submitted = time.perf_counter()
        seconds["decoding"] = submitted - sampled
        pending = _Pending(trajectories, futures, failures, seconds, submitted)
        for name, submit in self.judges.items():
            try:
                future = submit(request)
            except Exception as error:
                failures[name] = _reason(error)
                continue
            futures[name] = future
            future.add_done_callback(_note_time(pending.answered, name))
        return pending

    def _request(self, trajectories: Trajectories) -> JudgeRequest:
        batch, candidates = trajectories.batch, trajectories.candidates
        images = self.policy.decode(trajectories.final.nan_to_num(0.0))
        return JudgeRequest(
            prompt_ids=batch.ids,
            prompts=batch.prompts,
            images=_groups(images, candidates),
            sources=batch.sources,
            metadata=batch.metadata or tuple({} for _ in batch.ids),
        )

    def _finish(self, pending: _Pending) -> JudgedChunk:
        """Waits for a chunk's judgements."""
        began = time.perf_counter()
        trajectories = pending.trajectories
        shape = (len(trajectories.batch), trajectories.candidates)
        judgements: dict[str, Judgement] = {}
        for name in self.judges:
            future = pending.futures.get(name)
            if future is not None:
                timeout = self.config.timeout_of(name)
                left = max(0.0, began + timeout - time.perf_counter())
                try:
                    judgement = future.result(timeout=left)
                    if judgement.group_shape != shape:
                        raise ValueError(f"judged {judgement.group_shape} (P, G) of {shape}")
                    judgements[name] = judgement
                except TimeoutError:
                    future.cancel()
                    pending.failures[name] = f"no answer within {timeout} s"
                except Exception as error:
                    pending.failures[name] = _reason(error)
            if name not in judgements:
                logger.warning("judge %s failed for a chunk: %s", name, pending.failures[name])
                judgements[name] = Judgement(wins=_blank_wins(*shape))
        judgements = {n: _without_failed(j, trajectories.finite) for n, j in judgements.items()}
        seconds = dict(pending.seconds)
        seconds["waiting"] = time.perf_counter() - began
        answer = max(pending.answered.values(), default=self._last_answer)
        # A chunk that queued behind the one before is not being judged yet.
        seconds["judging"] = max(0.0, answer - max(pending.submitted, self._last_answer))
        self._last_answer = max(self._last_answer, answer)
        return JudgedChunk(trajectories, judgements, dict(pending.failures), seconds)


RolloutStep = Callable[
    [Tensor, Tensor, StepCoefficients, Tensor, Conditions], tuple[Tensor, Tensor, Tensor]
]


def rollout_step(policy: Policy, config: SamplingConfig, *, compile: bool) -> RolloutStep:
    """Policy forward and SDE step as one function, or one graph, for every step of a schedule.

    Returns:
        (latents, times, coefficients, seeds, conditions) -> (next latents, log_prob, velocity).
    """

    def forward(
        latents: Tensor,
        times: Tensor,
        coefficients: StepCoefficients,
        seeds: Tensor,
        conditions: Conditions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        velocity = policy.velocity(latents, times, conditions)
        next_latents, log_prob = sde_step(
            latents,
            velocity,
            coefficients,
            seed=seeds,
            normalised=config.normalised,
            impl=config.impl,
        )
        return next_latents, log_prob, velocity

    if not compile:
        return forward
    compiled: RolloutStep = torch.compile(forward, fullgraph=True, dynamic=False)
    return compiled


def hidden_share(chunks: Sequence[JudgedChunk]) -> float:
    """The share of judging that sampling hid: 1 - waiting / judging; 1 without judging."""
    judging = sum(chunk.seconds.get("judging", 0.0) for chunk in chunks)
    waiting = sum(chunk.seconds.get("waiting", 0.0) for chunk in chunks)
    return 1.0 if judging == 0 else max(0.0, 1.0 - waiting / judging)


def _groups(images: Sequence[Image.Image], candidates: int) -> tuple[tuple[Image.Image, ...], ...]:
    return tuple(
        tuple(images[start : start + candidates]) for start in range(0, len(images), candidates)
    )


def _note_time(answered: dict[str, float], name: str) -> Callable[[Future[Judgement]], None]:
    def note(_: Future[Judgement]) -> None:
        answered[name] = time.perf_counter()

    return note


def _blank_wins(prompts: int, candidates: int) -> Tensor:
    wins = torch.full((prompts, candidates, candidates), float("nan"))
    wins.diagonal(dim1=1, dim2=2).zero_()
    return wins


def _without_failed(judgement: Judgement, finite: Tensor) -> Judgement:
    """Takes verdicts away from prompts with latents that are not finite: no evidence."""
    if bool(finite.all()):
        return judgement
    bad = ~finite
    errors = (*judgement.errors, f"{int(bad.sum())} prompts have latents that are not finite")
    if judgement.scores is not None:
        scores = judgement.scores.masked_fill(bad[:, None], float("nan"))
        return replace(judgement, scores=scores, errors=errors)
    assert judgement.wins is not None
    wins = judgement.wins.clone()
    wins[bad] = _blank_wins(int(bad.sum()), wins.shape[1])
    return replace(judgement, wins=wins, errors=errors)


def _reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
