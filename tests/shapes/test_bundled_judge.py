"""The judge that ships: plain transformers loads it, and it tells pictures apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from arr_fast.judge import Judge
from arr_fast.rubric import Criterion, Rubric
from arr_fast.shapes import evaluate, judge_directory
from arr_fast.shapes.captions import describe
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import sample_scene


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained("builtin:shapes")


def faithful_pictures(count: int):
    """Captions with pictures that meet them, of held-out scenes."""
    for number in range(count):
        rng = np.random.default_rng([31, number])
        scene = sample_scene(rng, "held_out")
        yield describe(rng, scene).text(rng), scene


def test_plain_transformers_loads_every_weight():
    directory = judge_directory()
    assert (directory / "model.safetensors").stat().st_size < 20e6
    model, info = AutoModelForImageTextToText.from_pretrained(
        directory, output_loading_info=True, dtype=torch.float32
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.text_config.head_dim == 64
    assert all(p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("what", ["blank", "noise"])
def test_a_picture_of_nothing_loses_to_a_faithful_one(judge: Judge, what: str):
    captions, good, empty = [], [], []
    for caption, scene in faithful_pictures(24):
        captions.append(caption)
        good.append(render(scene))
        bare = replace(scene, objects=()) if what == "blank" else replace(scene, noise=1.0)
        empty.append(render(bare))
    texts = ("Every object in the caption is present.", "The image matches the caption.")
    criteria = tuple(Criterion(id=f"c{i}", text=text) for i, text in enumerate(texts))
    rubric = Rubric(name="faithful", task="t2i", criteria=criteria)
    verdicts = judge.compare(captions, good, empty, rubric)
    losses = [c for c, p in zip(captions, verdicts.probability, strict=True) if p <= 0.5]
    assert not losses


def test_held_out_scenes_are_judged_well_above_chance(judge: Judge):
    """A floor under a sample of what `python -m arr_fast.shapes.evaluate` measures in full."""
    examples = evaluate.make_examples(seed=7, count=100)
    pairs = evaluate.pair_records(judge, examples)
    points = evaluate.point_records(judge, examples)
    figures = evaluate.summarise(pairs, points, [])
    assert figures["pairwise"]["criteria"] > 400
    assert figures["pairwise"]["accuracy_both"] > 0.95
    assert figures["pointwise"]["accuracy"] > 0.95
