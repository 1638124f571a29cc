"""General and prompt-specific criteria are kept apart; what is no criterion is named."""

from __future__ import annotations

import numpy as np
import pytest

from arr_fast.autorubric.wording import (
    compares,
    is_checkable,
    is_general,
    rubric_warnings,
    sort_criteria,
)
from arr_fast.rubric import Criterion, Rubric
from arr_fast.shapes.captions import describe
from arr_fast.shapes.grammar import PHRASINGS
from arr_fast.shapes.scene import sample_scene
from arr_fast.shapes.writing import GENERAL_KINDS

CAPTION = "a scene with two red foxes beside a wooden bench on a navy background"


@pytest.mark.parametrize(
    ("text", "general"),
    [
        ("Every object that the caption names is visible.", True),
        ("The background matches the caption.", True),
        ("The image matches {caption}.", True),
        ("Fur and skin have natural texture.", True),
        ("The fox is in focus.", False),
        ("There are foxes in the picture.", False),
        ("The bench is made of wood, wooden planks are visible.", False),
        ("The main object is teal.", False),
    ],
)
def test_a_general_criterion_names_nothing_of_the_caption(text: str, general: bool) -> None:
    assert is_general(text, CAPTION) is general


def test_every_general_phrasing_of_the_domain_is_general_under_every_caption() -> None:
    rng = np.random.default_rng(0)
    captions = [describe(rng, sample_scene(rng, "train")).text(rng) for _ in range(100)]
    for kind in GENERAL_KINDS:
        for form in PHRASINGS[kind]:
            text = form.replace("{i}", "picture")
            assert not compares(text) and is_checkable(text), text
            # "crosses" is a shape as well as a verb: such a text is set aside, never let in.
            fitting = [c for c in captions if "crosses" not in text or "cross" not in c]
            assert fitting and all(is_general(text, caption) for caption in fitting), text


@pytest.mark.parametrize(
    "text",
    [
        "Image 1 shows the fox.",
        "The colours are brighter than in the other image.",
        "The preferred image is sharp.",
        "Both images show a bench.",
        "It has fewer artifacts than the other.",
    ],
)
def test_comparisons_are_found(text: str) -> None:
    assert compares(text)


@pytest.mark.parametrize(
    "text", ["Edges are sharper than a blurred photo would show.", "The second fox is whole."]
)
def test_other_uses_of_the_words_are_no_comparison(text: str) -> None:
    assert not compares(text)


def test_sorting_keeps_every_text_once() -> None:
    texts = ["Edges are sharp.", "The fox is red.", "Image 2 is better.", "It looks great overall."]
    found = sort_criteria(texts, CAPTION)
    assert found.general == ["Edges are sharp."] and found.specific == ["The fox is red."]
    assert [text for text, _ in found.refused] == texts[2:]


def test_a_rubric_that_names_nothing_checkable_is_warned_about() -> None:
    def rubric(*texts: str) -> Rubric:
        criteria = tuple(Criterion(id=f"c{i}", text=text) for i, text in enumerate(texts))
        return Rubric(name="r", criteria=criteria)

    vague = rubric("The image is good.", "It looks nice overall.")
    assert rubric_warnings(vague) == ["no criterion names a checkable property"]
    assert rubric_warnings(rubric("It is good.", "Edges are sharp.")) == [
        "c0: names no checkable property"
    ]
    for name in Rubric.builtin_names():
        assert rubric_warnings(Rubric.builtin(name)) == [], name
