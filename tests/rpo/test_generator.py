"""The shapes generator: its data, its latents, its training, and the policy on it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from arr_fast.errors import ArrFastError
from arr_fast.rpo.policies.base import Policy
from arr_fast.rpo.policies.diffusers_policy import LoraOptions
from arr_fast.rpo.policies.shapes import ShapesPolicy
from arr_fast.rubric import Rubric
from arr_fast.shapes import generator_data, generator_directory, train_generator
from arr_fast.shapes.caption_reading import read_caption
from arr_fast.shapes.captions import Caption
from arr_fast.shapes.generator import ShapesGenerator, word_ids
from arr_fast.shapes.generator_data import (
    MARGIN,
    pair_split,
    sample_item,
    sample_prompts,
    scene_of,
)
from arr_fast.shapes.parser import satisfies, success
from arr_fast.shapes.render import render
from arr_fast.shapes.run_state import load_state
from arr_fast.shapes.train_generator import Plan, check_convergence, flow_loss, work
from arr_fast.shapes.workers import start
from tests.rpo.small_generator import small_code, small_generator

CODE = small_code()
TEXTS = ["a red circle and a blue square on a white background", "a green star and an orange ring"]


@pytest.mark.parametrize("kind", ["scene", "thing"])
def test_a_quarter_of_the_pictures_is_wrong(kind):
    rng = np.random.default_rng(0)
    items = [sample_item(rng, "t2i", "columns", kind) for _ in range(800)]
    wrong = [item for item in items if not item.is_right]
    assert 0.2 < len(wrong) / len(items) < 0.3
    for item in items:
        assert satisfies(item.target, read_caption(item.text)) == item.is_right
    differences = [_differences(item) for item in wrong]
    assert (set(differences) == {1}) if kind == "thing" else (np.mean(differences) > 2)


def _differences(item):
    """How many of colours, shapes and background are not the caption's, place by place."""
    caption, scene = read_caption(item.text), item.target
    pairs = [
        (said, shown)
        for kind, obj in zip(caption.kinds, scene.objects, strict=True)
        for said, shown in zip(kind, obj.kind, strict=True)
    ]
    pairs += [] if caption.background is None else [(caption.background, scene.background)]
    return sum(said != shown for said, shown in pairs)


def test_another_scene_is_never_the_scene_itself(monkeypatch):
    """Not even where the draw happens to repeat it."""
    kinds = (("red", "circle"), ("blue", "ring"))
    draws = [kinds, kinds, kinds, kinds[::-1]]
    backgrounds = iter(["white", "white", "black", "white"])
    monkeypatch.setattr(generator_data, "WRONG_SHARE", 1.0)
    monkeypatch.setattr(generator_data, "_kinds", lambda rng, split: draws.pop(0))
    monkeypatch.setattr(generator_data, "sample_background", lambda rng: next(backgrounds))
    item = sample_item(np.random.default_rng(0), "t2i")
    assert item.target.background == "black" and not item.is_right
    assert len(draws) == 1


@pytest.mark.parametrize(
    ("steps", "begun_at", "expected"), [(100, 0, 80), (100, 50, 80), (100, 80, 96), (100, 90, 98)]
)
def test_the_earlier_weights_are_those_at_80_percent(steps, begun_at, expected):
    assert Plan(steps=steps, begun_at=begun_at).earlier == expected


def test_wrong_edits_do_something_else():
    rng = np.random.default_rng(0)
    items = [sample_item(rng, "edit") for _ in range(40)]
    pictures = [[render(s) for s in (item.target, item.source)] for item in items]
    found = success([i.text for i in items], [a for a, _ in pictures], [b for _, b in pictures])
    assert [bool(value) for value in found] == [item.is_right for item in items]


def test_on_columns_objects_stand_in_the_order_of_the_caption():
    rng = np.random.default_rng(0)
    items = [sample_item(rng, "t2i") for _ in range(100)]
    right = [item for item in items if item.is_right]
    assert all(scene.objects[0].x < scene.objects[1].x for scene in (i.target for i in items))
    assert all(read_caption(i.text).kinds == tuple(o.kind for o in i.target.objects) for i in right)
    assert {o.y for item in items for o in item.target.objects} == {1 / 8, 3 / 8, 5 / 8, 7 / 8}
    kinds = (("red", "circle"), ("blue", "ring"), ("green", "cross"))
    with pytest.raises(ValueError, match="3 objects, expected at most 2"):
        scene_of(rng, kinds, "white")


def test_on_the_grid_objects_stand_anywhere_and_apart():
    rng = np.random.default_rng(0)
    kinds = (("red", "circle"), ("blue", "ring"), ("green", "cross"))
    scenes = [scene_of(rng, kinds, "white", "grid") for _ in range(60)]
    assert {o.x for scene in scenes for o in scene.objects} == {n / 8 for n in range(1, 8)}
    assert all(satisfies(scene, Caption(kinds, background="white")) for scene in scenes)
    gaps = [
        np.hypot(a.x - b.x, a.y - b.y) - a.radius - b.radius
        for scene in scenes
        for a, b in itertools.combinations(scene.objects, 2)
    ]
    assert min(gaps) >= 2 * MARGIN


def test_held_out_prompts_share_no_pair_of_objects_with_training():
    held = list(sample_prompts(300, seed=0, split="held_out", task="t2i"))
    assert len({prompt.text for prompt in held}) == 300
    assert {pair_split(read_caption(p.text).kinds) for p in held} == {"held_out"}
    rng = np.random.default_rng(0)
    texts = [sample_item(rng, "t2i").text for _ in range(300)]
    assert {pair_split(read_caption(text).kinds) for text in texts} == {"train"}


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_prompts_bring_a_valid_rubric_and_are_reproducible(task):
    first, again = (list(sample_prompts(20, seed=4, split="train", task=task)) for _ in "ab")
    assert [p.text for p in first] == [p.text for p in again]
    for prompt in first:
        assert Rubric(**prompt.rubric).task == task
        assert (prompt.source is not None) == (task == "edit")


def test_latents_keep_what_a_picture_shows():
    rng = np.random.default_rng(9)
    scenes = [sample_item(rng, "t2i") for _ in range(40)]
    latents = CODE.encode([render(item.target) for item in scenes])
    assert latents.shape == (40, 64, 48)
    assert 0.8 < float(latents.std()) < 1.2
    found = success([item.text for item in scenes], CODE.decode(latents))
    assert sum(bool(f) == item.is_right for f, item in zip(found, scenes, strict=True)) >= 38


def test_words_that_it_does_not_know_are_named():
    with pytest.raises(ValueError, match=r"prompts\[1\]: .*'teapot'"):
        word_ids(["a red circle", "a red teapot"])
    with pytest.raises(ValueError, match="0 words"):
        word_ids(["."])


def test_training_lowers_the_loss():
    generator = small_generator(moves=False)
    batch = train_generator.draw_batch(np.random.default_rng(0), CODE, "t2i", 8)
    optimiser = torch.optim.Adam(generator.parameters(), lr=3e-3)
    losses = []
    for _ in range(25):
        loss = flow_loss(generator, *batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


class Killed(Exception):
    pass


def test_pretraining_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(train_generator, "fit_code", lambda seed, layout, wrong: CODE)
    monkeypatch.setattr(
        train_generator, "ShapesGenerator", lambda task, seed: small_generator(task, moves=False)
    )
    plan = Plan(steps=4, batch=2, workers=1, every=2, check=2, warmup=2, compile=False)
    start(work, 1, tmp_path / "a" / "meeting", tmp_path / "a", plan, False)
    save = train_generator.Run._save

    def save_and_die(self, step):
        save(self, step)
        raise Killed

    monkeypatch.setattr(train_generator.Run, "_save", save_and_die)
    with pytest.raises(Killed):
        start(work, 1, tmp_path / "b" / "meeting", tmp_path / "b", plan, False)
    monkeypatch.setattr(train_generator.Run, "_save", save)
    start(work, 1, tmp_path / "b" / "meeting", tmp_path / "b", plan, True)
    straight, resumed = (load_state(tmp_path / name / "state.pt") for name in "ab")
    for part in ("model", "averaged"):
        for name, tensor in straight[part].items():
            assert torch.equal(tensor, resumed[part][name]), name
    rows = [(tmp_path / n / "curve.csv").read_text().count("\n") for n in "ab"]
    assert rows[0] == rows[1]


def test_resume_alone_goes_on_with_the_same_plan_and_code(tmp_path, monkeypatch, capsys):
    """Nothing has to be said again, latents keep their code, and another run is refused."""
    codes = iter([CODE, replace(CODE, scale=2 * CODE.scale)])
    monkeypatch.setattr(train_generator, "fit_code", lambda seed, layout, wrong: next(codes))
    monkeypatch.setattr(
        train_generator, "ShapesGenerator", lambda task, seed: small_generator(task, moves=False)
    )
    begun: list[Plan] = []

    def run(*options):
        monkeypatch.setattr("sys.argv", ["train_generator", "--out", str(tmp_path), *options])
        train_generator.main()
        begun.append(Plan(**load_state(tmp_path / "state.pt")["plan"]))

    size = ("--batch", "2", "--workers", "1", "--check", "2", "--no-compile", "--warmup", "2")
    run(*size, "--steps", "2", "--layout", "grid", "--wrong", "thing")
    run("--resume", "--steps", "4")
    assert begun[1] == replace(begun[0], steps=4)
    assert (begun[1].layout, begun[1].wrong, begun[1].batch) == ("grid", "thing", 2)
    _, code = ShapesGenerator.load(tmp_path / "last")
    assert torch.equal(code.scale, CODE.scale)
    with pytest.raises(SystemExit):
        run("--resume", "--layout", "columns")
    assert "has layout grid, got columns" in capsys.readouterr().err
    monkeypatch.setattr("sys.argv", ["train_generator", "--out", str(tmp_path / "x"), "--resume"])
    with pytest.raises(SystemExit):
        train_generator.main()
    assert "nothing to resume" in capsys.readouterr().err


@pytest.mark.parametrize(("task", "first"), [("t2i", 7), ("edit", 0)])
def test_pretraining_goes_on_from_a_saved_generator(tmp_path, task, first):
    """Its steps count where it learned the same task; an editor starts with what it knows."""
    trained = ShapesGenerator("t2i", 3)
    trained.save(tmp_path / "saved", CODE, step=7)
    plan = Plan(task=task, begun_at=train_generator.saved_step(tmp_path / "saved", task))
    run = train_generator.Run(tmp_path / "run", plan, False, 0, tmp_path / "saved")
    assert run.first == first
    assert torch.equal(run.code.basis, CODE.basis)
    for model in (run.generator, run.averaged):
        assert model.task == task
        assert len(model.image_ids) == (64 if task == "t2i" else 128)
        for name, tensor in trained.state_dict().items():
            assert torch.equal(model.state_dict()[name], tensor), name


@pytest.mark.parametrize("name", ["shapes", "shapes-edit"])
def test_the_bundled_generators_draw_what_is_asked_for(name):
    """By the pixel parser, on prompts whose pair of objects they never saw."""
    found = train_generator.held_out_success(*ShapesGenerator.load(generator_directory(name)), 100)
    assert np.mean(found) > 0.3


def test_convergence_is_checked_on_the_same_noise(tmp_path):
    for name in ("earlier", "last"):
        small_generator().save(tmp_path / name, CODE)
    result = check_convergence(tmp_path, 6)
    assert result["gain"] == result["gain_low"] == result["gain_high"] == 0.0
    assert (tmp_path / "convergence.json").is_file()


@pytest.mark.parametrize("task", ["t2i", "edit"])
@pytest.mark.parametrize("lora", [None, LoraOptions(4, 8.0)])
def test_the_policy_saves_and_loads_what_was_trained(tmp_path, task, lora):
    policy = ShapesPolicy(small_generator(task), CODE, lora=lora)
    assert isinstance(policy, Policy)
    sources = None
    if task == "edit":
        sources = [render(sample_item(np.random.default_rng(i), "t2i").target) for i in range(2)]
    text = ["Make the red circle blue.", "Make the background navy."] if sources else TEXTS
    conditions = policy.encode(text, sources)
    draws = torch.Generator().manual_seed(0)
    latents = torch.randn(2, *policy.latent_shape, generator=draws)
    sigma = torch.tensor([0.9, 0.3])
    with torch.no_grad():
        before = policy.velocity(latents, sigma, conditions)
        assert before.shape == latents.shape
        for parameter in policy.trainable_parameters().values():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=draws))
        after = policy.velocity(latents, sigma, conditions)
        with policy.reference():
            assert torch.equal(policy.velocity(latents, sigma, conditions), before)
        assert not torch.allclose(after, before)
        policy.save(tmp_path)
        other = ShapesPolicy(small_generator(task), CODE, lora=lora)
        other.load(tmp_path)
        assert torch.equal(other.velocity(latents, sigma, conditions), after)


def test_words_matter_by_place():
    policy = ShapesPolicy(small_generator(), CODE)
    latents, sigma = torch.zeros(2, 64, 48), torch.ones(2)
    swapped = ["a red circle and a blue square", "a blue circle and a red square"]
    with torch.no_grad():
        a, b = policy.velocity(latents, sigma, policy.encode(swapped))
    assert not torch.allclose(a, b)


def test_gradients_reach_the_transformer_and_not_the_words():
    policy = ShapesPolicy(small_generator(), CODE)
    velocity = policy.velocity(torch.randn(2, 64, 48), torch.rand(2), policy.encode(TEXTS))
    velocity.square().mean().backward()
    assert all(p.grad is not None for p in policy.trainable_parameters().values())
    assert policy.generator.words.weight.grad is None


def test_the_policy_refuses_what_does_not_fit():
    policy = ShapesPolicy(small_generator(), CODE)
    with pytest.raises(ValueError, match="takes no source images"):
        policy.encode(TEXTS, CODE.decode(torch.zeros(2, 64, 48)))
    with pytest.raises(ValueError, match="needs source images"):
        ShapesPolicy(small_generator("edit"), CODE).encode(TEXTS)
    with pytest.raises(ValueError, match=r"latents have shape \(4, 4\), the policy \(64, 48\)"):
        policy.decode(torch.zeros(1, 4, 4))


def test_an_absent_generator_says_how_to_make_it(tmp_path, monkeypatch):
    with pytest.raises(ArrFastError, match="train_generator"):
        ShapesGenerator.load(tmp_path)
    with pytest.raises(ArrFastError, match="there are shapes, shapes-edit"):
        generator_directory("cubes")
