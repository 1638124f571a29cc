"""Edits through the whole loop: from files to a rubric for edits, and to its evaluation."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from arr_fast.autorubric.labelled import read_labelled
from arr_fast.autorubric.pipeline import AutoRubric
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.autorubric.structure import candidates_of
from arr_fast.autorubric.templates import TemplateSet
from arr_fast.cli import app, options
from arr_fast.data.record import Record
from arr_fast.data.registry import read_records, write_records
from arr_fast.rubric import Rubric
from arr_fast.shapes.claims import Claim
from arr_fast.shapes.criterion_parser import parse_criterion
from arr_fast.shapes.hidden_preference import HiddenPair
from arr_fast.shapes.pairs import sample_edit_pair
from arr_fast.shapes.render import render
from tests.autorubric.fakes import OracleJudge, ScriptedBackend, World, general_writer
from tests.autorubric.stand_in import standing_in
from tests.cli.stub_judge import StubJudge

RUNNER = CliRunner(env={"COLUMNS": "200", "NO_COLOR": "1"})
WEIGHTS = {"edit_done": 4.0, "edit_kept": 2.0, "sharpness": 1.0}
SETTINGS = AutoRubricSettings(folds=3, selected=4)


def edit_pairs(count: int, seed: int) -> list[HiddenPair]:
    """Edits whose label follows WEIGHTS alone; their instructions differ."""
    rng = np.random.default_rng(seed)
    found: dict[str, HiddenPair] = {}
    while len(found) < count:
        example = sample_edit_pair(rng, "held_out", 0)
        u = [
            sum(w * (Claim(k).truth(s, example.context) is True) for k, w in WEIGHTS.items())
            for s in example.scenes
        ]
        if u[0] != u[1]:
            pair = HiddenPair(example, (u[0], u[1]), 1 if u[0] > u[1] else 2)
            found.setdefault(example.caption, pair)
    return list(found.values())


PAIRS = edit_pairs(30, 11)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("edits")
    records = []
    for number, pair in enumerate(PAIRS):
        scenes = (pair.example.context.source, *pair.example.scenes)
        files = [folder / f"{number}{letter}.png" for letter in "sab"]
        for file, scene in zip(files, scenes, strict=True):
            render(scene, 64).save(file)
        ranks = (1.0, 2.0) if pair.preferred == 1 else (2.0, 1.0)
        source, *images = map(str, files)
        records.append(
            Record(f"{number}", pair.example.caption, tuple(images), source, label_rank=ranks)
        )
    write_records(records, folder / "edits.jsonl", "arr")
    return folder / "edits.jsonl"


def test_edits_become_a_rubric_for_edits(data, tmp_path) -> None:
    reading = read_labelled(read_records(data))
    assert len(reading.pairs) == 30 and {pair.task for pair in reading.pairs} == {"edit"}
    world = World(PAIRS)
    backend, judge = ScriptedBackend(general_writer(world)), OracleJudge(world, noise=0.5)
    loop = AutoRubric(judge, backend, TemplateSet("shapes"), SETTINGS, tmp_path)
    outcomes = loop.refine(loop.verify(loop.generate(reading.pairs)))
    structured = loop.structure(outcomes)
    selection = loop.select(outcomes, structured)
    loop.close()
    # The writer saw the source first, then both edits, under the instruction.
    for request, pair in zip(backend.asked, reading.pairs, strict=False):
        assert request.images == (pair.source, *pair.images)
        assert pair.prompt in "".join(p for p in request.parts if isinstance(p, str))
    rubric = Rubric.load(tmp_path / "rubric.yaml")
    assert rubric.task == "edit" == Rubric.load(tmp_path / "structured.yaml").task
    kinds = [claim.kind for c in rubric.criteria if (claim := parse_criterion(c.text))]
    first = parse_criterion(selection.path[0].text)
    assert "edit_done" in kinds and first is not None and first.kind == "edit_done"
    assert selection.cross_validation.results["l1"].accuracy > 0.8
    assert any("edit" in each.text for each in candidates_of(outcomes, range(30)))


def test_commands_take_edits_through_an_endpoint_to_an_evaluation(
    data, tmp_path, monkeypatch
) -> None:
    judge = OracleJudge(World(PAIRS), noise=0.5)
    monkeypatch.setattr(options, "load_judge", lambda *_, **__: judge)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
    texts = ["The requested change is made.", "Nothing else was changed.", "The image is sharp."]

    def plan(_, body):
        parts = body["messages"][0]["content"]
        if not any(part["type"] == "image_url" for part in parts):
            criteria = [
                {"text": t, "level": "mid", "sources": [n + 1]} for n, t in enumerate(texts)
            ]
            return {"text": json.dumps({"themes": [{"theme": "Edits", "criteria": criteria}]})}
        assert sum(part["type"] == "image_url" for part in parts) == 3
        assert "Instruction: " in parts[0]["text"] and "edits of an image" in parts[0]["text"]
        return {"text": json.dumps({"criteria": texts})}

    folder = tmp_path / "run"
    with standing_in(plan) as server:
        result = RUNNER.invoke(
            app,
            [
                *("rubric", "run", str(data), "--dir", str(folder), "--model", "x", "--folds", "3"),
                *("--writer", "openai", "--writer-model", "m", "--base-url", server.url),
            ],
        )
    assert result.exit_code == 0, result.output
    assert Rubric.load(folder / "rubric.yaml").task == "edit"
    stub, page = StubJudge(), tmp_path / "page.html"
    monkeypatch.setattr(options, "load_judge", lambda *_, **__: stub)
    asked = ["eval", str(data), "--model", "stub", "--rubric", str(folder / "rubric.yaml")]
    result = RUNNER.invoke(app, [*asked, "--html", str(page), "--forms", "direct,criteria"])
    assert result.exit_code == 0, result.output
    assert {kind for kind, _ in stub.calls} == {"edit"}
    shown = page.read_text()
    assert shown.count("<article>") == shown.count('alt="image source"') > 0
