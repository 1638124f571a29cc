"""Workloads: token counts are exact, inputs repeat, names are read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

from arr_fast.bench.plain_prompts import PlainPrompts
from arr_fast.bench.workloads import Workload, build_inputs, exact_text, named


@pytest.fixture(scope="module")
def prompts(tiny_qwen3: str) -> PlainPrompts:
    return PlainPrompts(
        AutoTokenizer.from_pretrained(tiny_qwen3),
        AutoConfig.from_pretrained(tiny_qwen3),
        AutoImageProcessor.from_pretrained(tiny_qwen3, backend="pil"),
    )


@pytest.mark.parametrize(
    ("prefix", "leaf", "criteria"), [(100, 13, 20), (137, 24, 7), (99, 6, 2), (None, 200, 3)]
)
def test_token_counts_are_exact(
    prefix: int | None, leaf: int, criteria: int, prompts: PlainPrompts
) -> None:
    workload = Workload(
        "test", 2, height=64, width=128, criteria=criteria, leaf_tokens=leaf, prefix_tokens=prefix
    )
    inputs = build_inputs(workload, prompts)
    for item in range(2):
        sequences = np.stack(inputs.sequences(prompts, item, (0, 1)))
        shared = int(np.flatnonzero(np.ptp(sequences, axis=0))[0])
        assert sequences.shape == (criteria, shared + leaf)
        if prefix is not None:
            assert shared == prefix
        image_ids = (sequences[0] == prompts.config.image_token_id).sum()
        assert image_ids == 2 * (64 // 32) * (128 // 32)


def test_inputs_repeat_and_follow_the_seed(prompts: PlainPrompts) -> None:
    workload = named("smoke-K4")
    first, again = build_inputs(workload, prompts), build_inputs(workload, prompts)
    assert first.criteria == again.criteria
    assert first.captions == again.captions
    assert [i.content_hash for i in first.images[0]] == [i.content_hash for i in again.images[0]]
    other = build_inputs(replace(workload, seed=1), prompts)
    assert other.criteria != first.criteria
    assert other.images[0][0].content_hash != first.images[0][0].content_hash
    assert first.images[0][0].content_hash != first.images[0][1].content_hash


def test_impossible_counts_are_refused(prompts: PlainPrompts) -> None:
    with pytest.raises(ValueError, match="close it"):
        build_inputs(Workload("x", height=64, width=64, leaf_tokens=3, prefix_tokens=None), prompts)
    with pytest.raises(ValueError, match="too short"):
        build_inputs(Workload("x", height=64, width=64, prefix_tokens=20), prompts)
    with pytest.raises(ValueError, match="cannot make"):
        exact_text(prompts, 1, np.random.default_rng(0), "x", first="unpronounceable")


def test_names() -> None:
    assert named("design9") == Workload()
    assert named("design9-2k-K1").prefix_tokens == 2000
    assert named("design9-2k-K1").criteria == 1
    cold = named("design9-cold-both")
    assert (cold.images, cold.legs) == ("cold", ((0, 1), (1, 0)))
    assert len(named("group4").legs) == 12
    assert named("group4-warm").verdicts == 240
    for bad in ("nothing", "design9-hot", "design9-Kx"):
        with pytest.raises(ValueError, match="unknown workload"):
            named(bad)
    with pytest.raises(ValueError, match="criteria must be at least 1"):
        Workload(criteria=0)
