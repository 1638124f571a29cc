"""A shapes generator of two narrow blocks, saved where `builtin:shapes` would be."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import numpy as np
import torch

from arr_fast.rpo.judging import Judgement, JudgeRequest
from arr_fast.shapes.generator import ShapesGenerator
from arr_fast.shapes.generator_data import GeneratorTask, sample_item
from arr_fast.shapes.latents import PatchCode
from arr_fast.shapes.render import render

SMALL = {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 1}


def small_code() -> PatchCode:
    rng = np.random.default_rng(3)
    return PatchCode.fit([render(sample_item(rng, "t2i").target) for _ in range(40)])


def small_generator(task: GeneratorTask = "t2i", *, moves: bool = True) -> ShapesGenerator:
    """With a last layer that is not zero, unless `moves` is False."""
    generator = ShapesGenerator(task, sizes=SMALL)
    if moves:
        torch.manual_seed(1)
        torch.nn.init.normal_(generator.transformer.proj_out.weight, std=0.3)
    return generator


def save_small(directory: Path, task: GeneratorTask = "t2i") -> Path:
    small_generator(task).save(directory, small_code())
    return directory


def red_judge():
    """A factory for `judges.NAME.call`: the redder candidate wins."""

    def judge(request: JudgeRequest) -> Future[Judgement]:
        red = [[float(np.asarray(i)[..., 0].mean()) for i in pair] for pair in request.images]
        future: Future[Judgement] = Future()
        future.set_result(Judgement.from_pairs([float(np.sign(a - b)) for a, b in red]))
        return future

    return judge


def failing_judge():
    """A factory of a judge that never answers."""

    def judge(request: JudgeRequest) -> Future[Judgement]:
        raise TimeoutError("the judge is on holiday")

    return judge
