"""Commands over a real engine with a random checkpoint: exactness is checked, and can fail."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from arr_fast import demo
from arr_fast.cli import app, options
from arr_fast.data.items import InputItem
from arr_fast.errors import ArrFastError
from arr_fast.judge import Judge
from arr_fast.provenance import Provenance
from arr_fast.report import ReportSection, render_report
from arr_fast.rubric import Criterion, Rubric
from arr_fast.verdicts import pair_verdicts

MODEL = "random:qwen3_vl-tiny"
RUNNER = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("items")
    rng = np.random.default_rng(3)
    for i, size in enumerate([(64, 64), (64, 96), (96, 64)]):
        pixels = rng.integers(0, 256, (*size, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path / f"{i}.png")
    records = [
        {"prompt": "a red circle", "image_a": "0.png", "image_b": "1.png"},
        {"prompt": "make it blue", "image_a": "0.png", "image_b": "1.png", "source": "2.png"},
    ]
    (path / "pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return path


def call(*arguments: object):
    return RUNNER.invoke(app, [str(a) for a in arguments])


def test_verify_passes_and_reports(folder):
    report = folder / "verify.json"
    result = call("verify", folder / "pairs.jsonl", "--model", MODEL, "--n", 12, "--json", report)
    assert result.exit_code == 0, result.output
    data = json.loads(report.read_text())
    assert data["passed"] and len(data["verdicts"]) == 12
    assert data["largest_difference"] == max(v["difference"] for v in data["verdicts"])
    assert 0 < data["largest_difference"] <= 1e-4
    assert {v["order"] for v in data["verdicts"]} == {"AB", "BA", "point"}
    assert {v["item"] for v in data["verdicts"]} == {0, 1}
    # A difference is worth something only where the log-odds are not all near zero.
    assert np.std([v["engine"] for v in data["verdicts"]]) > 0.3


@pytest.mark.compile
def test_verify_holds_for_compiled_layers(folder):
    result = call(
        *("verify", folder / "pairs.jsonl", "--model", MODEL, "--n", 6, "--compile", "on"),
        *("--json", folder / "compiled.json"),
    )
    assert result.exit_code == 0, result.output
    assert 0 < json.loads((folder / "compiled.json").read_text())["largest_difference"] <= 1e-4


@pytest.mark.parametrize(
    ("arguments", "compiles"), [([], False), (["auto"], "auto"), (["on"], True)]
)
def test_commands_say_what_is_compiled(folder, monkeypatch, arguments, compiles):
    asked = []

    def load(**options):
        asked.append(options)
        raise ArrFastError("enough")

    monkeypatch.setattr(Judge, "from_pretrained", load)
    for command in (["compare", folder / "pairs.jsonl"], ["verify", folder / "pairs.jsonl"]):
        result = call(*command, "--model", MODEL, *(["--compile", *arguments] if arguments else []))
        assert result.exit_code == 1 and "enough" in result.stderr
    assert [options["compile"] for options in asked] == [compiles, compiles]


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_verify_fails_on_a_wrong_verdict(folder, monkeypatch, error):
    genuine = Judge.trace

    def wrong(self, *args, **kwargs):
        traces = genuine(self, *args, **kwargs)
        return [
            replace(t, log_odds=t.log_odds + error * (i % 3 == 0)) for i, t in enumerate(traces)
        ]

    monkeypatch.setattr(Judge, "trace", wrong)
    result = call("verify", folder / "pairs.jsonl", "--model", MODEL, "--n", 12)
    assert result.exit_code == 1
    assert "FAIL" in result.stdout


def test_verify_names_the_pair_of_an_image_that_it_cannot_read(folder, tmp_path):
    (tmp_path / "bad.png").write_bytes(b"junk")
    good = {"prompt": "x", "image_a": f"{folder}/0.png", "image_b": f"{folder}/1.png"}
    bad = {**good, "id": "second", "image_b": "bad.png"}
    items = tmp_path / "pairs.jsonl"
    items.write_text(json.dumps(good) + "\n" + json.dumps(bad) + "\n")
    result = call("verify", items, "--model", MODEL, "--n", 200)
    assert result.exit_code == 1 and "second: image 1: not an image" in result.stderr


def test_compare_equals_the_library(folder):
    report = folder / "compare.json"
    result = call("compare", folder / "pairs.jsonl", "--model", MODEL, "--json", report)
    assert result.exit_code == 0, result.output
    first, second = json.loads(report.read_text())["items"]
    judge = Judge.from_pretrained(MODEL, dtype="float32")
    images = [folder / "0.png"], [folder / "1.png"]
    own = judge.compare(["a red circle"], *images, Rubric.default("t2i"))
    np.testing.assert_allclose(
        [c["preference"] for c in first["criteria"]], own.preference[0], atol=2e-5
    )
    own = judge.compare(["make it blue"], *images, sources=[folder / "2.png"])
    np.testing.assert_allclose(
        [c["preference"] for c in second["criteria"]], own.preference[0], atol=2e-5
    )
    assert second["source"].endswith("2.png")


def test_demo_counts_forwards_and_compares_with_separate_calls(folder):
    judge = Judge.from_pretrained(MODEL, dtype="float32")
    rubric = Rubric(
        name="r", criteria=tuple(Criterion(id=f"c{i}", text=f"Statement {i}.") for i in range(5))
    )
    items = [InputItem("x", "a red circle", (str(folder / "0.png"), str(folder / "1.png")))] * 2
    result = demo.run_demo(judge, items, rubric)
    assert result.forwards == 1
    assert result.cost.criteria == 5
    assert 0 <= result.cost.difference <= 1e-4
    assert result.cost.separate > result.cost.single > 0
    page = render_report([ReportSection("x", result.pairs, result.verdicts)], title="t")
    assert page.count("<article>") == 2 and page.count("<li>") == 10


def test_demo_fails_on_a_difference_that_is_no_number(tmp_path, monkeypatch):
    def verdicts(log_odds):
        odds = np.array([log_odds])
        return pair_verdicts(odds, -odds, provenance=Provenance("m", "r", (), 1))

    together = verdicts([1.0, 2.0, 3.0])
    difference = demo._largest_difference(together, [verdicts([z]) for z in (1.5, np.nan, 3.0)])
    assert np.isnan(difference)
    cost = demo.Cost(1.0, 1.0, 1.0, 3, difference)
    result = demo.DemoResult((), (None,), together, 1, cost)
    monkeypatch.setattr(demo, "run_demo", lambda *_: result)
    monkeypatch.setattr(options, "load_judge", lambda *_, **__: None)
    report = tmp_path / "demo.json"
    outcome = call("demo", "--json", report)
    assert outcome.exit_code == 1
    data = json.loads(report.read_text(), parse_constant=pytest.fail)
    assert not data["exact"] and data["runs"][0]["largest_difference"] is None


def test_bench_judge_writes_its_rows(tmp_path):
    report, table = tmp_path / "bench.json", tmp_path / "bench.csv"
    result = call(
        "bench", "judge", "--model", MODEL, "--workload", "smoke", "--engines", "ours,transformers",
        "--repeats", 1, "--no-memory", "--json", report, "--csv", table,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads(report.read_text())["rows"]
    assert [row["engine"] for row in rows] == ["ours", "transformers"]
    assert [row["gate"] for row in rows] == ["passed", "reference"]
    assert all(row["seconds"] > 0 for row in rows)
    assert len(table.read_text().splitlines()) == 3
    result = call("bench", "judge", "--engines", "nope")
    assert result.exit_code == 1 and "unknown engine 'nope'" in result.stderr


def test_demo_on_the_bundled_judge(tmp_path):
    html, report = tmp_path / "demo.html", tmp_path / "demo.json"
    result = call("demo", "--html", html, "--json", report)
    assert result.exit_code == 0, result.output
    data = json.loads(report.read_text())
    assert data["exact"] and data["runs"][0]["criteria"] == 20
    assert data["runs"][0]["forwards"] == 1
    assert "reward" in result.stdout and "20 separate calls" in result.stdout
    assert html.read_text().count("<li>") >= 20


def test_verify_on_the_bundled_judge():
    result = call("verify", "--n", 20)
    assert result.exit_code == 0, result.output
