"""Every verdict equals an independent plain transformers forward over its path (float32).

The oracle, `Replayer`, gets token ids and images only; it computes pixels, positions, features and
full logits by itself. DESIGN: |delta log-odds| <= 1e-4, and no flip where |log-odds| > 2e-4.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from arr_fast.engine import planner, runner
from arr_fast.judge import Judge
from arr_fast.replay import Replayer
from arr_fast.trace import VerdictTrace
from tests.engine import scenes

TOLERANCE = 1e-4

# Two checkpoints per family: GQA 1:1 to 8:1, tied and untied embeddings, two head dims.
CHECKPOINTS = {
    "qwen2_vl": ("heads=4,kv_heads=4,head_dim=32", "heads=8,kv_heads=1,tied=true,seed=1"),
    "qwen2_5_vl": ("heads=4,kv_heads=2", "heads=6,kv_heads=2,head_dim=16,tied=true,seed=1"),
    "qwen3_vl": ("heads=8,kv_heads=2,tied=true", "heads=4,kv_heads=4,head_dim=64,seed=1"),
    "qwen3_vl_moe": ("heads=4,kv_heads=2", "heads=8,kv_heads=1,head_dim=16,seed=1"),
    "smolvlm": ("heads=3,kv_heads=1,head_dim=32", "heads=4,kv_heads=4,tied=true,seed=1"),
    "llava_onevision": ("heads=4,kv_heads=2", "heads=8,kv_heads=1,head_dim=16,seed=1"),
}
CASES = [
    pytest.param(f"random:{family}-tiny[{options}]", id=f"{family}-{options}")
    for family, both in CHECKPOINTS.items()
    for options in both
]


@pytest.fixture(scope="module")
def judge(request: pytest.FixtureRequest) -> Judge:
    return Judge.from_pretrained(request.param, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def replayer(judge: Judge) -> Replayer:
    return Replayer.from_pretrained(judge.engine.loaded.path)


def all_traces(judge: Judge) -> list[VerdictTrace]:
    """About 260 verdicts: odd, equal and unequal images, ragged K, edit, pointwise, holistic."""
    a, b = scenes.image(90, 130, 1), scenes.image(64, 64, 2)
    wide, tall = scenes.image(112, 168, 3), scenes.image(168, 112, 4)
    traces = judge.trace(["a red circle left of a blue square"], [a], [b], scenes.rubric(64))
    traces += judge.trace(
        ["naïve café 日本語 🎨 <|im_end|>", "wide against tall", "same size"],
        [a, wide, wide],
        [b, tall, scenes.image(112, 168, 5)],
        [scenes.rubric(1), scenes.rubric(20, seed=1), scenes.rubric(2, longest=150)],
        mode="both",
    )
    edit = scenes.rubric(20, task="edit")
    traces += judge.trace(["make it red"], [a], [b], edit, sources=[tall])
    traces += judge.trace(["one image"], [tall], None, scenes.rubric(20))
    traces += judge.trace(["edit it"], [wide], None, edit, sources=[b])
    return traces


def assert_close(traces: list[VerdictTrace], replayer: Replayer) -> None:
    """Holds every trace to the contract; for MoE, near-ties of the router are left out."""
    is_moe = replayer.model.config.model_type == "qwen3_vl_moe"
    excluded = 0
    for trace in traces:
        expected = replayer.log_odds(trace)
        difference = abs(trace.log_odds - expected)
        if is_moe and difference > TOLERANCE and replayer.router_gaps(trace) < 1e-5:
            excluded += 1
            continue
        where = f"{trace.criterion} {trace.order} item {trace.item}"
        assert difference <= TOLERANCE, f"{where}: {trace.log_odds} against {expected}"
        if abs(expected) > 2 * TOLERANCE:
            assert (trace.log_odds > 0) == (expected > 0), where
    assert excluded <= 0.05 * len(traces)


@pytest.mark.parametrize("judge", CASES, indirect=True)
def test_verdicts_equal_plain_transformers(judge: Judge, replayer: Replayer) -> None:
    traces = all_traces(judge)
    assert len(traces) >= 250
    assert np.std([trace.log_odds for trace in traces]) >= 1.0
    assert_close(traces, replayer)


@pytest.mark.parametrize("judge", [CASES[4], CASES[8]], indirect=True)
def test_batched_cached_and_split_equal_single(judge: Judge) -> None:
    prompts = ["first caption", "second caption", "third"]
    left = [scenes.image(70 + 30 * i, 100, i) for i in range(3)]
    right = [scenes.image(64, 90 + 20 * i, 10 + i) for i in range(3)]
    rubric = scenes.rubric(12)
    judge.engine.clear_caches()
    together = judge.compare(prompts, left, right, rubric)
    again = judge.compare(prompts, left, right, rubric)
    assert judge.engine.pool.stats.hits > 0
    assert judge.engine.features_cache.stats.hits >= 6
    np.testing.assert_allclose(again.preference, together.preference, atol=TOLERANCE)
    for i in range(3):
        judge.engine.clear_caches()
        alone = judge.compare(prompts[i : i + 1], left[i : i + 1], right[i : i + 1], rubric)
        np.testing.assert_allclose(
            alone.preference[0], together.preference[i], atol=TOLERANCE, err_msg=f"pair {i}"
        )
    small = dataclasses.replace(judge.engine.config, max_batch_rows=200)
    judge.engine.config, kept = small, judge.engine.config
    before = judge.engine.counters.forwards
    chunked = judge.compare(prompts, left, right, rubric)
    judge.engine.config = kept
    assert judge.engine.counters.forwards - before >= 3
    np.testing.assert_allclose(chunked.preference, together.preference, atol=TOLERANCE)


@pytest.mark.parametrize("judge", [CASES[2]], indirect=True)
def test_groups_equal_their_pairs(judge: Judge) -> None:
    group = [scenes.image(64 + 16 * i, 96, i) for i in range(4)]
    rubric = scenes.rubric(5)
    ranked = judge.rank(["a caption"], [group], rubric)
    for place, (_, i, j) in enumerate(ranked.pair_index):
        pair = judge.compare(["a caption"], [group[i]], [group[j]], rubric)
        np.testing.assert_allclose(
            ranked.pairs.preference[place], pair.preference[0], atol=TOLERANCE
        )


@pytest.mark.parametrize("judge", [CASES[4]], indirect=True)
def test_cached_image_prefixes_are_exact(judge: Judge, replayer: Replayer) -> None:
    args = (["a caption"], [scenes.image(180, 240, 1)], [scenes.image(160, 192, 2)])
    computed = {}
    for mode in ("off", "images"):
        keeping = Judge.from_pretrained(judge.engine.loaded.path, prefix_cache=mode)
        keeping.trace(*args, scenes.rubric(3))
        before = keeping.engine.counters.rows
        traces = keeping.trace(*args, scenes.rubric(6, seed=9))
        computed[mode] = keeping.engine.counters.rows - before
    # Both orders' images come from the pool, but for the last partial block of each.
    shared = traces[0].input_ids.size - len(judge.engine.prompts.encode([""], [])[-1].ids)
    assert computed["off"] - computed["images"] > shared
    assert_close(traces, replayer)


@pytest.mark.parametrize("judge", [CASES[4]], indirect=True)
@pytest.mark.parametrize("breakage", ["mask", "position", "cache_key"])
def test_the_oracle_catches(
    judge: Judge, replayer: Replayer, breakage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong mask, position or cache key is seen by the comparison above."""
    args = (["a caption"], [scenes.image(90, 120, 1)], [scenes.image(64, 96, 2)])
    judge.engine.clear_caches()
    if breakage == "mask":
        # Siblings see each other: every leaf's own part starts at its group's first row.
        original = runner.ForestRunner._tables

        def widened(self, forest, total, store):  # type: ignore[no-untyped-def]
            own = forest.own_start.copy()
            for first, end, _, _ in forest.groups:
                own[first:end] = first
            return original(self, dataclasses.replace(forest, own_start=own), total, store)

        monkeypatch.setattr(runner.ForestRunner, "_tables", widened)
    elif breakage == "position":
        # Positions run on over siblings in place of restarting at the parent's end.
        original_run = runner.ForestRunner.run

        def shifted(self, forest, *rest):  # type: ignore[no-untyped-def]
            moved = forest.positions + np.where(forest.row_segment > 0, 1, 0)
            return original_run(self, dataclasses.replace(forest, positions=moved), *rest)

        monkeypatch.setattr(runner.ForestRunner, "run", shifted)
    else:
        # The pool's keys forget everything but the salt and the block's number.
        monkeypatch.setattr(
            planner,
            "chain_keys",
            lambda ids, positions, salt, images: [
                salt + bytes([n]) for n in range(len(ids) // planner.BLOCK)
            ],
        )
        # A single image is asked about in other words, before the image as after it.
        judge.trace(["a caption"], args[1], rubric=scenes.rubric(2))
    traces = judge.trace(*args, scenes.rubric(6))
    judge.engine.clear_caches()
    with pytest.raises(AssertionError):
        assert_close(traces, replayer)
