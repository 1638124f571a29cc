"""Training: resumes to the bit, learns, and its curve has no rows of lost steps."""

from __future__ import annotations

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from arr_fast import shapes
from arr_fast.shapes import train_judge
from arr_fast.shapes.export_judge import export
from arr_fast.shapes.model import build_model
from arr_fast.shapes.optimise import orthogonalise
from arr_fast.shapes.run_state import Curve, load_state, save_state
from arr_fast.shapes.tokenizer import build_tokenizer
from arr_fast.shapes.train_judge import Plan, work
from arr_fast.shapes.workers import Interrupted, start

TINY = Plan(
    seed=3,
    vision_steps=2,
    vision_batch=3,
    reading_steps=1,
    reading_rows=1,
    judge_steps=3,
    whole_steps=3,
    judge_rows=1,
    workers=1,
    every=1,
    vision_check=8,
    judge_check=8,
)


def train(out: Path, plan: Plan, resume: bool) -> None:
    start(work, 1, out / "meeting", out, plan, resume)


def test_a_resumed_run_equals_a_straight_one_to_the_bit(tmp_path, monkeypatch):
    train(tmp_path / "straight", TINY, False)
    original, calls = train_judge.average_gradients, []

    def stopping(parameters, flags):
        calls.append(1)
        flags = [*flags[:-1], 1.0] if len(calls) in (1, 5, 7) else flags
        return original(parameters, flags)

    monkeypatch.setattr(train_judge, "average_gradients", stopping)
    with pytest.raises(Interrupted, match="step 1 of vision"):
        train(tmp_path / "broken", TINY, False)
    with pytest.raises(Interrupted, match="step 2 of judge"):
        train(tmp_path / "broken", TINY, True)
    with pytest.raises(Interrupted, match="step 1 of whole"):
        train(tmp_path / "broken", TINY, True)
    train(tmp_path / "broken", TINY, True)
    one, two = (load_state(tmp_path / n / "state.pt") for n in ("straight", "broken"))
    assert (one["stage"], one["step"]) == (two["stage"], two["step"]) == ("whole", 3)
    for name, weight in one["model"].items():
        assert torch.equal(weight, two["model"][name]), name
    assert_same(one["optimiser"], two["optimiser"])
    rows = []
    for name in ("straight", "broken"):
        with (tmp_path / name / "curve.csv").open() as file:
            rows.append([{**r, "cpu_seconds": ""} for r in csv.DictReader(file)])
    assert rows[0] == rows[1]


def assert_same(one, two) -> None:
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_same(a, b)
    else:
        assert one == two


def test_the_last_stage_goes_on_from_a_checkpoint(tmp_path):
    judge = shapes.judge_directory()
    start(work, 1, tmp_path / "meeting", tmp_path, TINY, False, judge)
    state = load_state(tmp_path / "state.pt")
    assert (state["stage"], state["step"]) == ("whole", 3)
    before, name = load_file(judge / "model.safetensors"), "model.visual.merger.linear_fc2.weight"
    moved = (state["model"][name] - before[name].float()).abs().max()
    assert 0 < moved < 0.05
    with pytest.raises(FileNotFoundError):
        start(work, 1, tmp_path / "meeting", tmp_path / "other", TINY, False, tmp_path / "none")


def test_another_seed_gives_another_model(tmp_path):
    short = replace(TINY, vision_steps=1, judge_steps=1, whole_steps=1)
    train(tmp_path / "a", short, False)
    train(tmp_path / "b", replace(short, seed=4), False)
    one, two = (load_state(tmp_path / n / "state.pt")["model"] for n in ("a", "b"))
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    assert not torch.equal(one[name], two[name])


def test_a_crash_while_saving_leaves_the_previous_state(tmp_path, monkeypatch):
    path = tmp_path / "state.pt"
    save_state(path, {"step": 1})

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        save_state(path, {"step": 2})
    assert load_state(path) == {"step": 1}
    assert load_state(tmp_path / "none.pt") is None


def test_the_curve_drops_rows_beyond_the_state(tmp_path):
    curve = Curve(tmp_path / "curve.csv")
    for step in (1, 2, 3):
        curve.add("judge", step, "train", {"loss": 1.0 / step})
    curve.add("vision", 9, "train", {"loss": 1.0})
    curve.truncate("judge", 2)
    with curve.path.open() as file:
        assert [(r["stage"], r["step"]) for r in csv.DictReader(file)] == [
            ("judge", "1"),
            ("judge", "2"),
            ("vision", "9"),
        ]


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (8, 8)])
def test_orthogonalise_brings_singular_values_near_one(shape):
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalise(torch.randn(shape)))
    assert values.min() > 0.5 and values.max() < 1.5


def test_several_runs_are_exported_as_their_mean(tmp_path):
    model = build_model(build_tokenizer(), 0).state_dict()
    name = "model.language_model.layers.0.mlp.up_proj.weight"
    for run, shift in (("a", 0.0), ("b", 0.5)):
        moved = {**model, name: model[name] + shift}
        save_state(
            tmp_path / run / "state.pt",
            {"model": moved, "stage": "whole", "step": 3, "cpu_seconds": 1},
        )
    said = export([tmp_path / "a", tmp_path / "b"], tmp_path / "judge")
    assert said.count("whole step 3") == 2
    saved = load_file(tmp_path / "judge" / "model.safetensors")
    torch.testing.assert_close(saved[name].float(), model[name] + 0.25, rtol=1e-3, atol=1e-6)
    export([tmp_path / "b"], tmp_path / "alone")
    alone = load_file(tmp_path / "alone" / "model.safetensors")
    assert torch.equal(alone[name], (model[name] + 0.5).half())
    export([tmp_path / "alone", tmp_path / "a"], tmp_path / "gone_on")
    saved = load_file(tmp_path / "gone_on" / "model.safetensors")
    torch.testing.assert_close(saved[name].float(), model[name] + 0.25, rtol=1e-3, atol=1e-6)
    assert alone.keys() == saved.keys()
    with pytest.raises(FileNotFoundError, match=r"c holds neither state\.pt nor model"):
        export([tmp_path / "a", tmp_path / "c"], tmp_path / "none")
