"""Streaming JSON: equal to json.load for whole files, exact lines, nothing read ahead of need."""

from __future__ import annotations

import json
import tracemalloc

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from arr_fast.data import streams
from arr_fast.data.fields import Row
from arr_fast.data.record import ItemError
from arr_fast.data.streams import json_lines, json_list

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**20), 10**20)
    | st.text(max_size=8)
    # Python writes and reads floats exactly.
    | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=6,
)
OBJECTS = st.lists(st.dictionaries(st.text(max_size=4), VALUES, max_size=4), max_size=6)
LENIENT = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def rows(path):
    found = list(json_list(path))
    assert all(isinstance(row, Row) for row in found)
    return [row.values for row in found]


@LENIENT
@given(
    objects=OBJECTS,
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
    chunk=st.integers(1, 40),
    key=st.sampled_from([None, "pairs"]),
)
def test_a_list_reads_as_json_load_reads_it(
    tmp_path, monkeypatch, objects, indent, ascii_only, chunk, key
):
    monkeypatch.setattr(streams, "CHUNK", chunk)
    document = objects if key is None else {"version": 1.5, key: objects, "about": {"a": [1]}}
    text = json.dumps(document, indent=indent, ensure_ascii=ascii_only)
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    assert rows(path) == objects


@LENIENT
@given(objects=OBJECTS, gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6))
def test_places_are_the_lines_where_objects_begin(tmp_path, objects, gaps):
    text, expected = "[", []
    for number, (value, gap) in enumerate(zip(objects, gaps, strict=False)):
        text += ("," if number else "") + "\n" * gap
        expected.append(text.count("\n") + 1)
        text += json.dumps(value, indent=1)
    path = tmp_path / "x.json"
    path.write_text(text + "]", encoding="utf-8")
    assert [row.place.line for row in json_list(path)] == expected


@LENIENT
@given(text=st.text(alphabet='[]{},:"\\ \n123truefalsn.eu', max_size=40))
def test_any_text_reads_or_is_refused_with_a_line(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    try:
        found = list(json_list(path))
    except ItemError as error:
        assert str(path) in str(error)
        return
    if not text.strip():
        assert found == []
        return
    expected = json.loads(text)
    if isinstance(expected, list):
        assert [row.values for row in found if isinstance(row, Row)] == [
            value for value in expected if isinstance(value, dict)
        ]


@LENIENT
@given(objects=OBJECTS)
def test_a_broken_line_leaves_the_others(tmp_path, objects):
    lines = [json.dumps(value) for value in objects]
    lines.insert(len(lines) // 2, '{"a": ')
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    found = list(json_lines(path))
    assert [row.values for row in found if isinstance(row, Row)] == objects
    (error,) = [row for row in found if isinstance(row, ItemError)]
    assert f"x.jsonl:{len(objects) // 2 + 1}: not valid JSON" in str(error)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('[{"a": 1},\n {"a": }]', "x.json:2: not valid JSON: Expecting value"),
        ('[{"a": 1}\n {"a": 2}]', "x.json:2: not valid JSON: expected ','"),
        ('[{"a": 1},\n\n]', "x.json:3: not valid JSON: a comma before the end"),
        ('[{"a": 1}]\n[]', "x.json:2: more text after the end"),
        ('{"a": 1}\n{"a": 2}', "expected a list of items"),
        ('{"x": [{}], "y": [{}]}', "two lists, 'x' and 'y'"),
        ('[{"a": 1}, {"a', "Unterminated string"),
        ('[{"a": 1, "a": 2}]', "field 'a' appears twice"),
        ("[" * 100_000, "nested too deeply"),
        ('"text"', "expected a list of items"),
    ],
)
def test_broken_lists(tmp_path, text, expected):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ItemError) as caught:
        for row in json_list(path):
            if isinstance(row, ItemError):
                raise row
    assert expected in str(caught.value)


def test_a_mistake_is_found_before_the_file_is_read_whole(tmp_path):
    path = tmp_path / "x.json"
    with path.open("w") as handle:
        handle.write('[{"a": 1}, {"a": oops}, ')
        handle.write(('{"b": "' + "x" * 500 + '"},') * 20_000 + "{}]")
    tracemalloc.start()
    with pytest.raises(ItemError, match="Expecting value"):
        list(json_list(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert path.stat().st_size > 10_000_000
    assert peak < 2_000_000


def test_a_long_list_needs_little_memory(tmp_path):
    path = tmp_path / "x.json"
    with path.open("w") as handle:
        handle.write("[" + ",".join('{"b": "' + "x" * 500 + '"}' for _ in range(20_000)) + "]")
    tracemalloc.start()
    count = sum(1 for _ in json_list(path))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and path.stat().st_size > 10_000_000
    assert peak < 2_000_000


def test_bytes_that_are_not_utf8(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\n{"a": "\xff"}\n{"a": 3}\n')
    first, second, third = json_lines(path)
    assert (first.values, third.values) == ({"a": 1}, {"a": 3})
    assert "x.jsonl:2: not valid UTF-8" in str(second)
    path = tmp_path / "x.json"
    path.write_bytes(b'[{"a": "\xff"}]')
    with pytest.raises(ItemError, match="not valid UTF-8"):
        list(json_list(path))
