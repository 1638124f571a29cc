"""Item files: our names, every alias of the reference, its old layout, and clear refusals."""

from __future__ import annotations

import json

import pytest

from arr_fast.data.items import EDITED, IMAGES, PROMPT, SOURCE, ItemError, read_items


def read(tmp_path, record, count=2):
    path = tmp_path / "items.jsonl"
    path.write_text("\n" + json.dumps(record) + "\n\n")
    (item,) = read_items(path, count=count)
    strip = len(str(tmp_path)) + 1
    images = [image[strip:] for image in item.images]
    return item, images, item.source and item.source[strip:]


def test_our_own_names(tmp_path):
    record = {"id": 7, "prompt": "p", "image_a": "a.png", "image_b": "sub/b.png", "source": "s.png"}
    item, images, source = read(tmp_path, record)
    assert (item.name, item.prompt) == ("7", "p")
    assert (images, source) == (["a.png", "sub/b.png"], "s.png")


@pytest.mark.parametrize("name", PROMPT)
def test_prompt_aliases(tmp_path, name):
    item, _, _ = read(tmp_path, {name: "p", "images": ["a", "b"]})
    assert item.prompt == "p"


@pytest.mark.parametrize("name", IMAGES)
def test_image_aliases(tmp_path, name):
    item, images, source = read(tmp_path, {"query": "p", name: ["a", "b"], "label_rank": [2, 1]})
    assert (images, source, item.label_rank) == (["a", "b"], None, (2, 1))


@pytest.mark.parametrize("source", SOURCE)
@pytest.mark.parametrize("edited", EDITED)
def test_edit_aliases(tmp_path, source, edited):
    _, images, base = read(tmp_path, {"instruction": "p", source: "s", edited: ["a", "b"]})
    assert (images, base) == (["a", "b"], "s")


def test_response_with_a_separate_source(tmp_path):
    record = {"query": "p", "source_image": "s", "response": ["a", "b"], "label_rank": [1, 2]}
    assert read(tmp_path, record)[1:] == (["a", "b"], "s")


@pytest.mark.parametrize(
    "extra", [{"label_rank": [1, 2]}, {"response_includes_base": True}, {"label_rank": [2, 1]}]
)
def test_old_layout_with_the_base_first(tmp_path, extra):
    record = {"query": "p", "response": ["base", "a", "b"], **extra}
    assert read(tmp_path, record)[1:] == (["a", "b"], "base")


def test_base_can_be_denied(tmp_path):
    record = {"query": "p", "response": ["x", "a", "b"], "response_includes_base": False}
    assert read(tmp_path, record, count=3)[1:] == (["x", "a", "b"], None)


def test_absolute_paths_stay(tmp_path):
    path = tmp_path / "i.jsonl"
    path.write_text(json.dumps({"prompt": "p", "images": ["/x/a.png", "b.png"]}))
    (item,) = read_items(path, count=2)
    assert item.images == ("/x/a.png", str(tmp_path / "b.png"))


def test_json_lists_bare_and_wrapped(tmp_path):
    path = tmp_path / "i.json"
    record = {"prompt": "p", "images": ["a", "b"]}
    for document in ([record, record], {"pairs": [record, record], "version": 1}):
        path.write_text(json.dumps(document))
        assert len(read_items(path, count=2)) == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "holds no items"),
        ("{", ":1: not valid JSON"),
        ('{"prompt": "p", "images": ["a", "b"]}\n[1]', ":2: expected an object"),
        ('{"images": ["a", "b"]}', ":1: prompt: needs a non-empty string"),
        ('{"prompt": " ", "images": ["a", "b"]}', ":1: prompt: needs a non-empty string"),
        ('{"prompt": "p"}', ":1: image_paths: missing, expected a path"),
        ('{"prompt": "p", "image_a": "a"}', ":1: image_b: missing, expected a path"),
        ('{"prompt": "p", "images": ["a", 3]}', ":1: images: expected a path"),
        ('{"prompt": "p", "images": ["a"]}', "has 1 images to judge, expected 2"),
        ('{"prompt": "p", "images": ["a", "b", "c"]}', "has 3 images to judge, expected 2"),
        ('{"prompt": "p", "images": ["a", "b"], "label_rank": [1, 2, 3]}', "3 ranks for 2 images"),
    ],
)
def test_bad_files_are_named(tmp_path, text, expected):
    path = tmp_path / "items.jsonl"
    path.write_text(text)
    with pytest.raises(ItemError, match=expected) as caught:
        read_items(path, count=2)
    assert "items.jsonl" in str(caught.value)


def test_groups_need_two(tmp_path):
    path = tmp_path / "i.jsonl"
    path.write_text('{"prompt": "p", "images": ["a"]}')
    with pytest.raises(ItemError, match="expected 2 or more"):
        read_items(path, count=None)
