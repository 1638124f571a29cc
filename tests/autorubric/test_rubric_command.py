"""`arr-fast rubric`: stages over one folder, both writers, and what it says when data is bad."""

from __future__ import annotations

import json
from itertools import islice

import pytest
from PIL import Image
from typer.testing import CliRunner

from arr_fast.autorubric import demo
from arr_fast.cli import app, options
from arr_fast.data.registry import read_records
from arr_fast.judge import Judge
from arr_fast.rubric import Criterion, Rubric
from arr_fast.shapes.hidden_preference import HiddenPreference, sample_pairs, write_pairs
from tests.autorubric.fakes import OracleJudge, World
from tests.autorubric.stand_in import standing_in

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
TINY = "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0]"
HIDDEN = sample_pairs(HiddenPreference.draw(2), 12, seed=2)
TEXTS = ["The image is sharp.", "No object is cut off.", "There is no noise in the image."]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_pairs(HIDDEN, tmp_path_factory.mktemp("pairs"))


def call(*arguments: object):
    return RUNNER.invoke(app, ["rubric", *map(str, arguments)])


def judged_by_renderer(monkeypatch) -> OracleJudge:
    judge = OracleJudge(World(HIDDEN))
    monkeypatch.setattr(options, "load_judge", lambda *_, **__: judge)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    return judge


def plan(number, body):
    """An endpoint with troubles: a rate limit, a cut connection, an empty list, half a JSON."""
    text = json.dumps(body["messages"])
    if "listed" in text or "Merge those" in text:
        criteria = [{"text": t, "level": "fine", "sources": [n + 1]} for n, t in enumerate(TEXTS)]
        return {"text": json.dumps({"themes": [{"theme": "Craft", "criteria": criteria}]})}
    if number in (0, 3):
        return ("rate", "cut")[number // 3]
    if number == 5:
        return {"text": '{"criteria": []}'}
    if number == 7:
        return {"text": '{"criteria": ["The image is sha', "finish": "length"}
    return {"text": "```json\n" + json.dumps({"criteria": TEXTS}) + "\n```"}


def test_stages_through_an_endpoint_go_on_from_each_other(data, tmp_path, monkeypatch) -> None:
    judge = judged_by_renderer(monkeypatch)
    folder = tmp_path / "run"
    with standing_in(plan) as server:
        common = [
            *(data, "--dir", folder, "--model", "x", "--writer", "openai", "--folds", 3),
            *("--writer-model", "m", "--base-url", server.url, "--concurrency", 1),
        ]
        made = []
        for stage in ("generate", "verify", "refine", "structure", "select", "run"):
            result = call(stage, *common, "--json", tmp_path / f"{stage}.json")
            assert result.exit_code == 0, result.output
            assert "sk-secret" not in result.output
            made.append((len(server.bodies), len(judge.calls)))
    calls, judgements = zip(*made, strict=True)
    assert calls[0] == 14 and calls[1] == 14 and calls[2] > 14
    assert judgements[0] == 0 and judgements[1] > 0
    assert made[-1] == made[-2], "run repeats nothing"
    report = json.loads((tmp_path / "run.json").read_text())
    assert report["cost"]["writer"]["calls"] == report["cost"]["judge"]["calls"] == 0
    raws = {entry["raw"] for entry in report["verification"]["unusable_answers"]}
    assert raws >= {'{"criteria": []}', '{"criteria": ["The image is sha'}
    assert report["structure"]["method"] == "writer"
    rubric = Rubric.load(folder / "rubric.yaml")
    assert {c.text for c in rubric.criteria} <= set(TEXTS)
    assert "sk-secret" not in "".join(p.read_text() for p in folder.iterdir())
    shown = call("show", folder)
    assert shown.exit_code == 0 and "Craft" in shown.stdout and "discarded" in shown.stdout
    assert "Theme: " in call("show", folder, "--text").stdout


def test_all_stages_through_the_local_backend_of_a_random_qwen(data, tmp_path) -> None:
    common = [data, "--dir", tmp_path, "--model", TINY, "--limit", 2, "-k", 1, "--refinements", 1]
    result = call("refine", *common, "--template-set", "shapes", "--max-tokens", 300)
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    assert len(lines) == 2 and all(line["status"] in ("verified", "discarded") for line in lines)
    assert any(line["criteria"] for line in lines)
    calls = (tmp_path / "calls.jsonl").read_text()
    assert call("refine", *common, "--template-set", "shapes", "--max-tokens", 300).exit_code == 0
    assert (tmp_path / "calls.jsonl").read_text() == calls


def test_zero_shot_writes_a_rubric_per_prompt(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    prompts = tmp_path / "train.txt"
    prompts.write_text("a red circle\na blue square on a <|im_end|> mat\na red circle\n")

    def answer(number, body):
        assert "<|im_end|>" not in json.dumps(body)
        if number == 0:
            return {"text": "sorry"}
        return {"text": json.dumps({"criteria": ["There is one shape.", "Image 1 is better."]})}

    with standing_in(answer) as server:
        result = call(
            "generate", prompts, "--zero-shot", "--dir", tmp_path / "run", "--writer", "openai",
            "--writer-model", "m", "--base-url", server.url, "--concurrency", 1,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        assert len(server.bodies) == 3
    lines = (tmp_path / "run" / "prompt_rubrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 2
    assert [c["text"] for c in rows[0]["rubric"]["criteria"]] == ["There is one shape."]


def test_a_guide_reaches_the_writer_and_a_bad_one_is_named(data, tmp_path, monkeypatch) -> None:
    judged_by_renderer(monkeypatch)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(tmp_path / "a.png")
    guide = tmp_path / "guide.jsonl"
    row = {"prompt": "g", "preferred": "a.png", "dispreferred": "a.png", "rationale": "whole"}
    guide.write_text(json.dumps(row) + "\n")
    with standing_in(plan) as server:
        common = [
            *(data, "--dir", tmp_path / "run", "--model", "x", "--writer", "openai"),
            *("--writer-model", "m", "--base-url", server.url, "--limit", 2, "--guide", guide),
        ]
        assert call("generate", *common).exit_code == 0
        content = server.bodies[-1]["messages"][0]["content"]
        assert sum(part["type"] == "image_url" for part in content) == 4
        guide.write_text(json.dumps({**row, "preferred": "gone.png"}) + "\n")
        result = call("generate", *common)
        assert result.exit_code == 1 and "gone.png" in result.stderr
        result = call("generate", *common, "--template-set", "shapes")
        assert result.exit_code == 1


@pytest.mark.parametrize(
    ("options_", "message"),
    [
        (["--writer", "openai"], "--writer-model"),
        (["--criteria", "0"], "criteria"),
        (["--template-set", "nope"], "default, shapes"),
        (["--specific"], "general criteria"),
        (["--zero-shot"], "option of generate"),
    ],
)
def test_what_makes_no_sense_is_one_line(data, tmp_path, monkeypatch, options_, message) -> None:
    judged_by_renderer(monkeypatch)
    result = call("structure", data, "--dir", tmp_path, "--model", "x", *options_)
    assert result.exit_code == 1 and message in result.stderr
    assert "Traceback" not in result.stderr


def test_the_demo_measures_single_images_and_goes_on_from_its_file(tmp_path, monkeypatch) -> None:
    judge = Judge.from_pretrained(TINY, device="cpu")
    records = list(islice(read_records("easy-vqa:test"), 12))
    monkeypatch.setattr(demo, "read_records", lambda _: records)
    found = demo._easy_vqa(judge, tmp_path, 10, 0)
    right = []
    for record in records:
        rubric = Rubric(name="q", criteria=(Criterion(id="q", text=record.criterion),))
        odds = judge.score([record.prompt], [str(record.images[0])], rubric).log_odds[0, 0]
        right.append((odds > 0) == (record.label_score == 1.0))
    assert found["accuracy"].value == pytest.approx(sum(right) / 12)
    forwards = judge.stats()["forwards"]
    assert demo._easy_vqa(judge, tmp_path, 10, 0) == found
    assert judge.stats()["forwards"] == forwards


def test_show_warns_about_vague_criteria(tmp_path) -> None:
    path = tmp_path / "r.yaml"
    path.write_text("name: r\ncriteria:\n  - {id: a, text: It looks good.}\n")
    result = call("show", path)
    assert result.exit_code == 0 and "no criterion names a checkable property" in result.stderr
    assert call("show", tmp_path).exit_code == 1
