"""The truth of criteria on scenes built by hand, ambiguity included."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from arr_fast.shapes.captions import Edit
from arr_fast.shapes.claims import EDIT_KINDS, T2I_KINDS, Claim, Context
from arr_fast.shapes.grammar import PHRASINGS
from arr_fast.shapes.pairs import sample_edit_pair, sample_pair
from arr_fast.shapes.scene import Scene, with_object
from tests.shapes.by_hand import BLUE, CAPTION, RED, SCENE

T2I = Context(caption=CAPTION)


def check(kind: str, scene: Scene = SCENE, context: Context = T2I, **fields: object) -> bool | None:
    return Claim(kind, **fields).truth(scene, context)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("kind", "fields", "truth"),
    [
        ("presence", {"first": ("red", "circle")}, True),
        ("presence", {"first": ("", "star")}, True),
        ("presence", {"first": ("red", "star")}, False),
        ("absence", {"first": ("green", "")}, True),
        ("absence", {"first": ("blue", "")}, False),
        ("colour", {"first": ("", "circle"), "value": "red"}, True),
        ("colour", {"first": ("", "circle"), "value": "blue"}, False),
        ("colour", {"first": ("", "ring"), "value": "blue"}, None),
        ("size", {"first": ("blue", "star"), "value": "small"}, True),
        ("size", {"first": ("", "circle"), "value": "small"}, False),
        ("count", {"value": "2"}, True),
        ("count", {"first": ("", "star"), "value": "2"}, False),
        ("relation", {"first": ("red", "circle"), "second": ("", "star"), "value": "left"}, True),
        ("relation", {"first": ("red", "circle"), "second": ("", "star"), "value": "right"}, False),
        ("relation", {"first": ("red", "circle"), "second": ("", "star"), "value": "above"}, None),
        ("position", {"first": ("", "circle"), "value": "left"}, True),
        ("position", {"first": ("", "star"), "value": "bottom"}, False),
        ("background", {"value": "white"}, True),
        ("background", {"value": "navy"}, False),
        ("sharpness", {}, True),
        ("noise", {}, True),
        ("occlusion", {}, True),
        ("cut_off", {}, True),
        ("caption_objects", {}, True),
        ("caption_colours", {}, True),
        ("caption_count", {}, True),
        ("caption_relation", {}, True),
        ("caption_background", {}, True),
        ("caption_extra", {}, True),
        ("faithful", {}, True),
    ],
)
def test_truth_on_a_plain_scene(kind: str, fields: dict[str, object], truth: bool | None):
    assert check(kind, **fields) is truth


def test_truth_of_caption_claims_after_changes():
    recoloured = with_object(SCENE, 0, colour="green")
    assert check("caption_objects", recoloured) is False
    assert check("caption_colours", recoloured) is False
    assert check("caption_count", recoloured) is True
    assert check("caption_extra", recoloured) is None
    assert check("faithful", recoloured) is False
    lone = replace(SCENE, objects=(RED,))
    assert check("caption_colours", lone) is None
    assert check("caption_count", lone) is False
    assert check("caption_relation", lone) is None
    added = replace(SCENE, objects=(RED, BLUE, replace(BLUE, y=0.8)))
    assert check("caption_extra", added) is False
    assert check("caption_objects", added) is True
    swapped = with_object(with_object(SCENE, 0, x=0.75), 1, x=0.25)
    assert check("caption_relation", swapped) is False
    assert check("faithful", swapped) is False
    assert check("faithful", with_object(SCENE, 1, size="large")) is False
    assert check("faithful", replace(SCENE, background="navy")) is False


def test_degraded_scenes():
    assert check("sharpness", replace(SCENE, blur=0.02)) is False
    assert check("presence", replace(SCENE, blur=0.02), first=("red", "circle")) is None
    assert check("noise", replace(SCENE, noise=0.12)) is False
    assert check("occlusion", replace(SCENE, hidden=0)) is False
    assert check("cut_off", with_object(SCENE, 0, x=0.1)) is False
    assert check("cut_off", with_object(SCENE, 0, x=0.18)) is None
    static, blank = replace(SCENE, noise=1.0), replace(SCENE, objects=())
    for empty in (static, blank):
        assert check("presence", empty, first=("red", "circle")) is False
        assert check("faithful", empty) is False
    assert check("background", static, value="white") is None


def test_edits():
    edit = Edit("recolour", 0, "green")
    context = Context(source=SCENE, edit=edit)
    done = edit.apply(SCENE)
    assert check("edit_done", done, context) is True
    assert check("edit_kept", done, context) is True
    assert check("edit_done", SCENE, context) is False
    assert check("edit_kept", SCENE, context) is True
    assert check("edit_done", with_object(SCENE, 0, colour="yellow"), context) is None
    for other in (
        with_object(done, 1, colour="red"),
        replace(done, background="navy"),
        replace(done, objects=done.objects[:1]),
        replace(done, objects=(*done.objects, replace(BLUE, y=0.8))),
    ):
        assert check("edit_done", other, context) is True
        assert check("edit_kept", other, context) is False


@pytest.mark.parametrize(
    ("edit", "wrong"),
    [
        (Edit("remove", 1), SCENE),
        (Edit("background", -1, "navy"), SCENE),
        (Edit("add", -1, added=replace(BLUE, y=0.8)), SCENE),
        (Edit("resize", 0, "small"), SCENE),
        (Edit("reshape", 0, "cross"), SCENE),
    ],
)
def test_every_edit_is_done_by_its_own_result_and_not_by_nothing(edit: Edit, wrong: Scene):
    context = Context(source=SCENE, edit=edit)
    assert check("edit_done", edit.apply(SCENE), context) is True
    assert check("edit_kept", edit.apply(SCENE), context) is True
    assert check("edit_done", wrong, context) is False


def test_sampled_pairs_cover_every_kind_with_both_truths():
    seen: dict[str, set[bool]] = {}
    for number in range(600):
        rng = np.random.default_rng([3, number])
        sampler = sample_edit_pair if number % 3 == 0 else sample_pair
        for criterion in sampler(rng, "train", 14).criteria:
            seen.setdefault(criterion.kind, set()).update(criterion.truths)
    assert set(seen) == {*T2I_KINDS, *EDIT_KINDS} == set(PHRASINGS)
    assert all(truths == {True, False} for truths in seen.values()), seen
