"""Rubrics: validation that names the item, three file formats, the content hash, packaged ones."""

from __future__ import annotations

import hashlib
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from arr_fast.errors import ArrFastError, RubricError
from arr_fast.rubric import Criterion, Rubric
from arr_fast.rubric_text import slugs

WORDS = st.text(alphabet="abc déxyz,.()'{}%", min_size=1, max_size=30).filter(
    lambda s: s.strip(" ") and s.strip()[0] not in "-*#>(" and s.strip()[0].isalpha()
)

REFERENCE_STYLE = """
- Rubric 1: Theme: Architectural and Structural Fidelity

- - Tip1: Assess clarity of facades,
windows and railings.
- - Tip2: Check materials (e.g., columns, arches).

- Rubric 2: Theme: Lighting

- - Tip 1: Shadows agree.
"""


def criterion(**changes: object) -> Criterion:
    return Criterion(**{"id": "a", "text": "The cat is black.", **changes})


def rubric(*criteria: Criterion, **changes: object) -> Rubric:
    return Rubric(**{"name": "r", "criteria": criteria or (criterion(),), **changes})


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: rubric(criteria=[]), "no criteria"),
        (lambda: rubric(criterion(), criterion()), "repeated: a"),
        (lambda: criterion(text="  \n"), "criterion 'a': text: is empty"),
        (lambda: criterion(weight=math.nan), "criterion 'a': weight"),
        (lambda: criterion(weight=math.inf), "criterion 'a': weight"),
        (lambda: criterion(tips=("x", " ")), "tip 1 is empty"),
        (lambda: criterion(id="holistic"), "reserved"),
        (lambda: criterion(id="two words"), "white space"),
        (lambda: criterion(colour="red"), "colour"),
        (lambda: rubric(criterion(weight=0.0)), "every weight is 0"),
        (lambda: rubric(task="video"), "task"),
        (
            lambda: Rubric(name="r", criteria=[{"id": "a", "text": "t"}, {"id": "b", "text": ""}]),
            r"criteria\[1\]: criterion 'b': text",
        ),
    ],
)
def test_malformed_rubrics_are_named(build, expected):
    with pytest.raises(RubricError, match=expected) as caught:
        build()
    assert isinstance(caught.value, ArrFastError)


def test_models_are_frozen():
    with pytest.raises(Exception, match="frozen"):
        criterion().text = "other"


def test_render_substitutes_literally():
    c = criterion(text="Shows {caption}; {0} {other}", tips=("exactly {caption}",))
    caption = "a {caption} of %s {x} \\1"
    assert c.render(caption) == (
        "Shows a {caption} of %s {x} \\1; {0} {other}\n- exactly a {caption} of %s {x} \\1"
    )


@pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json"])
def test_save_and_load_give_the_same_rubric(tmp_path, suffix):
    original = rubric(
        criterion(text="yes: 'no' # é 日本", weight=-0.1, tips=("1", "2"), essential=True),
        criterion(id="b", level="fine", theme="T", provenance="seed pair 3"),
        task="edit",
    ).with_calibration("rev1", "log_odds_mean", temperature=2.5, margin=0.25)
    path = tmp_path / f"r{suffix}"
    original.save(path)
    assert Rubric.load(path) == original


def test_text_of_the_reference_is_read():
    r = Rubric.from_text(REFERENCE_STYLE, task="t2i")
    assert [c.text for c in r.criteria] == ["Architectural and Structural Fidelity", "Lighting"]
    assert r.criteria[0].tips == (
        "Assess clarity of facades, windows and railings.",
        "Check materials (e.g., columns, arches).",
    )
    split = Rubric.from_text(REFERENCE_STYLE, split_tips=True)
    assert [c.text for c in split.criteria][2] == "Shadows agree."
    assert [c.theme for c in split.criteria] == ["Architectural and Structural Fidelity"] * 2 + [
        "Lighting"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Theme: Light\n- Tip 1: a\n- Tip 2: b",
        "1. Theme: Light\n- Tip 1: a\n- Tip 2: b",
        "1) **Theme:** Light\n  - **Tip 1:** a\n  - **Tip 2:** b",
        "## Rubric 1: Theme: Light\n* Tip1: a\n* Tip2: b",
        "theme: Light\nTIP 1: a\ntip 2 : b",
    ],
)
def test_spellings_of_theme_text(text):
    (c,) = Rubric.from_text(text).criteria
    assert (c.text, c.tips) == ("Light", ("a", "b"))


def test_plain_numbered_list():
    r = Rubric.from_text("1. The cat is black.\n2) The dog\n   barks.\n")
    assert [c.text for c in r.criteria] == ["The cat is black.", "The dog barks."]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "no criteria"),
        ("Tip 1: x\nTheme: y", "line 1"),
        ("Theme:\n- Tip 1: x", "line 1: the theme has no words"),
        ("Theme: y\n- Tip 1:", "line 2: the tip has no words"),
        ("just prose", "line 1: expected"),
    ],
)
def test_bad_text_names_its_line(text, expected):
    with pytest.raises(RubricError, match=expected):
        Rubric.from_text(text)


@given(st.lists(st.tuples(WORDS, st.lists(WORDS, max_size=4)), min_size=1, max_size=5))
def test_theme_text_round_trip(blocks):
    text = "\n".join(
        f"Theme: {theme}\n" + "".join(f"- Tip {i}: {tip}\n" for i, tip in enumerate(tips, 1))
        for theme, tips in blocks
    )
    first = Rubric.from_text(text)
    again = Rubric.from_text(first.to_text())
    assert again.criteria == first.criteria
    assert again.content_hash == first.content_hash
    expected = [
        (" ".join(t.split()), tuple(" ".join(x.split()) for x in tips)) for t, tips in blocks
    ]
    assert [(c.text, c.tips) for c in again.criteria] == expected


@pytest.mark.parametrize("task", ["t2i", "edit"])
def test_default_rubrics(task):
    r = Rubric.default(task)
    assert (len(r), r.task) == (20, task)
    assert len({c.text for c in r.criteria}) == 20
    assert {c.level for c in r.criteria} == {"coarse", "mid", "fine"}
    assert 2 <= sum(c.essential for c in r.criteria) <= 5
    assert all(c.theme for c in r.criteria)
    # Checkable on one image: no comparative wording.
    assert not [c.id for c in r.criteria if "Image 1" in c.text or " better" in c.text]
    split = Rubric.from_text(r.to_text(), split_tips=True)
    assert [(c.theme, c.text) for c in split.criteria] == [(c.theme, c.text) for c in r.criteria]


def test_builtin_names_and_unknown_one():
    names = Rubric.builtin_names()
    assert {"t2i", "edit"} <= set(names)
    for name in names:
        assert len(Rubric.builtin(name)) >= 1
    with pytest.raises(RubricError, match="edit"):
        Rubric.builtin("../secrets")


def test_hash_moves_with_what_the_judge_reads_and_the_weights_only():
    base = rubric(criterion(), criterion(id="b", text="B"))
    expected = {
        "task": "t2i",
        "criteria": [
            {"text": "The cat is black.", "tips": [], "weight": 1.0, "essential": False},
            {"text": "B", "tips": [], "weight": 1.0, "essential": False},
        ],
    }
    line = json.dumps(expected, sort_keys=True, separators=(",", ":"))
    assert base.content_hash == hashlib.sha256(line.encode()).hexdigest()
    second = criterion(id="b", text="B")
    same = [
        rubric(criterion(id="z", theme="T", level="fine", provenance="p"), second, name="other"),
        base.with_calibration("rev", "majority", temperature=3.0, margin=0.1),
    ]
    other = [
        rubric(second, criterion()),
        rubric(criterion(text="The cat is white."), second),
        rubric(criterion(tips=("Look at the tail.",)), second),
        rubric(criterion(weight=2.0), second),
        rubric(criterion(essential=True), second),
        rubric(criterion(), second, task="edit"),
    ]
    assert {r.content_hash for r in same} == {base.content_hash}
    assert len({r.content_hash for r in [base, *other]}) == len(other) + 1


def test_stale_calibration_is_ignored(caplog):
    fitted = rubric().with_calibration("rev", "log_odds_mean", temperature=2.0, margin=0.5)
    found = fitted.calibration_for("rev", "log_odds_mean")
    assert found is not None and (found.temperature, found.margin) == (2.0, 0.5)
    assert fitted.calibration_for("rev", "majority") is None
    assert fitted.calibration_for("rev2", "log_odds_mean") is None
    changed = fitted.model_copy(update={"criteria": (criterion(text="Other."),)})
    assert changed.calibration_for("rev", "log_odds_mean") is None
    assert "ignored" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("r.yaml", "name: [", "not valid YAML"),
        ("r.json", "{", "not valid JSON"),
        ("r.yaml", "- a", "expected a mapping"),
        ("r.yaml", "name: r\ncriteria: [{id: a, text: t, wieght: 2}]", r"criteria\[0\].*wieght"),
        ("r.toml", "", "unknown rubric suffix"),
        ("r.yaml", b"\xff\xfe\x00", "cannot read"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, expected):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(RubricError, match=expected) as caught:
        Rubric.load(path)
    assert name in str(caught.value)


def test_missing_file_and_wrong_task(tmp_path):
    with pytest.raises(RubricError, match=r"gone\.yaml"):
        Rubric.load(tmp_path / "gone.yaml")
    rubric(task="edit").save(tmp_path / "e.yaml")
    with pytest.raises(RubricError, match="is a rubric for edit"):
        Rubric.load(tmp_path / "e.yaml", task="t2i")


@given(st.lists(st.text(alphabet="ab _é日!", max_size=6), min_size=1, max_size=6))
def test_slugs_are_unique_and_valid(texts):
    found = slugs(texts)
    assert len(set(found)) == len(texts)
    for slug in found:
        Criterion(id=slug, text="t")
