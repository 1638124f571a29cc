"""`arr-fast eval`: arithmetic through a stub judge, resuming, files, and the page in a browser."""

from __future__ import annotations

import csv
import json
import re

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from arr_fast.cli import app, options
from arr_fast.data.record import ItemError, Record
from arr_fast.evals.judging import LogOdds, select_pairs
from arr_fast.evals.measure import evaluate
from arr_fast.evals.report import choose_pairs
from arr_fast.evals.scores import random_criteria
from tests.browser import WIDTHS, assert_readable, needs_browser
from tests.cli.stub_judge import StubJudge

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
HOSTILE = "<script>alert(1)</script> & a scene"
# Grey levels of A and B and people's ranks. The stub prefers the brighter image; 0.25 log-odds of
# position bias turn its two orders against each other where levels differ by less than 64.
PAIRS = [
    (200, 20, (1, 2)),  # A brighter and preferred: right in both orders
    (20, 200, (2, 1)),  # B likewise
    (200, 20, (2, 1)),  # wrong in both orders
    (120, 100, (1, 2)),  # orders disagree: forward right, reverse wrong
    (100, 120, (1, 2)),  # orders disagree: forward right (bias), reverse wrong
    (90, 200, (1, 1)),  # people call it a tie
]


@pytest.fixture
def data(tmp_path):
    records = []
    for number, (first, second, ranks) in enumerate(PAIRS):
        for side, level in (("a", first), ("b", second)):
            Image.new("RGB", (32, 24), (level,) * 3).save(tmp_path / f"{number}{side}.png")
        images = {"image_a": f"{number}a.png", "image_b": f"{number}b.png"}
        records.append({"id": f"p{number}", "prompt": f"{HOSTILE} {number}", **images})
        records[-1]["label_rank"] = ranks
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def run(monkeypatch, judge, *arguments: object):
    monkeypatch.setattr(options, "load_judge", lambda *_, **__: judge)
    return RUNNER.invoke(app, ["eval", *map(str, arguments), "--model", "stub"])


def test_measures_of_the_stub_by_hand(data, monkeypatch):
    folder = data.parent
    files = ("--json", folder / "e.json", "--csv", folder / "e.csv", "--html", folder / "e.html")
    result = run(monkeypatch, StubJudge(), data, *files)
    assert result.exit_code == 0, result.output
    document = json.loads((folder / "e.json").read_text())
    assert document["schema"] == "arr_fast.eval/1"
    assert document["summary"]["pairs"] == 6 and document["summary"]["label_ties"] == 1
    forms = {form["name"]: form for form in document["forms"]}
    assert forms.keys() == {"direct", "criteria"}
    values = {k: v["value"] for k, v in forms["criteria"]["measures"].items()}
    expected = {
        "forward": 4 / 5,
        "reverse": 2 / 5,
        "mean": 3 / 5,
        "both": 2 / 5,
        "debiased": 3 / 5,
        "gap": 2 / 5,
        "consistent": 3 / 5,
        "consistent_right": 2 / 3,
        "position_bias": 0.25,
        "bias_ratio": 0.25 * 5 / ((180 * 3 + 20 * 2) / 255),
        # The preferred image first: right, right, wrong, right, right; second: right, right, wrong.
        "preferred_gap": 2 / 5,
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, abs=1e-6), name
    assert all(c["measures"]["debiased"]["value"] == 3 / 5 for c in document["criteria"])
    assert [row["k"] for row in document["ablation"]] == [1, 5, 10, 20]
    with (folder / "e.csv").open() as handle:
        rows = list(csv.DictReader(handle))
    (row,) = [
        r for r in rows if (r["section"], r["name"], r["measure"]) == ("form", "direct", "gap")
    ]
    assert float(row["value"]) == pytest.approx(2 / 5) and row["pairs"] == "5"
    assert {"rule", "criterion", "ablation", "difference"} <= {r["section"] for r in rows}
    page = (folder / "e.html").read_text()
    assert "<script" not in page and not re.search(r"https?://|url\(", page)
    assert page.count("<svg") == 5 and "People prefer B (p2)" in page


def test_an_interrupted_run_repeats_no_call(data, monkeypatch):
    out = data.parent / "lines.jsonl"
    options_ = ("--out", out, "--batch-size", 2)
    # Two calls (criteria and direct) per batch of two: the third batch never starts.
    result = run(monkeypatch, StubJudge(stop_after=4), data, *options_)
    assert result.exit_code == 130
    assert len(out.read_text().splitlines()) == 4
    judge = StubJudge()
    report = data.parent / "e.json"
    result = run(monkeypatch, judge, data, *options_, "--json", report)
    assert result.exit_code == 0, result.output
    asked = [prompt for _, prompts in judge.calls for prompt in prompts]
    assert asked == [f"{HOSTILE} {number}" for number in (4, 5)] * 2
    resumed = json.loads(report.read_text())
    assert resumed["summary"]["resumed"] == 4
    judge = StubJudge()
    assert run(monkeypatch, judge, data, *options_, "--json", report).exit_code == 0
    assert judge.calls == []
    assert json.loads(report.read_text())["forms"] == resumed["forms"]


def test_labels_come_from_the_file_not_from_old_lines(data, monkeypatch):
    out, report = data.parent / "lines.jsonl", data.parent / "e.json"
    run(monkeypatch, StubJudge(), data, "--out", out)
    swapped = data.read_text().replace('"label_rank": [2, 1]', '"label_rank": [1, 2]')
    data.write_text(swapped)
    judge = StubJudge()
    assert run(monkeypatch, judge, data, "--out", out, "--json", report).exit_code == 0
    assert judge.calls == []
    form = json.loads(report.read_text())["forms"][-1]
    # Pair 1 is now wrong, pair 2 right.
    assert form["measures"]["forward"]["value"] == pytest.approx(4 / 5)
    assert form["measures"]["reverse"]["value"] == pytest.approx(2 / 5)
    assert form["measures"]["preferred_second"]["value"] == pytest.approx(2 / 5)


def test_a_pair_that_fails_is_named_and_left_out(data, monkeypatch):
    (data.parent / "2a.png").write_bytes(b"")
    report = data.parent / "e.json"
    judge = StubJudge(fail_on=f"{HOSTILE} 4")
    result = run(monkeypatch, judge, data, "--json", report)
    assert result.exit_code == 1
    assert "p2: " in result.output and "0 bytes" in result.output
    assert "p4: refused" in result.output
    document = json.loads(report.read_text())
    assert document["summary"]["decided"] == 3
    assert document["summary"]["status"]["error"] == 2


def test_the_gate_and_the_options(data, monkeypatch):
    good = run(monkeypatch, StubJudge(), data, "--min-accuracy", 0.6)
    assert good.exit_code == 0, good.output
    bad = run(monkeypatch, StubJudge(), data, "--min-accuracy", 0.61)
    assert bad.exit_code == 1 and "is under --min-accuracy 0.61" in bad.output
    odd = run(monkeypatch, StubJudge(), data, "--forms", "direct,other")
    assert odd.exit_code == 1 and "--forms: expected some of" in odd.output
    data.write_text('{"prompt": "p", "images": ["0a.png", "0b.png"]}\n')
    bare = run(monkeypatch, StubJudge(), data)
    assert bare.exit_code == 1 and "no labelled pair among 1 records" in bare.output


def test_single_images_with_questions(data, monkeypatch):
    path = data.parent / "points.jsonl"
    rows = [
        {"query": "an image", "response": f"{i}a.png", "criterion": f"Is it {i}?", "label_score": y}
        for i, y in enumerate((1, 0, 1, 1))
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = data.parent / "e.json"
    result = run(monkeypatch, StubJudge(), path, "--json", report)
    assert result.exit_code == 0, result.output
    measures = json.loads(report.read_text())["measures"]
    # The stub's log-odds are the brightness: never negative, so it says yes to all.
    assert measures["accuracy"]["value"] == 0.75 and measures["said_yes"]["value"] == 1.0
    assert (measures["yes_right"]["value"], measures["no_right"]["value"]) == (1.0, 0.0)
    levels = np.array([200, 20, 200, 120]) / 255
    p = 1 / (1 + np.exp(-levels))
    expected = np.mean((np.array([1, 0, 1, 1]) - p) ** 2)
    assert measures["brier"]["value"] == pytest.approx(expected, abs=1e-6)


def test_groups_are_taken_apart_and_resampled_together():
    group = Record("g", "p", ("a", "b", "c"), label_rank=(2, 1, 2))
    loose = Record("x", "q", ("a", "b"), label_rank=(1, 2), group="h")
    chosen = select_pairs([group, loose, Record("y", "r", ("a", "b")), Record("z", "s")])
    assert [(p.name, p.preference) for p in chosen.pairs] == [
        ("g[0,1]", -1),
        ("g[0,2]", 0),
        ("g[1,2]", 1),
        ("x", 1),
    ]
    assert len(set(chosen.clusters)) == 2 and chosen.unlabelled == 2
    with pytest.raises(ItemError, match="no labelled pair"):
        select_pairs([Record("z", "s")])


def log_odds(ab, ba, **more: object) -> LogOdds:
    ab, ba = np.array(ab, dtype=float), np.array(ba, dtype=float)
    ids = tuple(tuple(f"c{k}" for k in range(int(np.isfinite(row).sum()))) for row in ab)
    weights = np.where(np.isfinite(ab), 1.0, 0.0)
    essential = np.zeros(ab.shape, bool)
    return LogOdds(ids, ab, ba, weights, essential, None, None, ({},) * len(ab), **more)


def test_rubrics_of_different_lengths():
    """The second pair has one criterion: it counts in c0 and not in c1."""
    odds = log_odds([[2, -4], [1, np.nan]], [[-2, 4], [1, np.nan]])
    found = evaluate(odds, [1, -1], ["a", "b"], resamples=0)
    by_name = {m.name: m for m in found.criteria}
    assert (by_name["c0"].pairs, by_name["c1"].pairs) == (2, 1)
    assert by_name["c1"].measures["debiased"].value == 0.0
    # (2 - 4) / 2 = -1 for A preferred: wrong; forward 1, reverse -1 for B preferred: no preference.
    (form,) = found.forms
    np.testing.assert_allclose(form.scores.score, [-1.0, 0.0])
    assert form.measures["debiased"].value == 0.25
    # With the first criterion alone the first pair is right.
    assert found.ablation[0][0] == 1
    assert found.ablation[0][1]["debiased"].value == 0.75


def test_learned_weights_do_not_see_their_own_fold():
    """Criterion 0 is noise of large size, criterion 1 tells: cross-fitted weights find out."""
    rng = np.random.default_rng(0)
    label = rng.choice([-1, 1], 200)
    x = np.stack([rng.normal(0, 5, 200), label * rng.normal(0.8, 0.5, 200)], axis=1)
    found = evaluate(log_odds(x, -x), label.tolist(), list(range(200)), resamples=0)
    accuracy = {rule.name: rule.measures["debiased"].value for rule in found.rules}
    assert accuracy["learned (cross-fitted)"] > 0.9 > 0.7 > accuracy["log_odds_mean"]
    # Labels that nothing explains are not learned: in-sample this would be far above a coin.
    noise = rng.normal(0, 1, (60, 20))
    found = evaluate(log_odds(noise, -noise), label[:60].tolist(), list(range(60)), resamples=0)
    accuracy = {rule.name: rule.measures["debiased"].value for rule in found.rules}
    assert accuracy["learned (cross-fitted)"] < 0.7


def test_the_pairs_worth_seeing():
    ab = np.array([[3.0], [1.0], [-5.0], [2.0], [2.0], [1.0]])
    ba = np.array([[-3.0], [-1.0], [5.0], [1.0], [-2.0], [4.0]])
    labels = [1, 1, 1, 1, -1, 0]
    (form,) = evaluate(log_odds(ab, ba), labels, list(range(6)), resamples=0).forms
    shown = {part.heading.split(",")[0]: part.places for part in choose_pairs(form, labels, 8, 0)}
    assert shown == {"Mistakes": (2, 4), "The two orders disagree": (3,), "Right": (0, 1)}
    assert choose_pairs(form, labels, 0, 0) == []


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_phone_and_desktop(data, monkeypatch, width):
    """Nothing overflows sideways (wide tables scroll inside), text is readable, plots are drawn."""
    page = data.parent / "page.html"
    result = run(monkeypatch, StubJudge(), data, "--html", page)
    assert result.exit_code == 0, result.output
    assert page.read_text().count("<svg") == 5
    assert_readable(page, width)


def test_random_criteria_are_drawn_from_each_pair_own():
    """A rubric of two keeps its two beside one of six, and equal rubrics keep the same ones."""
    table = np.arange(24.0).reshape(4, 6) + 1
    table[1, 2:] = np.nan
    odds = log_odds(table, -table)
    for seed in range(20):
        found = random_criteria(odds, 2, np.random.default_rng(seed))
        assert found.ids[1] == ("c0", "c1")
        np.testing.assert_array_equal(found.ab[1], table[1, :2])
        kept = [int(name[1:]) for name in found.ids[0]]
        assert kept == sorted(set(kept)) and len(kept) == 2
        for row in (0, 2, 3):
            assert found.ids[row] == found.ids[0]
            np.testing.assert_array_equal(found.ab[row], table[row, kept])
            np.testing.assert_array_equal(found.ba[row], -table[row, kept])
