"""What is held out is held out: attribute combinations and phrasings."""

from __future__ import annotations

import re

import numpy as np

from arr_fast.shapes import easy_vqa
from arr_fast.shapes.grammar import PHRASINGS, phrasings, wording
from arr_fast.shapes.pairs import sample_edit_pair, sample_pair
from arr_fast.shapes.scene import COLOURS, HELD_OUT_COMBINATIONS, SHAPES

COUNT = 500


def examples(split):
    for number in range(COUNT):
        rng = np.random.default_rng([4, number])
        yield (sample_edit_pair if number % 3 == 0 else sample_pair)(rng, split, 14)


def test_no_training_picture_or_caption_has_a_held_out_combination():
    for example in examples("train"):
        scenes = [*example.scenes, *([example.source] if example.source else [])]
        for scene in scenes:
            assert not {o.kind for o in scene.objects} & HELD_OUT_COMBINATIONS
        for colour, shape in HELD_OUT_COMBINATIONS:
            assert f"{colour} {shape}" not in example.caption


def test_every_held_out_example_has_one():
    for example in examples("held_out"):
        base = example.source
        kinds = {o.kind for o in base.objects} if base else set(example.context.caption.kinds)
        assert kinds & HELD_OUT_COMBINATIONS


def test_every_colour_and_shape_is_seen_in_training():
    assert {c for c, _ in HELD_OUT_COMBINATIONS} == set(COLOURS)
    seen = {o.kind for e in examples("train") for s in e.scenes for o in s.objects}
    assert len(seen) == len(COLOURS) * len(SHAPES) - len(HELD_OUT_COMBINATIONS)


def test_easy_vqa_has_no_held_out_combination():
    combinations = {(p.colour, p.shape) for p in easy_vqa.pictures("train")}
    assert not combinations & HELD_OUT_COMBINATIONS


def test_phrasings_are_disjoint_and_both_used():
    for kind in PHRASINGS:
        train, held = set(phrasings(kind, "train")), set(phrasings(kind, "held_out"))
        assert len(train) >= 6 and len(held) == 2 and not train & held, kind


def pattern(form: str) -> re.Pattern[str]:
    form = re.escape(form).replace("are", "(?:are|is)")
    return re.compile(re.sub(r"\\{\w\\}", "[A-Za-z ]+?", form) + "$")


def test_no_training_criterion_reads_like_a_held_out_phrasing():
    held = {kind: [pattern(f) for f in phrasings(kind, "held_out")] for kind in PHRASINGS}
    for example in examples("train"):
        for criterion in example.criteria:
            clash = [p.pattern for p in held[criterion.kind] if p.match(criterion.text)]
            assert not clash, (criterion.text, clash)


def test_wording_leaves_no_placeholder():
    for example in examples("held_out"):
        for criterion in example.criteria:
            text = wording(criterion.claim, np.random.default_rng(0), "held_out")
            assert not re.search(r"[{}]", text) and text.endswith("."), text
