"""The demo with a judge that sees well: tables, page, progress, and a run that was killed."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from arr_fast.autorubric.demo import DemoOutcome, run_demo
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.rubric import Rubric
from arr_fast.shapes.claims import Claim
from arr_fast.shapes.faithfulness import sample_faithfulness_pairs
from arr_fast.shapes.hidden_preference import HiddenPreference, sample_pairs, scene_keys
from tests.autorubric.fakes import OracleJudge, ScriptedBackend, World, general_writer
from tests.browser import WIDTHS, assert_readable, needs_browser

FAITHFULNESS = 10


def world_of(train: int, untouched: int, seed: int) -> World:
    """The pairs that `run_demo` draws."""
    hidden = HiddenPreference.draw(seed)
    learning = sample_pairs(hidden, train, seed=seed)
    taken = frozenset().union(*(scene_keys(pair.example) for pair in learning))
    testing = sample_pairs(hidden, untouched, seed=seed + 1, taken=taken)
    assert not {p.example.caption for p in learning} & {p.example.caption for p in testing}
    taken |= frozenset().union(*(scene_keys(pair.example) for pair in testing))
    plain = sample_faithfulness_pairs(FAITHFULNESS, seed=seed, taken=taken)
    return World([*learning, *testing, *plain])


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tuple[DemoOutcome, Path, list[tuple[str, int, int]]]:
    folder = tmp_path_factory.mktemp("demo")
    world = world_of(60, 150, 3)
    stages: list[str] = []
    told: list[tuple[str, int, int]] = []
    outcome = run_demo(
        OracleJudge(world, noise=0.5),
        ScriptedBackend(general_writer(world)),
        folder,
        train=60,
        untouched=150,
        seed=3,
        resamples=50,
        faithfulness=FAITHFULNESS,
        easy_vqa=False,
        on_stage=stages.append,
        progress=lambda count, total: told.append(
            (stages[-1].split()[0].rstrip(":"), count, total)
        ),
    )
    return outcome, folder, told


def test_the_demo_recovers_a_hidden_preference(done) -> None:
    """The learned rubric nears the oracle; tables and page exist."""
    found, folder, _ = done
    measures = {name: m["debiased"].value for name, m in found.comparison.measures.items()}
    assert measures["selected"] > measures["all verified"] > measures["no rubric"]
    assert found.comparison.oracle is not None and found.comparison.closed is not None
    assert found.comparison.oracle.value >= measures["selected"] - 0.05
    document = json.loads((folder / "demo.json").read_text())
    assert document["comparison"]["measures"].keys() == measures.keys()
    # The rubric that was saved says by itself what was measured.
    rubric = Rubric.load(folder / "rubric.yaml")
    weights = np.array([c.weight for c in rubric.criteria])
    np.testing.assert_allclose(weights, [c.weight for c in found.selection.rubric.criteria])


def test_the_plain_question_is_measured_where_faithfulness_decides(done) -> None:
    found, folder, _ = done
    pairs = sample_faithfulness_pairs(200, seed=0)
    for pair in pairs:
        truths = [Claim("faithful").truth(s, pair.example.context) for s in pair.example.scenes]
        assert truths == [pair.preferred == 1, pair.preferred == 2]
    assert 70 < sum(pair.preferred == 1 for pair in pairs) < 130
    assert len({pair.example.caption for pair in pairs}) == 200
    # The fake judge reads the plain question as "matches the caption", with noise and bias.
    accuracy = json.loads((folder / "demo.json").read_text())["faithfulness"]["value"]
    assert accuracy == 1.0
    (gate,) = (gate for gate in found.comparison.gates if gate.name.startswith("fair"))
    assert gate.passed and "| 10 caption-faithfulness pairs" in found.text


def test_tables_have_the_papers_form_with_intervals(done) -> None:
    _, folder, _ = done
    text = (folder / "tables.md").read_text()
    heads = {
        "Evaluator accuracy": "|  | hidden preference, mean of both orders | orders averaged |",
        "Position bias": "|  | forward | reverse | mean | gap, points |",
        "Accuracy against the number of criteria K": "| K | greedy | greedy, weighted | random |",
    }
    for title, head in heads.items():
        (block,) = (b for b in text.split("\n\n**") if b.removeprefix("**").startswith(title))
        assert head in block, title
        rows = block.strip().splitlines()[4:]
        assert len(rows) >= 4
        assert all(re.search(r"\d\.\d % \(\d+\.\d to \d+\.\d\)", row) for row in rows), title
    assert [row.split("|")[1].strip() for row in rows][:3] == ["1", "5", "10"]
    assert "McNemar" in text
    page = (folder / "demo.html").read_text()
    assert all(title in page for title in heads) and page.count("<svg") >= 4


def test_every_stage_with_calls_says_how_far_it_is(done) -> None:
    _, _, told = done
    for stage, total in (("draw", 60), ("generate", 60), ("verify", 60), ("evaluate", 150)):
        counts = [count for name, count, of in told if name == stage and of == total]
        assert counts == sorted(counts) and counts[-1] == total and len(counts) >= 5, stage


def test_a_demo_killed_anywhere_repeats_no_call(tmp_path) -> None:
    train, untouched = 16, 20
    settings = AutoRubricSettings(seed=5, criteria=2, structured=5, selected=2, folds=2)
    world = world_of(train, untouched, 5)

    def run(folder: Path, judge: OracleJudge, writer: ScriptedBackend) -> DemoOutcome:
        return run_demo(
            *(judge, writer, folder),
            train=train,
            untouched=untouched,
            seed=5,
            settings=settings,
            resamples=5,
            faithfulness=FAITHFULNESS,
            easy_vqa=False,
        )

    def asked(judge: OracleJudge) -> list[tuple[str, str]]:
        return [(p, text) for call in judge.calls for p, texts in call for text in texts]

    writer = general_writer(world)
    straight, backend = OracleJudge(world), ScriptedBackend(writer)
    run(tmp_path / "straight", straight, backend)
    tables = (tmp_path / "straight" / "tables.md").read_text()
    # In verification, and in the evaluation of the last untouched pairs.
    for kill in (1, len(straight.calls) - 1):
        folder = tmp_path / f"killed{kill}"
        first = OracleJudge(world, kill_after=kill)
        with pytest.raises(KeyboardInterrupt):
            run(folder, first, ScriptedBackend(writer))
        second, again = OracleJudge(world), ScriptedBackend(writer)
        run(folder, second, again)
        assert len(asked(first)) + len(asked(second)) == len(asked(straight))
        assert not set(asked(first)) & set(asked(second))
        assert len(again.asked) < len(backend.asked)
        assert (folder / "tables.md").read_text() == tables


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", WIDTHS)
def test_the_demos_page_fits_phone_and_desktop(done, tmp_path, width) -> None:
    _, folder, _ = done
    shutil.copy(folder / "demo.html", tmp_path / "demo.html")
    assert_readable(tmp_path / "demo.html", width)
