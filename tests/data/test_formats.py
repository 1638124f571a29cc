"""Every format: a file as its authors write it, a round trip through our writer, exact errors."""

from __future__ import annotations

import base64
import io
import json
from dataclasses import replace
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from arr_fast.data.record import (
    EmbeddedImage,
    ItemError,
    Place,
    Record,
    UnknownFormatError,
    image_bytes,
)
from arr_fast.data.registry import FORMATS, detect, read_records, write_records
from arr_fast.data.writing import plain


def png(colour: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (4, 3), (colour, colour, colour)).save(buffer, "PNG")
    return buffer.getvalue()


def pick_row(**changes: object) -> dict[str, object]:
    row = {"caption": "p", "jpg_0": png(1), "jpg_1": png(2), "label_0": 0.0, "label_1": 1.0}
    return {**row, "has_label": True, "ranking_id": 5, "model_0": "m", **changes}


def bench_row(**changes: object) -> dict[str, object]:
    images = {
        name: {"bytes": png(i), "path": None}
        for i, name in enumerate(("source_image", "candidate_1", "candidate_2"))
    }
    row = {"id": "17_2", "dataset": "3pair", "instruction": "p", **images, "ranking": "C>A"}
    return {**row, "comparison_type": "AvsC", "model_1": "x", **changes}


MMRB2 = {
    "pair_id": "q1",
    "prompt_content": [["text", "Make it"], ["image", "in/s.jpg"], ["text", "blue."]],
    "response_a": {"model": "m1", "response_content": [["image", "im/a.jpg"], ["text", "ok"]]},
    "response_b": {"model": "m2", "response_content": [["image", "im/b.jpg"]]},
    "chosen": "B",
}
HPDV3 = {"prompt": "p", "path1": "good.jpg", "path2": "bad.jpg", "confidence": 0.9}
EDIT = {**HPDV3, "path_src": "s.jpg", "model1_dim1_score": 3.5, "tie_case": False}
GENEVAL = {"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "two cats"}

# (format, row, prompt, images, source, ranks)
ROWS = [
    (
        "hpdv2",
        {"human_preference": [0, 1], "prompt": "p", "file_path": ["a.jpg", "b.jpg"]},
        *("p", ("a.jpg", "b.jpg"), None, (2, 1)),
    ),
    (
        "hpdv2",
        {"prompt": "p", "image_path": ["a", "b", "c"], "rank": [3, 1, 2], "raw_annotations": []},
        *("p", ("a", "b", "c"), None, (3, 1, 2)),
    ),
    ("hpdv3", HPDV3, "p", ("good.jpg", "bad.jpg"), None, (1, 2)),
    ("editreward_data", EDIT, "p", ("good.jpg", "bad.jpg"), "s.jpg", (1, 2)),
    (
        "editreward_data",
        {**EDIT, "tie_case": True},
        *("p", ("good.jpg", "bad.jpg"), "s.jpg", (1, 1)),
    ),
    ("mmrb2", MMRB2, "Make it\nblue.", ("im/a.jpg", "im/b.jpg"), "in/s.jpg", (2, 1)),
    (
        "imagerewarddb",
        {"id": "9", "prompt": "p", "generations": ["a", "b", "c"], "ranking": [2, 1, 2]},
        *("p", ("a", "b", "c"), None, (2, 1, 2)),
    ),
    ("geneval", GENEVAL, "two cats", (), None, None),
    (
        "arr",
        {"query": "p", "response": "a.png", "label_score": 4},
        *("p", ("a.png",), None, None),
    ),
]


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize(("name", "row", "prompt", "images", "source", "ranks"), ROWS)
def test_a_row_of_each_json_format(tmp_path, suffix, name, row, prompt, images, source, ranks):
    path = tmp_path / f"data{suffix}"
    path.write_text(json.dumps([row]) if suffix == ".json" else json.dumps(row) + "\n")
    assert detect(path).name == name
    (record,) = read_records(path)
    assert record.prompt == prompt
    assert record.images == tuple(str(tmp_path / image) for image in images)
    assert record.source == (source and str(tmp_path / source))
    assert record.label_rank == ranks
    assert str(record.place) == f"{path}:1"


def test_pickapic_labels(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [
        pick_row(),
        pick_row(label_0=1.0, label_1=0.0),
        pick_row(label_0=0.5, label_1=0.5),
        pick_row(has_label=False),
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert detect(path).name == "pickapic"
    records = list(read_records(path))
    assert [r.label_rank for r in records] == [(2, 1), (1, 2), (1, 1), None]
    assert [image_bytes(i) for i in records[0].images] == [png(1), png(2)]
    assert str(records[2].place) == f"{path}:3"
    assert records[0].metadata["model_0"] == "m"


def test_pickapic_refuses_labels_that_do_not_sum_to_one(tmp_path):
    path = tmp_path / "p.parquet"
    rows = [pick_row(), pick_row(label_0=1.0, label_1=1.0)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(ItemError, match=r"p\.parquet:2: label_0: expected .* sum to 1"):
        list(read_records(path))


@pytest.mark.parametrize(
    ("ranking", "compared", "ranks"),
    [
        ("A>B", "AvsB", (1, 2)),
        ("C>A", "AvsC", (2, 1)),
        ("A<C", "AvsC", (2, 1)),
        ("A=B", "AvsB", (1, 1)),
        ("B>A", None, (2, 1)),
        ("D>B", "BvsD", (2, 1)),
    ],
)
def test_editreward_bench_rankings(tmp_path, ranking, compared, ranks):
    path = tmp_path / "b.parquet"
    row = bench_row(ranking=ranking, comparison_type=compared)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([row]), path)
    (record,) = read_records(path)
    assert detect(path).name == "editreward_bench"
    assert (record.label_rank, record.group) == (ranks, "3pair/17")
    assert image_bytes(record.source) == png(0)


def test_shards_of_a_folder_are_one_data_set(tmp_path):
    for shard in range(3):
        rows = [pick_row(caption=f"{shard}{i}") for i in range(40)]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / f"{shard}.parquet")
    prompts = [record.prompt for record in read_records(tmp_path)]
    assert prompts == [f"{shard}{i}" for shard in range(3) for i in range(40)]


def test_geneval_output_folder(tmp_path):
    for number in range(2):
        samples = tmp_path / f"{number:05d}" / "samples"
        samples.mkdir(parents=True)
        (samples.parent / "metadata.jsonl").write_text(json.dumps(GENEVAL))
        for sample in range(number + 1):
            (samples / f"{sample:04d}.png").write_bytes(png())
    first, second = read_records(tmp_path)
    assert (first.name, first.kind, second.kind) == ("00000", "point", "pair")
    assert second.images[1].endswith("00001/samples/0001.png")
    assert second.metadata["tag"] == "counting"


def test_flow_grpo_folders(tmp_path):
    (tmp_path / "train.txt").write_text("a cat\n\n  a dog  \n")
    (tmp_path / "test_metadata.jsonl").write_text('{"prompt": "blue", "image": "s.png", "x": 1}\n')
    assert detect(tmp_path).name == "flow_grpo"
    cat, dog, edit = read_records(tmp_path)
    assert (cat.prompt, dog.prompt, cat.metadata) == ("a cat", "a dog", {"split": "train"})
    assert str(dog.place) == f"{tmp_path / 'train.txt'}:3"
    assert edit.source == str(tmp_path / "s.png")
    assert edit.metadata == {"split": "test", "x": 1}


def test_easy_vqa(tmp_path):
    pytest.importorskip("easy_vqa", reason="easy-vqa is not installed")
    from arr_fast.shapes.easy_vqa import pictures

    found = list(read_records("easy-vqa:test"))
    expected = {
        (picture.number, question.text, question.answer)
        for picture in pictures("test")
        for question in picture.questions
    }
    read = {(int(Path(r.images[0]).stem), r.criterion, r.label_score == 1.0) for r in found}
    assert read == expected and len(found) > 5000
    assert all(Path(record.images[0]).is_file() for record in found[:50])
    with pytest.raises(ItemError, match="expected easy-vqa:train or easy-vqa:test"):
        list(read_records("easy-vqa:dev"))


PROMPTS = st.text(min_size=1, max_size=40).filter(
    lambda s: s.strip() and "\0" not in s and s.isprintable()
)
NAMES = st.text("abcdefghij_", min_size=1, max_size=6)


@st.composite
def records(draw: st.DrawFn, name: str) -> list[Record]:
    """Records that a format can hold."""
    edit = {"editreward_data": True, "editreward_bench": True}.get(name, False)
    if name in ("arr", "mmrb2"):
        edit = draw(st.booleans())
    tie = name not in ("hpdv3", "mmrb2")
    grouped = name in ("arr", "imagerewarddb")
    found = []
    for number in range(draw(st.integers(1, 4))):
        count = draw(st.integers(2, 4)) if grouped else 2
        ranks = (1, 2, 3, 4)[:count]
        if name not in ("hpdv3", "editreward_data"):
            ranks = tuple(draw(st.permutations(ranks)))
        if tie and count == 2 and draw(st.booleans()):
            ranks = (1, 1)
        images = tuple(f"im/{number}{i}{draw(NAMES)}.png" for i in range(count))
        found.append(
            Record(
                name=f"r{number}",
                prompt=draw(PROMPTS),
                images=images,
                source=f"src/{number}.png" if edit else None,
                label_rank=ranks,
            )
        )
    return found


JSON_FORMATS = ("arr", "hpdv2", "hpdv3", "editreward_data", "mmrb2", "imagerewarddb")


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
@pytest.mark.parametrize("name", JSON_FORMATS)
@settings(
    max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_json_round_trip_across_folders(tmp_path, suffix, name, data):
    given_records = [
        replace(
            record,
            images=tuple(str(tmp_path / "pictures" / image) for image in record.images),
            source=record.source and str(tmp_path / "pictures" / record.source),
        )
        for record in data.draw(records(name))
    ]
    path = tmp_path / "out" / f"x{suffix}"
    assert write_records(given_records, path, name) == len(given_records)
    assert not Path(f"{path}.part").exists()
    read = list(read_records(path))
    for before, after in zip(given_records, read, strict=True):
        assert after.prompt == before.prompt
        assert [Path(i).resolve() for i in after.images] == [Path(i) for i in before.images]
        assert (after.source and Path(after.source).resolve()) == (
            before.source and Path(before.source)
        )
        assert after.label_rank == before.label_rank


@pytest.mark.parametrize("name", ["pickapic", "editreward_bench"])
@settings(
    max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_parquet_round_trip_keeps_the_bytes(tmp_path, name, data):
    given_records = [
        replace(
            record,
            images=tuple(EmbeddedImage(i, png(7 + n)) for n, i in enumerate(record.images)),
            source=record.source and EmbeddedImage("s", png(99)),
        )
        for record in data.draw(records(name))
    ]
    path = tmp_path / "x.parquet"
    write_records(given_records, path, name)
    for before, after in zip(given_records, read_records(path), strict=True):
        assert (after.name, after.prompt) == (before.name, before.prompt)
        assert [image_bytes(i) for i in after.images] == [png(7), png(8)]
        assert (after.source is None) == (before.source is None)
        assert after.preference == before.preference


def test_prompt_sets_round_trip(tmp_path):
    metadata = [{"tag": "t", "include": [{"class": "cat", "count": 1}]}, {}]
    found = [Record("a", "a cat", metadata=metadata[0]), Record("b", "a dog")]
    write_records(found[:1], tmp_path / "g.jsonl", "geneval")
    (read,) = read_records(tmp_path / "g.jsonl")
    assert (read.prompt, read.metadata) == ("a cat", metadata[0])
    write_records(found, tmp_path / "flow", "flow_grpo")
    assert [r.prompt for r in read_records(tmp_path / "flow")] == ["a cat", "a dog"]
    assert (tmp_path / "flow" / "train_metadata.jsonl").exists()
    write_records(found[1:], tmp_path / "bare", "flow_grpo")
    assert (tmp_path / "bare" / "train.txt").read_text() == "a dog\n"
    with pytest.raises(ItemError, match="b: geneval cannot hold it: no tag and include"):
        write_records(found, tmp_path / "h.jsonl", "geneval")
    assert not (tmp_path / "h.jsonl").exists()


def test_arr_keeps_everything(tmp_path):
    record = Record(
        *("x", "p", (str(tmp_path / "a.png"),)),
        label_score=3.5,
        criterion="Is it red?",
        group="g",
        metadata={"model": "m", "nested": {"a": [1, None]}},
    )
    write_records([record], tmp_path / "x.jsonl", "arr")
    (read,) = read_records(tmp_path / "x.jsonl")
    assert replace(read, place=None) == record


def test_embedded_images_become_files(tmp_path):
    images = (EmbeddedImage("p.parquet:1 jpg_0", png(5)), EmbeddedImage("p.parquet:1 jpg_0", b"?"))
    write_records([Record("x", "p", images, label_rank=(1, 2))], tmp_path / "x.jsonl", "arr")
    (read,) = read_records(tmp_path / "x.jsonl")
    assert [Path(i).name for i in read.images] == [
        "p.parquet_1_jpg_0.png",
        "p.parquet_1_jpg_0_2.bin",
    ]
    assert [image_bytes(i) for i in read.images] == [png(5), b"?"]


def test_data_urls_are_read_and_remote_ones_refused(tmp_path):
    url = "data:image/png;base64," + base64.b64encode(png(3)).decode()
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"query": "p", "response": [url, "b.png"]}))
    (read,) = read_records(path)
    assert image_bytes(read.images[0]) == png(3)
    for bad, message in (
        ("https://example.org/a.png", "not downloaded"),
        ("data:image/png;base64,@@@", "valid base64"),
    ):
        path.write_text(json.dumps({"query": "p", "response": [bad, "b.png"]}))
        with pytest.raises(ItemError, match=rf"x\.jsonl:1: response: .*{message}"):
            list(read_records(path))


BAD = [
    ("hpdv2", {"prompt": "p", "file_path": ["a", "b"], "human_preference": [1]}, "1 ranks for 2"),
    ("hpdv2", {"prompt": "p", "file_path": ["a", "b"], "human_preference": [2, 0]}, "human_pref"),
    ("hpdv2", {"prompt": "p", "image_path": ["a"], "rank": [1]}, "image_path: expected two"),
    ("hpdv3", {**HPDV3, "path2": None}, "path2: expected a path"),
    ("hpdv3", {**HPDV3, "prompt": "\ud800"}, "prompt: expected text without lone surrogates"),
    ("editreward_data", {**EDIT, "model1_dim1_score": "3"}, "model1_dim1_score: expected a finite"),
    ("mmrb2", {**MMRB2, "chosen": "C"}, 'chosen: expected "A" or "B"'),
    ("mmrb2", {**MMRB2, "response_a": {}}, "response_a.response_content: expected"),
    (
        "mmrb2",
        {**MMRB2, "response_b": {"response_content": [["image", "a"], ["image", "b"]]}},
        "response_b.response_content: 2 images, expected 1",
    ),
    ("mmrb2", {**MMRB2, "prompt_content": [["audio", "x"]]}, r"prompt_content\[0\]: expected"),
    ("imagerewarddb", {"prompt": "p", "generations": ["a", "b"], "ranking": [1, True]}, "ranking"),
    ("geneval", {**GENEVAL, "include": [{"class": "cat"}]}, r"include\[0\]: expected an object"),
    ("arr", {"query": "p", "response": ["a", "b"], "label_score": 3}, "label_score: scores one"),
    ("arr", {"query": "p", "response": ["a", "b"], "label_rank": "12"}, "label_rank: expected a"),
    ("arr", {"query": "p", "response": ["a"], "label_score": float("nan")}, None),
]


@pytest.mark.parametrize(("name", "row", "expected"), BAD)
def test_errors_name_file_line_and_field(tmp_path, name, row, expected):
    path = tmp_path / "bad.jsonl"
    good = next(r for n, r, *_ in ROWS if n == name)
    path.write_text(f"{json.dumps(good)}\n\n{json.dumps(row)}\n{json.dumps(good)}\n")
    if expected is None:
        assert [r.label_score for r in read_records(path, name)] == [4, None, 4]
        return
    with pytest.raises(ItemError, match=rf"bad\.jsonl:3: .*{expected}"):
        list(read_records(path, name))
    errors: list[ItemError] = []
    assert len(list(read_records(path, name, on_error=errors.append))) == 2
    assert len(errors) == 1


REFUSED = [
    ("hpdv3", {"label_rank": (1, 1)}, "a tie"),
    ("hpdv3", {"label_rank": None}, "expected a labelled pair"),
    ("hpdv2", {"source": "s"}, "a source image"),
    ("editreward_data", {}, "a source image is missing"),
    ("pickapic", {"images": ("a",), "label_rank": None}, "a point"),
    ("flow_grpo", {}, "images"),
    ("arr", {"images": ()}, "a prompt without images"),
]


@pytest.mark.parametrize(("name", "changes", "expected"), REFUSED)
def test_writers_refuse_what_a_format_cannot_say(tmp_path, name, changes, expected):
    record = replace(Record("it", "p", ("a", "b"), label_rank=(1, 2)), **changes)
    path = tmp_path / "x.jsonl"
    with pytest.raises(ItemError, match=f"it: {name} cannot hold it: .*{expected}"):
        write_records([record], path, name)
    assert not path.exists()


def test_detection_never_guesses(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({**HPDV3, "images": ["a", "b"]}))
    with pytest.raises(ItemError, match="fits the formats arr and hpdv3; name one"):
        detect(path)
    path.write_text(json.dumps({"prompt": "p", "pictures": ["a"]}))
    with pytest.raises(UnknownFormatError, match=r"no known format \(it has: pictures, prompt\)"):
        detect(path)
    with pytest.raises(ItemError, match="no data format 'x'; there are: arr, hpdv2"):
        list(read_records(path, "x"))
    with pytest.raises(ItemError, match="no such file"):
        detect(tmp_path / "absent.json")
    with pytest.raises(ItemError, match="no known format"):
        detect(tmp_path)
    with pytest.raises(ItemError, match="format easy_vqa is only read"):
        write_records([], path, "easy_vqa")


def test_each_sample_row_fits_one_format():
    for name, row, *_ in ROWS:
        from arr_fast.data.formats import Sample

        seen = Sample(Path("x"), "json", frozenset(row))
        assert [f.name for f in FORMATS.values() if f.recognises(seen)] == [name]


def test_plain_values_can_be_written():
    value = {"a": float("nan"), 1: (1, b"x"), "p": Path("x"), "t": True}
    assert plain(value) == {"a": None, "1": [1, None], "p": "x", "t": True}


@pytest.mark.parametrize(
    ("name", "lost"),
    [
        ("arr", ""),
        ("hpdv2", "id (2 records), rubric (1 records), group (1 records), metadata (1 records)"),
        ("hpdv3", "id (2 records), rubric (1 records), group (1 records)"),
        ("imagerewarddb", "rubric (1 records), group (1 records), metadata (1 records)"),
        ("mmrb2", "rubric (1 records), group (1 records)"),
    ],
)
def test_what_a_format_has_no_place_for_is_counted(tmp_path, caplog, name, lost):
    images = (str(tmp_path / "a.png"), str(tmp_path / "b.png"))
    first = Record("first", "p", images, label_rank=(1, 2))
    second = replace(first, name="second", rubric="t2i", group="g", metadata={"model": "m"})
    unnamed = replace(first, name="x.jsonl:3", place=Place("/data/x.jsonl", 3))
    write_records([first, second, unnamed], tmp_path / "x.jsonl", name)
    said = caplog.messages[0].partition(" has no place for ")[2] if caplog.messages else ""
    assert sorted(said.split(", ")) == sorted(lost.split(", "))
