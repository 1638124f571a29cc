"""Held-out evaluation at fixed seeds, by something other than the reward.

The evaluator is a callable that the configuration names. What it says is logged and may raise an
alarm; it never touches gradients, stopping, or the choice of a checkpoint. The reward on the same
images is the judges' win rate against the reference policy's images of the same noise.
"""

from __future__ import annotations

import importlib
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image

from arr_fast.errors import ConfigError
from arr_fast.rpo.generation import generate_images
from arr_fast.rpo.judging import JudgeRequest, SubmitJudge
from arr_fast.rpo.policies.base import Policy
from arr_fast.rpo.prompts import Prompt, source_images
from arr_fast.rpo.sde import Schedule

logger = logging.getLogger("arr_fast")

# (prompts, images, sources, metadata) -> one number per image, higher is better.
Evaluator = Callable[..., Sequence[float]]


def load_callable(name: str) -> Any:
    """Imports "package.module:attribute".

    Raises:
        ConfigError: It is not of that form, or cannot be imported.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ConfigError(f"{name!r} is not of the form package.module:callable")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        raise ConfigError(f"cannot import {name!r}: {error}") from error


@dataclass
class Evaluation:
    """Evaluates a policy on fixed prompts.

    Attributes:
        prompts: Held-out ones.
        schedule: Of the evaluation's sampler.
        seed: Of its noise.
        evaluator: See `Evaluator`; None evaluates by the reward alone.
        judges: The rewards, for the win rate against the reference policy.
        alarm: Over how many evaluations reward and evaluator are compared.
        timeout: Seconds to wait for a judge.
        history: (reward, evaluator) of the evaluations so far, weights without EMA.
    """

    prompts: Sequence[Prompt]
    schedule: Schedule
    seed: int
    evaluator: Evaluator | None
    judges: Mapping[str, SubmitJudge]
    alarm: int
    timeout: float = 600.0
    history: list[tuple[float, float]] = field(default_factory=list)
    _base: list[Image.Image] = field(default_factory=list)

    def run(
        self, policy: Policy, averaged: Callable[[], AbstractContextManager[None]] | None
    ) -> dict[str, float]:
        """Evaluates the weights as they are, and their average.

        Args:
            policy: The generator.
            averaged: Context in which the policy has its averaged weights, or None.

        Returns:
            Numbers to log; `alarm` is 1 where the reward rose while the evaluator fell.
        """
        if not self._base:
            with policy.reference():
                self._base = self._images(policy)
        numbers: dict[str, float] = {}
        variants: dict[str, Callable[[], AbstractContextManager[None]]] = {"": nullcontext}
        if averaged is not None:
            variants["ema_"] = averaged
        for prefix, context in variants.items():
            with context():
                images = self._images(policy)
            numbers[f"{prefix}reward"] = self._win_rate(images)
            if self.evaluator is not None:
                numbers[f"{prefix}evaluator"] = self._evaluated(images)
        if self.evaluator is not None:
            if "evaluator_base" not in numbers:
                numbers["evaluator_base"] = self._evaluated(self._base)
            self.history.append((numbers["reward"], numbers["evaluator"]))
            numbers["alarm"] = float(diverges(self.history, self.alarm))
        return numbers

    def _images(self, policy: Policy) -> list[Image.Image]:
        texts = [prompt.text for prompt in self.prompts]
        ids = [prompt.id for prompt in self.prompts]
        return generate_images(policy, texts, self._sources(), ids, self.schedule, seed=self.seed)

    def _sources(self) -> list[Image.Image] | None:
        return source_images(self.prompts)

    def _evaluated(self, images: list[Image.Image]) -> float:
        assert self.evaluator is not None
        texts = [prompt.text for prompt in self.prompts]
        metadata = [prompt.metadata for prompt in self.prompts]
        scores = self.evaluator(texts, images, self._sources(), metadata)
        if len(scores) != len(texts):
            raise ConfigError(
                f"the evaluator returned {len(scores)} numbers for {len(texts)} images"
            )
        return sum(float(score) for score in scores) / len(scores)

    def _win_rate(self, images: list[Image.Image]) -> float:
        """Share of prompts on which the images beat the base's; ties count half."""
        sources = self._sources()
        request = JudgeRequest(
            prompt_ids=tuple(prompt.id for prompt in self.prompts),
            prompts=tuple(prompt.text for prompt in self.prompts),
            images=tuple(zip(images, self._base, strict=True)),
            sources=None if sources is None else tuple(sources),
            metadata=tuple(prompt.metadata for prompt in self.prompts),
        )
        rates = []
        for name, submit in self.judges.items():
            try:
                judgement = submit(request).result(timeout=self.timeout)
            # An evaluation never stops a run; what fails here will fail in training as well.
            except Exception as error:
                logger.warning("judge %s gave no win rate: %s", name, error)
                continue
            if judgement.wins is not None:
                sign = judgement.wins[:, 0, 1]
            else:
                assert judgement.scores is not None
                sign = (judgement.scores[:, 0] - judgement.scores[:, 1]).sign()
            known = sign[~torch.isnan(sign)]
            if len(known):
                rates.append(float((known + 1).mean()) / 2)
        return sum(rates) / len(rates) if rates else math.nan


def diverges(history: Sequence[tuple[float, float]], window: int) -> bool:
    """Whether, over the last `window` evaluations, the reward rose and the evaluator fell.

    Both by the sign of the least-squares slope, so that one noisy evaluation decides nothing.
    """
    recent = list(history)[-window:]
    if len(recent) < window or any(math.isnan(value) for pair in recent for value in pair):
        return False
    middle = (len(recent) - 1) / 2
    slopes = [sum((n - middle) * pair[k] for n, pair in enumerate(recent)) for k in (0, 1)]
    return slopes[0] > 1e-9 and slopes[1] < -1e-9
