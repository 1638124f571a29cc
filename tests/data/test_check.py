"""`arr-fast data check` and `convert`: what is wrong is counted and named, and nothing else is."""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from arr_fast.cli import app
from arr_fast.data.check import check
from arr_fast.data.record import ItemError
from arr_fast.data.registry import read_records

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})


def picture(path, seed: int, mode: str = "RGB", size: tuple[int, int] = (24, 20), **save: object):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(path, **save)


@pytest.fixture
def folder(tmp_path):
    for seed, name in enumerate("abcd"):
        picture(tmp_path / f"{name}.png", seed)
    return tmp_path


def write(folder, *records: object):
    path = folder / "pairs.jsonl"
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))
    return path


def pair(prompt: str, first: str, second: str, ranks: object = (1, 2), **more: object):
    return {"query": prompt, "response": [first, second], "label_rank": ranks, **more}


def test_a_good_file_passes(folder):
    edit = {"query": "e", "source_image": "c.png", "edited_images": ["a.png", "b.png"]}
    report = check(
        write(
            folder,
            pair("p", "a.png", "b.png"),
            pair("q", "a.png", "b.png", (2, 1)),
            pair("r", "a.png", "b.png", (1, 1)),
            {"query": "p", "response": "a.png", "label_score": 3},
            {**pair("p", "a.png", "b.png"), "response": ["a.png", "b.png", "d.png"]}
            | {"label_rank": [1, 2, 3]},
            edit,
        )
    )
    assert report.passed and not any(report.findings().values())
    assert report.kinds == {"pair": 4, "point": 1, "group": 1}
    assert report.tasks == {"t2i": 5, "edit": 1}
    labels = {"A": 1, "B": 1, "tie": 1, "scored": 1, "ranked": 1, "unlabelled": 1}
    assert report.labels == labels
    assert report.images == 4


def test_duplicates_and_contradictions(folder):
    (folder / "copy.png").write_bytes((folder / "a.png").read_bytes())
    path = write(
        folder,
        pair("p", "a.png", "b.png"),
        pair("p", "b.png", "a.png", (2, 1)),  # the same, the other way round
        pair("p", "copy.png", "b.png", (2, 1)),  # the same bytes, another label
        pair("p", "a.png", "b.png", (1, 1)),  # a tie says otherwise too
        pair("other", "a.png", "b.png", (2, 1)),
        pair("p", "a.png", "c.png"),
        pair("p", "a.png", "copy.png"),
    )
    report = check(path)
    assert report.duplicates == [f"{path}:2: repeats {path}:1"]
    assert report.contradictions == [
        f"{path}:{line}: labelled otherwise than {path}:1" for line in (3, 4)
    ]
    assert report.identical == [f"{path}:7: shows the same image twice"]
    assert not report.passed
    # By name, the copy is another image.
    assert len(check(path, images=False).contradictions) == 1


def test_ranks_of_a_group_contradict_by_order_alone(folder):
    images = ["a.png", "b.png", "c.png"]
    records = [
        {"query": "p", "response": images, "label_rank": [1, 5, 9]},
        {"query": "p", "response": images[::-1], "label_rank": [3, 2, 1]},
        {"query": "p", "response": images, "label_rank": [1, 2, 2]},
    ]
    report = check(write(folder, *records))
    assert [line.split(":")[1] for line in report.duplicates] == ["2"]
    assert [line.split(":")[1] for line in report.contradictions] == ["3"]


def test_an_unlabelled_repeat_does_not_hide_a_contradiction(folder):
    unlabelled = {"query": "p", "response": ["a.png", "b.png"]}
    records = [unlabelled, pair("p", "a.png", "b.png"), pair("p", "a.png", "b.png", (2, 1))]
    report = check(write(folder, *records))
    assert len(report.duplicates) == 1 and len(report.contradictions) == 1


def damaged(folder) -> dict[str, str]:
    """Image file -> what the report must say; None-like "" for files that are fine."""
    (folder / "empty.png").write_bytes(b"")
    chunk = struct.pack(">IIBBBBB", 1, 20_000, 8, 2, 0, 0, 0)
    rows = zlib.compress(b"\0\1\2\3" * 20_000)
    data = b"\x89PNG\r\n\x1a\n"
    for kind, body in ((b"IHDR", chunk), (b"IDAT", rows), (b"IEND", b"")):
        data += struct.pack(">I", len(body)) + kind + body
        data += struct.pack(">I", zlib.crc32(kind + body))
    (folder / "thin.png").write_bytes(data)
    frames = [Image.new("RGB", (8, 8), (90 * i, 0, 0)) for i in range(3)]
    frames[0].save(folder / "moving.gif", save_all=True, append_images=frames[1:])
    picture(folder / "whole.jpg", 5, size=(64, 64))
    whole = (folder / "whole.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.png").write_text("not an image")
    picture(folder / "cmyk.jpg", 6, "CMYK")
    Image.fromarray(np.arange(480, dtype=np.uint16).reshape(20, 24) * 100).save(folder / "deep.png")
    return {
        "empty.png": "0 bytes, expected an encoded image",
        "thin.png": "1x20000 has an aspect ratio over 200:1",
        "moving.gif": "animated or multi-page (3 frames)",
        "cut.jpg": "cannot decode",
        "text.png": "not an image format",
        "cmyk.jpg": "",
        "deep.png": "",
    }


def test_every_bad_image_is_named_with_its_reason(folder):
    expected = damaged(folder)
    records = [pair(f"p{i}", "a.png", name) for i, name in enumerate(expected)]
    records.append(pair("gone", "a.png", "absent.png"))
    path = write(folder, *records)
    report = check(path)
    found = {line.split(":")[1]: line for line in report.unreadable}
    for line, (name, reason) in enumerate(expected.items(), start=1):
        if reason:
            assert name in found[str(line)] and reason in found[str(line)]
    assert len(found) == sum(map(bool, expected.values())) == 5
    missing = f"{path}:8: {folder / 'absent.png'}: No such file or directory"
    assert report.missing == [missing]
    # Without opening images only what the text says is checked.
    assert check(path, images=False).passed


def test_malformed_rows_are_counted_and_the_rest_is_read(folder):
    records = [
        pair("p", "a.png", "b.png"),
        "{",
        pair(" ", "a.png", "b.png"),
        pair("q", "c.png", "d.png"),
    ]
    path = write(folder, *records)
    report = check(path)
    assert report.records == 2
    assert [line.split(":")[1] for line in report.malformed] == ["2", "3"]
    assert "query" in report.malformed[1]


def test_a_list_that_breaks_off_keeps_what_came_before(folder):
    path = folder / "x.json"
    path.write_text(f"[{json.dumps(pair('p', 'a.png', 'b.png'))},\n{{")
    report = check(path)
    assert (report.records, len(report.malformed)) == (1, 1)
    assert "x.json:2: not valid JSON" in report.malformed[0]
    with pytest.raises(ItemError, match="holds no items"):
        check(write(folder))


def test_check_command(folder):
    path = write(folder, pair("p", "a.png", "b.png"), pair("p", "a.png", "no[1].png"))
    report = folder / "report.json"
    result = RUNNER.invoke(app, ["data", "check", str(path), "--json", str(report)])
    assert result.exit_code == 1
    assert "no[1].png" in result.stdout and "FAIL" in result.stdout
    data = json.loads(report.read_text())
    assert data["schema"] == "arr_fast.data_check/1" and data["format"] == "arr"
    assert data["records"] == 2 and len(data["missing"]) == 1 and data["passed"] is False
    good = write(folder, pair("p", "a.png", "b.png"))
    result = RUNNER.invoke(app, ["data", "check", str(good)])
    assert result.exit_code == 0, result.output
    assert "pass" in result.stdout and "1 pair" in result.stdout


def test_convert_command(folder):
    source = write(folder, pair("p", "a.png", "b.png"), "{", pair("q", "c.png", "d.png", (2, 1)))
    out = folder / "there" / "x.parquet"
    arguments = ["data", "convert", str(source), str(out), "--to", "pickapic"]
    result = RUNNER.invoke(app, arguments)
    assert result.exit_code == 1 and "pairs.jsonl:2: not valid JSON" in result.output
    assert not out.exists()
    result = RUNNER.invoke(app, [*arguments, "--skip-errors"])
    assert result.exit_code == 0, result.output
    assert "2 records" in result.output and "skipped" in result.output
    result = RUNNER.invoke(app, [*arguments, "--skip-errors"])
    assert result.exit_code == 1 and "--force overwrites it" in result.output
    back = folder / "back.jsonl"
    result = RUNNER.invoke(app, ["data", "convert", str(out), str(back)])
    assert result.exit_code == 0, result.output
    first, second = map(json.loads, back.read_text().splitlines())
    assert (first["label_rank"], second["label_rank"]) == ([1, 2], [2, 1])
    written = folder / first["response"][0]
    assert written.read_bytes() == (folder / "a.png").read_bytes()
    result = RUNNER.invoke(app, ["data", "convert", str(source), str(folder / "x.txt")])
    assert result.exit_code == 1 and "ends in .json or .jsonl" in result.output


def test_formats_command():
    result = RUNNER.invoke(app, ["data", "formats"])
    assert result.exit_code == 0
    for name in ("arr", "hpdv3", "editreward_bench", "easy_vqa"):
        assert name in result.stdout


def test_commands_read_any_format(folder):
    from arr_fast.data.items import read_items

    source = write(folder, pair("p", "a.png", "b.png"))
    RUNNER.invoke(app, ["data", "convert", str(source), str(folder / "x.json"), "--to", "hpdv3"])
    (item,) = read_items(folder / "x.json", count=2)
    assert item.images == (str(folder / "a.png"), str(folder / "b.png"))
    (folder / "train.txt").write_text("a cat\n")
    with pytest.raises(ItemError, match=r"train\.txt:1: has 0 images to judge, expected 2"):
        read_items(folder / "train.txt", count=2)


def test_records_on_one_line_are_told_apart(folder):
    """A list on one line finds what the same list on many lines finds."""
    records = [
        pair("p", "a.png", "b.png"),
        pair("p", "a.png", "b.png", (2, 1)),
        pair("p", "a.png", "b.png"),
    ]
    path = folder / "one.json"
    path.write_text(json.dumps(records))
    report = check(path)
    assert report.contradictions == [f"{path}:1#2: labelled otherwise than {path}:1"]
    assert report.duplicates == [f"{path}:1#3: repeats {path}:1"]
    assert [r.name for r in read_records(path)] == ["one.json:1", "one.json:1#2", "one.json:1#3"]
