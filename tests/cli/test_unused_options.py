"""Options that another option makes meaningless are refused, and none is dropped in silence."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from arr_fast.bench import judge as judge_bench
from arr_fast.cli import app
from tests.autorubric.stand_in import standing_in

RUNNER = CliRunner(env={"COLUMNS": "160", "NO_COLOR": "1"})


def call(*arguments: object):
    return RUNNER.invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["bench", "judge", "--workload", "smoke-sweep", "--png", "x.png"], "--png needs --csv"),
        (["bench", "judge", "--csv", "x.csv", "--png", "x.png"], "NAME-sweep"),
        (
            ["bench", "rpo", "--judge", "builtin:shapes", "--judge-seconds", "0.05"],
            "--judge-seconds is for the judge that sleeps",
        ),
        (["rubric", "run", "x", "--dir", "y", "--writer-model", "m"], "need --writer openai"),
        (["rubric", "generate", "x", "--dir", "y", "--base-url", "u"], "need --writer openai"),
    ],
)
def test_what_would_be_ignored_is_refused(tmp_path, monkeypatch, arguments, expected) -> None:
    monkeypatch.chdir(tmp_path)
    result = call(*arguments)
    assert result.exit_code == 1
    assert expected in result.stderr and "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_plot_that_was_not_drawn_is_an_error(tmp_path, monkeypatch) -> None:
    nothing = judge_bench.JudgeBench((), (), None)
    monkeypatch.setattr(judge_bench, "run_judge_bench", lambda *_, **__: nothing)
    files = ("--csv", tmp_path / "x.csv", "--png", tmp_path / "x.png")
    result = call("bench", "judge", "--workload", "smoke,design9", *files)
    assert result.exit_code == 1 and "x.png was not drawn" in result.stderr


def test_zero_shot_writes_its_json(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    prompts, report = tmp_path / "train.txt", tmp_path / "r.json"
    prompts.write_text("a red circle\na blue square\n")
    criteria = ["There is one shape.", "It is blue."]
    with standing_in(lambda *_: {"text": json.dumps({"criteria": criteria})}) as server:
        result = call(
            *("rubric", "generate", prompts, "--zero-shot", "--dir", tmp_path / "run"),
            *("--writer", "openai", "--writer-model", "m", "--base-url", server.url),
            *("--json", report),
        )
    assert result.exit_code == 0, result.output
    document = json.loads(report.read_text())
    assert document["schema"] == "arr_fast.rubric_prompts/1"
    assert (document["failed"], document["cost"]["calls"]) == (0, 2)
    assert [row["prompt"] for row in document["prompts"]] == ["a red circle", "a blue square"]
    for row in document["prompts"]:
        assert [c["text"] for c in row["rubric"]["criteria"]] == criteria
