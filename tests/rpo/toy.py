"""A policy of 12 latents that runs in microseconds, and judges that are arithmetic on pixels."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from arr_fast.rpo.config import RunConfig, preset_config
from arr_fast.rpo.judging import Judgement, JudgeRequest
from arr_fast.rpo.prompts import Prompt
from arr_fast.rpo.trainer import Parts

LATENT = (4, 3)


class ToyPolicy:
    """v = MLP(latents, sigma, prompt); pictures of 2 x 2 pixels, one latent per channel."""

    name = "toy"
    latent_shape = LATENT
    device = torch.device("cpu")

    def __init__(self, seed: int = 0) -> None:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.module: nn.Module = nn.Sequential(
                nn.Linear(12 + 1 + 4, 16), nn.Tanh(), nn.Linear(16, 12)
            )
        self.trained = self.module
        self.frozen = copy.deepcopy(self.module).requires_grad_(False)
        self.encoded = 0

    def encode(self, prompts: Sequence[str], sources: object = None) -> dict[str, Tensor]:
        self.encoded += len(prompts)
        rows = [np.random.default_rng(abs(hash_text(p))).standard_normal(4) for p in prompts]
        return {"text": torch.tensor(np.stack(rows), dtype=torch.float32)}

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: dict[str, Tensor]) -> Tensor:
        rows = torch.cat([latents.flatten(1), sigma[:, None], conditions["text"]], 1)
        return self.module(rows).view_as(latents)

    @contextmanager
    def reference(self) -> Iterator[None]:
        self.module = self.frozen
        try:
            yield
        finally:
            self.module = self.trained

    def decode(self, latents: Tensor) -> list[Image.Image]:
        pixels = (latents.view(-1, 2, 2, 3).clamp(-2, 2) + 2) * 63.75
        return [Image.fromarray(p) for p in pixels.round().to(torch.uint8).numpy()]

    def sigmas(self, steps: int) -> Tensor:
        return torch.linspace(1, 0, steps + 1, dtype=torch.float64)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.trained.named_parameters())

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        return {}

    def save(self, directory: Path) -> None:
        torch.save(self.trained.state_dict(), directory / "toy.pt")

    def load(self, directory: Path) -> None:
        self.trained.load_state_dict(torch.load(directory / "toy.pt", weights_only=True))


def hash_text(text: str) -> int:
    return sum(ord(c) * 31**n for n, c in enumerate(text)) % 2**31


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
    return Parts(ToyPolicy(), {"rubric": judge}, rows, **settings)
