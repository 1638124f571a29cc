"""`compare`, `score` and `rank`: inputs, output files, resuming, exit codes, one-line errors."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from arr_fast.cli import app, options
from arr_fast.cli.session import run
from arr_fast.data.items import InputItem
from arr_fast.rubric import Rubric
from tests.cli.stub_judge import StubJudge

RUNNER = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.fixture
def stub(monkeypatch):
    judge = StubJudge()
    monkeypatch.setattr(options, "load_judge", lambda *args, **kwargs: judge)
    return judge


@pytest.fixture
def folder(tmp_path):
    """Images named by their brightness, 00.png to 09.png, and a source."""
    for level in range(10):
        Image.new("RGB", (8, 8), (25 * level,) * 3).save(tmp_path / f"{level:02}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "source.png")
    (tmp_path / "rubric.yaml").write_text(
        "name: r\ncriteria:\n  - {id: bright, text: It is bright.}\n  - {id: b2, text: Very.}\n"
    )
    return tmp_path


def call(*arguments: object):
    return RUNNER.invoke(app, [str(a) for a in arguments])


def write_items(path, records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def pairs_file(folder, count=5):
    records = [
        {"id": f"p{i}", "prompt": f"scene {i}", "image_a": "05.png", "image_b": f"{i:02}.png"}
        for i in range(count)
    ]
    return write_items(folder / "pairs.jsonl", records)


def test_one_pair_by_options(stub, folder):
    out = folder / "result.json"
    result = call(
        "compare",
        *("--prompt", "a lamp", "--a", folder / "09.png", "--b", folder / "01.png"),
        *("--rubric", folder / "rubric.yaml", "--json", out),
    )
    assert result.exit_code == 0, result.output
    assert "a lamp" in result.stdout and "bright" in result.stdout
    data = json.loads(out.read_text())
    assert data["schema"] == "arr_fast.compare/1"
    assert data["summary"]["status"] == {"ok": 1}
    (item,) = data["items"]
    z = (9 - 1) * 25 / 255
    assert item["winner"] == "A"
    assert item["score"] == pytest.approx(z)
    assert [c["id"] for c in item["criteria"]] == ["bright", "b2"]
    assert item["criteria"][0]["preference"] == pytest.approx(z)
    assert item["criteria"][0]["position_bias"] == pytest.approx(0.25)
    assert item["reward"] == pytest.approx([1.0, -0.1])
    assert item["provenance"]["revision"] == "r1"


def test_many_pairs_write_one_line_each(stub, folder):
    out = folder / "out.jsonl"
    result = call(
        "compare", pairs_file(folder), "--rubric", folder / "rubric.yaml", "--out", out,
        "--batch-size", 2,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [f"p{i}" for i in range(5)]
    # The last pairs differ by less than the stub's position bias: their orders disagree.
    assert [line["winner"] for line in lines] == ["A"] * 3 + ["tie"] * 2
    assert [len(prompts) for _, prompts in stub.calls] == [2, 2, 1]
    assert len({line["identity"] for line in lines}) == 5


def test_a_second_run_judges_nothing_again(stub, folder):
    out, report = folder / "out.jsonl", folder / "r.json"
    arguments = ("compare", pairs_file(folder), "--rubric", folder / "rubric.yaml", "--out", out)
    assert call(*arguments).exit_code == 0
    before = out.read_text()
    stub.calls.clear()
    result = call(*arguments, "--json", report)
    assert result.exit_code == 0, result.output
    assert stub.calls == [] and out.read_text() == before
    data = json.loads(report.read_text())
    assert data["summary"]["resumed"] == 5 and len(data["items"]) == 5


@pytest.mark.parametrize(
    "change", ["image", "prompt", "rubric", "orders", "calibration", "impl", "device"]
)
def test_what_can_move_a_number_is_judged_again(stub, folder, change):
    out = folder / "out.jsonl"
    items = pairs_file(folder)
    arguments = ["compare", items, "--rubric", folder / "rubric.yaml", "--out", out]
    assert call(*arguments).exit_code == 0
    stub.calls.clear()
    again = 5
    if change == "image":
        Image.new("RGB", (8, 8), (1, 2, 3)).save(folder / "02.png")
        again = 1
    elif change == "prompt":
        items.write_text(items.read_text().replace("scene 3", "scene three"))
        again = 1
    elif change == "rubric":
        text = (folder / "rubric.yaml").read_text()
        (folder / "rubric.yaml").write_text(text.replace("Very.", "Very much."))
    elif change == "calibration":
        rubric = Rubric.load(folder / "rubric.yaml")
        other = rubric.with_calibration("other", "veto", temperature=2.0, margin=0.0)
        other.save(folder / "rubric.yaml")
        assert call(*arguments).exit_code == 0 and stub.calls == []
        fitted = rubric.with_calibration("r1", "log_odds_mean", temperature=2.0, margin=0.0)
        fitted.save(folder / "rubric.yaml")
    elif change == "impl":
        stub.engine.impl = "another"
    elif change == "device":
        stub.engine.loaded.device = "cuda:0"
    else:
        arguments += ["--orders", "AB"]
    assert call(*arguments).exit_code == 0
    assert sum(len(prompts) for _, prompts in stub.calls) == again


def test_interrupted_run_goes_on(stub, folder):
    out = folder / "out.jsonl"
    stub.stop_after = 2
    arguments = (
        "compare", pairs_file(folder), "--rubric", folder / "rubric.yaml", "--out", out,
        "--batch-size", 1,
    )  # fmt: skip
    result = call(*arguments)
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert len(out.read_text().splitlines()) == 2
    # A crash in the middle of a line leaves half of it.
    with out.open("a") as handle:
        handle.write(out.read_text().splitlines()[0][:70])
    stub.stop_after = None
    stub.calls.clear()
    assert call(*arguments).exit_code == 0
    assert [prompts for _, prompts in stub.calls] == [["scene 2"], ["scene 3"], ["scene 4"]]
    assert [json.loads(x)["id"] for x in out.read_text().splitlines()] == [
        f"p{i}" for i in range(5)
    ]


@pytest.mark.parametrize("content", ["my notes", "my notes\n", '{"a": 1}\n', '{"a": 1}'])
def test_a_foreign_output_file_is_left_alone(stub, folder, content):
    out = folder / "notes.jsonl"
    out.write_text(content)
    result = call("compare", pairs_file(folder), "--rubric", folder / "rubric.yaml", "--out", out)
    assert result.exit_code == 1 and "not written by arr-fast" in result.stderr
    assert out.read_text() == content


def test_repeated_items_each_get_a_line(stub, folder):
    record = {"prompt": "x", "image_a": "05.png", "image_b": "01.png"}
    items = write_items(folder / "i.jsonl", [record, record])
    out = folder / "out.jsonl"
    for _ in range(2):
        result = call("compare", items, "--rubric", folder / "rubric.yaml", "--out", out)
        assert result.exit_code == 0
        assert len(out.read_text().splitlines()) == 2
    assert len(stub.calls) == 1


def test_bad_items_fail_alone_and_are_retried(stub, folder):
    items = pairs_file(folder, count=4)
    (folder / "01.png").write_bytes(b"junk")
    (folder / "02.png").unlink()
    stub.fail_on = "scene 3"
    out = folder / "out.jsonl"
    arguments = ("compare", items, "--rubric", folder / "rubric.yaml", "--out", out)
    result = call(*arguments)
    assert result.exit_code == 1
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["status"] for line in lines] == ["ok", "error", "error", "error"]
    assert "p1: image 1" in lines[1]["error"] and "02.png" in lines[2]["error"]
    assert lines[3]["error"] == "refused"
    assert "p1" in result.stdout and "Traceback" not in result.output
    Image.new("RGB", (8, 8)).save(folder / "01.png")
    Image.new("RGB", (8, 8)).save(folder / "02.png")
    stub.fail_on = None
    assert call(*arguments).exit_code == 0
    assert len(out.read_text().splitlines()) == 7


def test_a_line_that_cannot_be_read_stops_nothing(stub, folder):
    names = ["02.png", "broken.dds", "nul\0.png", "\ud800.png"]
    # A pixel format that Pillow has not implemented, and says so.
    sizes = struct.pack("<7I", 124, 0x1007, 64, 64, 0, 0, 0) + bytes(44)
    pixel_format = struct.pack("<2I4s5I", 32, 4, b"ABCD", 0, 0, 0, 0, 0)
    (folder / "broken.dds").write_bytes(b"DDS " + sizes + pixel_format + bytes(20))
    out = folder / "out.jsonl"
    items = [
        InputItem(f"p{i}", "x", (f"{folder}/01.png", f"{folder}/{name}"))
        for i, name in enumerate([*names, "03.png"])
    ]
    outcome = run(
        items,
        lambda batch: [{"status": "ok"} for _ in batch],
        command="compare",
        rubric_of=lambda item: Rubric.load(folder / "rubric.yaml"),
        settings={"revision": "r1"},
        batch_size=1,
        out=out,
        console=options.err_console,
    )
    assert outcome.counts == {"ok": 2, "error": 3}
    for number in (1, 2, 3):
        assert outcome.results[number]["error"].startswith(f"p{number}: image 1: ")
    assert [json.loads(line) for line in out.read_text().splitlines()] == outcome.results


def test_a_name_that_is_not_unicode_is_written_and_read_back(stub, folder):
    """A file name of other bytes reaches Python with lone surrogates."""
    odd = os.fsdecode(os.fsencode(folder) + b"/caf\xe9.png")
    Image.new("RGB", (8, 8), (250,) * 3).save(odd, "PNG")
    out, report = folder / "out.jsonl", folder / "r.json"
    common = ("--prompt", "x", "--rubric", folder / "rubric.yaml", "--json", report)
    for _ in range(2):
        result = call("compare", "--a", odd, "--b", folder / "01.png", "--out", out, *common)
        assert result.exit_code == 0, result.output
    (line,) = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    (item,) = json.loads(report.read_text(encoding="utf-8"))["items"]
    assert line["images"][0] == item["images"][0] == odd
    assert len(stub.calls) == 1
    # The table of a ranking names its images.
    result = call("rank", odd, folder / "01.png", *common)
    assert result.exit_code == 0, result.output
    assert r"caf\udce9.png" in "".join(result.stdout.split())


def test_edits_and_captions_may_share_a_file(stub, folder):
    records = [
        {"prompt": "a", "image_a": "01.png", "image_b": "02.png"},
        {"prompt": "b", "image_a": "01.png", "image_b": "02.png", "source": "source.png"},
        {"prompt": "c", "image_a": "03.png", "image_b": "02.png"},
    ]
    report = folder / "r.json"
    result = call("compare", write_items(folder / "i.jsonl", records), "--json", report)
    assert result.exit_code in (0, 1), result.output
    if result.exit_code == 0:
        assert stub.calls == [("t2i", ["a", "c"]), ("edit", ["b"])]
        assert [i["prompt"] for i in json.loads(report.read_text())["items"]] == ["a", "b", "c"]
    else:
        assert "no builtin rubric" in result.stderr


def test_rubric_per_item(stub, folder):
    (folder / "other.yaml").write_text("name: o\ncriteria: [{id: only, text: One.}]\n")
    record = {"prompt": "a", "image_a": "01.png", "image_b": "02.png", "rubric": "other.yaml"}
    report = folder / "r.json"
    items = write_items(folder / "i.jsonl", [record])
    assert call("compare", items, "--rubric", "t2i", "--json", report).exit_code == 0
    criteria = json.loads(report.read_text())["items"][0]["criteria"]
    assert [c["id"] for c in criteria] == ["only"]


def test_score(stub, folder):
    report = folder / "r.json"
    result = call(
        "score", "--prompt", "x", "--image", folder / "04.png",
        "--rubric", folder / "rubric.yaml", "--json", report,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    (item,) = json.loads(report.read_text())["items"]
    expected = 1 / (1 + np.exp(-4 * 25 / 255))
    assert item["score"] == pytest.approx(expected)
    assert [c["probability"] for c in item["criteria"]] == pytest.approx([expected] * 2)


def test_rank_by_options_and_by_file(stub, folder):
    report = folder / "r.json"
    images = [folder / f"{i:02}.png" for i in (3, 9, 1)]
    common = ("--rubric", folder / "rubric.yaml", "--json", report)
    result = call("rank", *images, "--prompt", "x", *common)
    assert result.exit_code == 0, result.output
    (item,) = json.loads(report.read_text())["items"]
    assert item["ranking"] == [1, 0, 2]
    assert item["win_rate"] == [0.5, 1.0, 0.0]
    record = {"query": "x", "image_paths": ["03.png", "09.png"], "label_rank": [2, 1]}
    items = write_items(folder / "g.jsonl", [record])
    assert call("rank", items, *common).exit_code == 0
    (item,) = json.loads(report.read_text())["items"]
    assert item["ranking"] == [1, 0] and item["label_rank"] == [2, 1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["compare"], "--prompt, --a and --b"),
        (["compare", "--prompt", "x", "--a", "a.png"], "--prompt, --a and --b"),
        (["compare", "--prompt", " ", "--a", "a.png", "--b", "b.png"], "--prompt, --a and --b"),
        (["compare", "gone.jsonl"], "gone.jsonl: cannot read"),
        (["compare", "gone.jsonl", "--prompt", "x"], "not both"),
        (["compare", "x.jsonl", "--aggregation", "mean"], "log_odds_mean"),
        (["compare", "x.jsonl", "--aggregation", "holistic"], "--mode holistic"),
        (["compare", "x.jsonl", "--aggregation", "veto", "--mode", "holistic"], "--mode criteria"),
        (["score", "--prompt", "x"], "--prompt and --image"),
        (["rank", "a.png", "--prompt", "x"], "two or more images"),
        (["verify", "--dtype", "bfloat16"], "--tolerance"),
    ],
)
def test_usage_errors_are_one_line(stub, arguments, expected):
    result = call(*arguments)
    assert result.exit_code == 1
    assert expected in result.stderr and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def test_wrong_rubric_and_model_are_one_line(folder):
    pair = ("--prompt", "x", "--a", folder / "01.png", "--b", folder / "02.png")
    result = call("compare", *pair, "--model", "builtin:nothing")
    assert result.exit_code == 1 and "builtin:shapes" in result.stderr
    assert len(result.stderr.strip().splitlines()) == 1


def test_a_rubric_for_the_other_task_is_named(stub, folder):
    pair = ("--prompt", "x", "--a", folder / "01.png", "--b", folder / "02.png")
    result = call("compare", *pair, "--rubric", "edit")
    assert result.exit_code == 1 and "needs a source image" in result.stderr
    result = call("compare", *pair, "--rubric", "gone")
    assert result.exit_code == 1 and "no builtin rubric 'gone'" in result.stderr


def test_version_and_help():
    assert "arr-fast 0." in call("--version").stdout
    listing = call("--help").stdout
    for name in ("demo", "compare", "score", "rank", "verify", "info", "bench"):
        assert name in listing


def test_info_says_what_runs_and_why_not(tmp_path):
    out = tmp_path / "info.json"
    result = call("info", "--device", "cpu", "--json", out)
    assert result.exit_code == 0, result.output
    data = json.loads(out.read_text())
    assert data["impls"]["torch"] == "available" and data["auto_impl"] == "torch"
    assert "GPU" in data["impls"]["triton"] or "triton" in data["impls"]["triton"]
    assert "qwen3_vl" in data["families"] and "qwen3_vl" in result.stdout
    assert {"t2i", "edit"} <= set(data["rubrics"])
