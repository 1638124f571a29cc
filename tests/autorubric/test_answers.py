"""Answers: what is repaired, what is refused, and that a refusal keeps the raw text."""

from __future__ import annotations

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from arr_fast.autorubric.answers import (
    AnswerError,
    json_schema,
    normal_form,
    parse_criteria,
    parse_themes_answer,
)
from arr_fast.autorubric.text_backend import TextReply

GOOD = ["Edges are sharp.", "No object is cut off."]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"criteria": GOOD}),
        "```json\n" + json.dumps({"criteria": GOOD}) + "\n```",
        "<think>some {thoughts}</think>\n" + json.dumps({"criteria": GOOD}),
        '{"criteria": ["Edges are sharp.", "No object is cut off.",]}',
        "{'criteria': ['Edges are sharp.', 'No object is cut off.']}",
        'Here you are: {"criteria": ["Edges are sharp." "No object is cut off."]',
    ],
)
def test_good_and_repairable_answers(text: str) -> None:
    assert list(parse_criteria(TextReply(text), 5).texts) == GOOD


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no JSON"),
        ("I cannot help with that.", "no JSON"),
        ('{"criteria": []}', "at least 1"),
        ('{"criteria": "Edges are sharp."}', "valid list"),
        ('{"criteria": [1, 2]}', "valid string"),
        ('{"criteria": ["ok, fine", null]}', "valid string"),
        ('{"criteria": ["Edges are sharp."], "note": "x"}', "Extra inputs"),
        ('["Edges are sharp."]', "answer: Input should be"),
        (json.dumps({"criteria": ["x" * 401]}), "at most 400"),
        ('{"criteria": ["  "]}', "at least 3"),
    ],
)
def test_other_answers_are_refused_with_their_text(text: str, why: str) -> None:
    with pytest.raises(AnswerError, match=why) as refusal:
        parse_criteria(TextReply(text), 5)
    assert refusal.value.raw == text


def test_an_answer_that_was_cut_off_is_refused_though_it_could_be_repaired() -> None:
    reply = TextReply('{"criteria": ["Edges are sharp.", "No obj', finish="length")
    with pytest.raises(AnswerError, match="cut off"):
        parse_criteria(reply, 5)


def test_repetitions_banned_ones_and_surplus_are_counted() -> None:
    texts = ["A is b.", "a  is B", "C is d.", "E is f.", "G is h."]
    parsed = parse_criteria(TextReply(json.dumps({"criteria": texts})), 2, ("c is d",))
    assert parsed.texts == ("A is b.", "E is f.")
    assert (parsed.repeated, parsed.surplus) == (2, 1)
    with pytest.raises(AnswerError, match="no criterion that is new"):
        parse_criteria(TextReply('{"criteria": ["C is D."]}'), 2, ("c is d",))


@example("\x1f00", '{"criteria": ["')
@given(st.text(max_size=60), st.sampled_from(['{"criteria": ["', "", "{", "```json\n["]))
def test_any_text_is_parsed_or_refused(text: str, head: str) -> None:
    try:
        parsed = parse_criteria(TextReply(head + text), 3)
    except AnswerError:
        return
    assert 1 <= len(parsed.texts) <= 3
    assert len({normal_form(t) for t in parsed.texts}) == len(parsed.texts)
    assert all("\n" not in t and 3 <= len(t) <= 400 for t in parsed.texts)


def test_themes_name_only_sources_that_exist() -> None:
    theme = {"theme": "T", "criteria": [{"text": "A is b.", "level": "mid", "sources": [1, 3]}]}
    text = json.dumps({"themes": [theme]})
    assert parse_themes_answer(TextReply(text), 3).themes[0].criteria[0].sources == [1, 3]
    with pytest.raises(AnswerError, match="not among 1 to 2"):
        parse_themes_answer(TextReply(text), 2)


@pytest.mark.parametrize("kind", ["criteria", "themes"])
def test_schemas_close_every_object(kind) -> None:
    def objects(node):
        if isinstance(node, dict):
            if node.get("type") == "object":
                yield node
            for value in node.values():
                yield from objects(value)
        elif isinstance(node, list):
            for value in node:
                yield from objects(value)

    found = list(objects(json_schema(kind)))
    assert found and all(node["additionalProperties"] is False for node in found)
    assert all(set(node["required"]) == set(node["properties"]) for node in found)
