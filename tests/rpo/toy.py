"""A policy of 12 latents that runs in microseconds, and judges that are arithmetic on pixels."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from arr_fast.rpo.config import RunConfig, preset_config
from arr_fast.rpo.judging import Judgement, JudgeRequest
from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.prompts import Prompt
from arr_fast.rpo.trainer import Parts
from tests.rpo.toy_policy import ToyPolicy

LATENT = (4, 3)


class PaintingPolicy(ToyPolicy):
    """The toy whose latents are the pixels of a 2 x 2 picture."""

    def __init__(self) -> None:
        super().__init__(LATENT)
        self.encoded = 0

    def encode(
        self, prompts: Sequence[str], sources: Sequence[Image.Image] | None = None
    ) -> Conditions:
        self.encoded += len(prompts)
        return super().encode(prompts, sources)

    def decode(self, latents: Tensor) -> list[Image.Image]:
        pixels = (latents.view(-1, 2, 2, 3).clamp(-2, 2) + 2) * 63.75
        return [Image.fromarray(p) for p in pixels.round().to(torch.uint8).numpy()]


def brightness(image: Image.Image) -> float:
    return float(np.asarray(image).mean())


def done(judgement: Judgement) -> Future[Judgement]:
    future: Future[Judgement] = Future()
    future.set_result(judgement)
    return future


def bright_judge(request: JudgeRequest) -> Future[Judgement]:
    """The brighter candidate wins."""
    signs = [float(np.sign(brightness(a) - brightness(b))) for a, b in request.images]
    return done(Judgement.from_pairs(signs, metrics={"bias": 0.0}, counts={"bias": len(signs)}))


def tied_judge(request: JudgeRequest) -> Future[Judgement]:
    return done(Judgement.from_pairs([0.0] * len(request.images)))


def broken_judge(request: JudgeRequest) -> Future[Judgement]:
    raise ConnectionError("no route to judge")


def mean_brightness(prompts, images, sources=None, metadata=None) -> list[float]:
    return [brightness(image) for image in images]


def toy_config(output: Path, **overrides) -> RunConfig:
    """A run of seconds."""
    base = {
        "output": str(output),
        "iterations": 6,
        "compile": False,
        "trackers": [],
        "micro_batch": 16,
        "sampler": {"steps": 4, "trained": 2, "window": 3},
        "rollout": {"pairs": 8, "chunks": 2},
        "optimiser": {"lr": 1e-2},
        "evaluation": {"every": 3, "grid": 2, "evaluator": None, "steps": 2},
        "checkpoint": {"every": 2},
    }
    for key, value in overrides.items():
        old = base.get(key)
        base[key] = {**old, **value} if isinstance(old, dict) else value
    return preset_config("recommended", **base)


def toy_parts(judge=bright_judge, prompts: int = 20, **other) -> Parts:
    rows = [Prompt(number, f"prompt {number}") for number in range(prompts)]
    held = [Prompt(number, f"held out {number}") for number in range(4)]
    settings = {"held_out": held, "evaluator": mean_brightness, "rubric_hash": "abc", **other}
    return Parts(PaintingPolicy(), {"rubric": judge}, rows, **settings)
