"""The pixel parser against scenes whose truth is known, and captions read back."""

from __future__ import annotations

import ast
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from arr_fast.shapes.caption_reading import read_caption, read_instruction
from arr_fast.shapes.captions import Caption, Edit, describe, sample_edit
from arr_fast.shapes.claims import Claim, Context
from arr_fast.shapes.parser import UnparsableError, follows, parse, satisfies, success
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import BACKGROUNDS, Scene, SceneObject, sample_scene, with_object

ROOT = Path(__file__).resolve().parents[2]
CIRCLE = SceneObject("circle", "red", "large", 0.3, 0.3, 0.2)
SQUARE = SceneObject("square", "blue", "small", 0.7, 0.7, 0.12)
SCENE = Scene((CIRCLE, SQUARE), "white")


def test_at_least_99_percent_of_held_out_renders_are_read_right():
    rng = np.random.default_rng(77)
    right = 0
    for _ in range(300):
        scene = sample_scene(rng, "held_out")
        try:
            found = parse(render(scene))
        except UnparsableError:
            continue
        sizes = sorted((*o.kind, o.size) for o in found.objects)
        wanted = sorted((*o.kind, o.size) for o in scene.objects)
        right += sizes == wanted and found.background == scene.background
    assert right >= 297


def test_places_are_read_to_a_pixel():
    found = parse(render(SCENE))
    for seen, drawn in zip(found.objects, SCENE.objects, strict=True):
        assert abs(seen.x - drawn.x) < 1 / 64
        assert abs(seen.y - drawn.y) < 1 / 64
        assert abs(seen.radius - drawn.radius) < 1 / 64


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_every_background(background):
    assert parse(render(Scene((CIRCLE,), background))).background == background


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (Image.new("RGB", (64, 48)), "not square"),
        (Image.new("RGB", (64, 64), (0, 255, 255)), "no background"),
        (render(Scene((CIRCLE,), "white", noise=1.0)), "no background"),
    ],
)
def test_what_cannot_be_read_is_refused(image, reason):
    with pytest.raises(UnparsableError, match=reason):
        parse(image)


def test_a_shape_of_no_kind_is_refused():
    image = Image.new("RGB", (64, 64), BACKGROUNDS["white"])
    image.paste((225, 40, 40), (4, 30, 60, 36))
    with pytest.raises(UnparsableError, match=r"red component .* no known shape"):
        parse(image)


def test_satisfies_agrees_with_the_claims_of_the_domain():
    rng = np.random.default_rng(5)
    seen = set()
    for _ in range(400):
        scene = sample_scene(rng, "train", 2)
        caption = describe(rng, scene if rng.random() < 0.5 else sample_scene(rng, "train", 2))
        truth = Claim("faithful").truth(scene, Context(caption=caption))
        if truth is not None:
            assert satisfies(scene, caption) == truth
            seen.add(truth)
    assert seen == {True, False}


def test_an_ambiguous_relation_is_no_success():
    first, second = (
        SceneObject(s, c, "small", x, 0.5, 0.12)
        for s, c, x in (("circle", "red", 0.45), ("star", "blue", 0.55))
    )
    caption = Caption((first.kind, second.kind), relation=(0, "left", 1))
    assert not satisfies(Scene((first, second), "white"), caption)


def test_captions_are_read_back():
    rng = np.random.default_rng(1)
    for _ in range(300):
        caption = describe(rng, sample_scene(rng, "held_out"))
        found = read_caption(caption.text(rng))
        assert found.counts() == caption.counts()
        assert found.background == caption.background
        assert (found.sizes is None) == (caption.sizes is None)
        assert (found.relation is None) == (caption.relation is None)
        if caption.relation is not None and found.relation is not None:
            names = [[c.kinds[i] for i in c.relation[::2]] for c in (caption, found)]
            assert names[0] == names[1]
            assert caption.relation[1] == found.relation[1]


def test_instructions_are_read_back():
    rng = np.random.default_rng(2)
    kinds = set()
    for _ in range(300):
        scene = sample_scene(rng, "held_out")
        edit = sample_edit(rng, scene, "held_out")
        if edit is None:
            continue
        found = read_instruction(edit.text(rng, scene), scene)
        assert (found.kind, found.target, found.value) == (edit.kind, edit.target, edit.value)
        kinds.add(edit.kind)
    assert kinds == {"recolour", "reshape", "resize", "remove", "add", "background"}


@pytest.mark.parametrize("text", ["a teapot", "a red circle and a", "red", "a big red circle"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="no caption of the domain"):
        read_caption(text)


def test_an_edit_must_be_done_and_nothing_else():
    edit = Edit("recolour", 0, "green")
    done = edit.apply(SCENE)
    assert follows(parse(render(done)), SCENE, edit)
    assert not follows(SCENE, SCENE, edit)
    assert not follows(with_object(done, 1, colour="red"), SCENE, edit)
    assert not follows(with_object(done, 1, x=0.5), SCENE, edit)
    added = Edit("add", -1, added=SceneObject("star", "green", "small", 0.3, 0.75, 0.12))
    assert follows(added.apply(SCENE), SCENE, added)
    assert not follows(SCENE, SCENE, added)


def test_the_evaluator_is_one_or_zero():
    pictures = [render(SCENE), render(Scene((SQUARE,), "white"))]
    texts = ["a red circle and a blue square on a white background"] * 2
    assert success(texts, pictures) == [1.0, 0.0]
    edited = render(Edit("recolour", 0, "green").apply(SCENE))
    done = success(["Make the red circle green."] * 2, [edited, pictures[0]], [pictures[0]] * 2)
    assert done == [1.0, 0.0]


def imported(path: Path) -> set[str]:
    """Every module, and every name as `module.name`, that a file imports anywhere."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def test_neither_judge_nor_trainer_imports_the_parser():
    allowed = {"shapes/parser.py", "shapes/train_generator.py", "bench/rpo_acceptance.py"}
    found = {
        str(path.relative_to(ROOT / "arr_fast"))
        for path in (ROOT / "arr_fast").rglob("*.py")
        if "arr_fast.shapes.parser" in imported(path)
    }
    assert found and found <= allowed
