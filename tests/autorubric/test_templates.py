"""Templates: the shapes set is the trained prompts, values forge no images, users' files win."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from arr_fast.autorubric.labelled import LabelledPair
from arr_fast.autorubric.templates import Exemplar, TemplateSet
from arr_fast.errors import ArrFastError
from arr_fast.images import to_image
from arr_fast.prompts import ImageSlot
from arr_fast.shapes.writing import caption_prompt, pair_prompt

IMAGES = [to_image(np.full((8, 8, 3), n, np.uint8), name="x") for n in range(4)]
CAPTION = "a {{ red }} circle <b> {% if %}\n<|im_end|>\n"


def pair(edit: bool = False, caption: str = CAPTION, preferred=2) -> LabelledPair:
    return LabelledPair(
        "n", caption, (IMAGES[0], IMAGES[1]), preferred, IMAGES[2] if edit else None
    )


def joined(parts) -> list:
    """Neighbouring texts as one, which is what the encoder makes of them."""
    found: list = []
    for part in parts:
        if isinstance(part, str) and found and isinstance(found[-1], str):
            found[-1] += part
        else:
            found.append(part)
    return found


@pytest.mark.parametrize(
    ("edit", "general", "rejected"),
    list(itertools.product([False, True], [False, True], [(), ("It is so.", "1. {{ x }}")])),
)
def test_shapes_templates_are_the_trained_prompts(edit, general, rejected) -> None:
    for preferred in (1, 2):
        one = pair(edit, preferred=preferred)
        got = TemplateSet("shapes").for_pair(one, general, limit=3, rejected=rejected)
        wanted = pair_prompt(one.task, one.prompt, preferred, general=general, rejected=rejected)
        assert joined(got.parts) == joined(wanted)
        assert list(got.images) == list(one.shown)


def test_the_bundled_judge_is_shown_no_more_failures_than_in_training() -> None:
    got = TemplateSet("shapes").for_pair(pair(), True, limit=3, rejected=["A.", "B.", "C."])
    wanted = pair_prompt("t2i", CAPTION, 2, general=True, rejected=["B.", "C."])
    assert joined(got.parts) == joined(wanted)


def test_shapes_caption_template_is_the_trained_prompt() -> None:
    got = TemplateSet("shapes").for_caption("a red circle", None, limit=5)
    assert joined(got.parts) == joined(caption_prompt("a red circle")) and got.images == ()


def test_default_templates_say_what_they_know() -> None:
    guide = [Exemplar("a guide", IMAGES[3], IMAGES[0], "it is whole")]
    templates = TemplateSet()
    got = templates.for_pair(
        pair(True), True, limit=7, rejected=("Old.",), critique="TABLE", problem="", exemplars=guide
    )
    text = "".join(part for part in got.parts if isinstance(part, str))
    for piece in (CAPTION, "TABLE", "- Old.", "it is whole", "at most 7", "People prefer Image 2"):
        assert piece in text
    assert [part.index for part in got.parts if isinstance(part, ImageSlot)] == [3, 4, 0, 1, 2]
    assert list(got.images) == [*pair(True).shown, IMAGES[3], IMAGES[0]]
    plain = templates.for_pair(pair(), True, limit=7)
    text = "".join(part for part in plain.parts if isinstance(part, str))
    assert "guide" not in text and "log-odds" not in text and "Do not write" not in text
    listed = templates.for_structure("t2i", [("A is b.", 3)], limit=5)
    assert "1. (3) A is b." in listed.parts[0]


def test_a_guide_is_never_passed_over() -> None:
    assert TemplateSet().uses("generate_general", "exemplars")
    assert TemplateSet().uses("generate_caption", "exemplars")
    assert not TemplateSet("shapes").uses("generate_general", "exemplars")


def test_a_users_template_takes_the_place_of_the_packaged_one(tmp_path) -> None:
    (tmp_path / "generate_caption.jinja").write_text("My own: {{ caption }} {{ limit }}\n")
    mine = TemplateSet("shapes", tmp_path)
    assert mine.for_caption("x", None, limit=4).parts == ("My own: x 4",)
    assert mine.has("generate_general") and not mine.has("structure")
    (tmp_path / "generate_caption.jinja").write_text("{{ captoin }}")
    with pytest.raises(ArrFastError, match="captoin"):
        TemplateSet("shapes", tmp_path).for_caption("x", None, limit=4)
    with pytest.raises(ArrFastError, match="default, shapes"):
        TemplateSet("nope")
