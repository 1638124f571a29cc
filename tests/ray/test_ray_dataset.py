"""The actor pool: its rows in process, then two actors over parquet and jsonl."""

from __future__ import annotations

import json
import os

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from arr_fast.cli import app
from arr_fast.errors import ArrFastError
from arr_fast.judge import Judge
from arr_fast.serve.ray_dataset import JudgeActor, Work, judge_dataset
from tests.engine import scenes
from tests.ray.environment import BUSY_MACHINE
from tests.serve.running import MODEL, assert_close, pair, png

RUBRIC = scenes.rubric(2)
JUDGE = {"model": MODEL, "device": "cpu"}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(**JUDGE)


@pytest.fixture
def rubric_file(tmp_path):
    path = tmp_path / "two.json"
    path.write_text(RUBRIC.model_dump_json(), encoding="utf-8")
    return str(path)


def rows(count: int) -> list[dict]:
    found = []
    for seed in range(count):
        a, b = pair(seed)
        found.append(
            {"id": f"r{seed}", "prompt": f"scene {seed}", "image_a": png(a), "image_b": png(b)}
        )
    return found


def verdict(judge: Judge, seed: int) -> dict:
    a, b = pair(seed)
    found = judge.compare([f"scene {seed}"], [a], [b], RUBRIC).pair_json(0)
    return json.loads(json.dumps(found))


def test_rows_become_verdicts_and_bad_rows_errors(judge, rubric_file, tmp_path):
    a, b = pair(1)
    (tmp_path / "a.png").write_bytes(png(a))
    given = [
        *rows(2),
        {"id": "bad", "prompt": " ", "image_a": b"", "image_b": b""},
        {"id": "one", "prompt": "p", "images": [png(a)], "image_a": None, "image_b": None},
        {"id": "edit", "prompt": "p", "image_a": png(a), "image_b": png(b), "source": png(a)},
        {"id": "file", "prompt": "scene 1", "image_a": "a.png", "image_b": {"bytes": png(b)}},
        {"id": "broken", "prompt": "p", "image_a": b"x", "image_b": png(b)},
    ]
    found = JudgeActor(Work("compare", JUDGE, rubric_file, str(tmp_path))).judge_rows(given)
    for seed in (0, 1):
        assert_close(json.loads(found[seed]["verdict"]), verdict(judge, seed))
        assert found[seed]["name"] == f"r{seed}" and found[seed]["winner"] in ("A", "B", "tie")
    assert_close(json.loads(found[5]["verdict"]), verdict(judge, 1))
    errors = [found[n] for n in (2, 3, 4, 6)]
    assert all(row["status"] == "error" for row in errors)
    words = (":3: prompt", "has 1 images", "needs no source image", ":7: image 0")
    for row, word in zip(errors, words, strict=True):
        assert word in row["error"]
    assert [row["name"] for row in errors] == ["bad", "one", "edit", "broken"]
    assert [row["prompt"] for row in errors] == [" ", "p", "p", "p"]


def test_rows_without_an_id_have_names_that_no_other_actor_gives(judge, rubric_file):
    given = [{"prompt": "scene 0", "image_a": b"x"}, {"image_a": b"x"}, {"pair_id": 7, "text": "t"}]
    actors = [JudgeActor(Work("compare", JUDGE, rubric_file)) for _ in range(2)]
    found = [row for actor in actors for _ in range(2) for row in actor.judge_rows(given)]
    assert {row["status"] for row in found} == {"error"}
    names = [row["name"] for row in found]
    assert names[2::3] == ["7"] * 4 and len(set(names)) == 1 + 8
    assert [row["prompt"] for row in found[:3]] == ["scene 0", None, "t"]
    assert all(row["error"].startswith(row["name"]) for row in found if row["name"] != "7")


@pytest.mark.parametrize("kind", ["score", "rank"])
def test_the_other_kinds(judge, rubric_file, kind):
    images = [scenes.image(56, 56, n) for n in range(3)]
    shown = images[:1] if kind == "score" else images
    row = {"prompt": "p", "images": [png(image) for image in shown]}
    table = pa.Table.from_pylist([row])
    (found,) = JudgeActor(Work(kind, JUDGE, rubric_file))(table).to_pylist()
    assert found["status"] == "ok" and found["error"] is None
    if kind == "score":
        score = judge.score(["p"], shown, RUBRIC).score[0]
        np.testing.assert_allclose(found["score"], score, atol=1e-4)
    else:
        ranked = judge.rank(["p"], [images], RUBRIC)
        assert found["ranking"] == ranked.ranking[0].tolist()
        assert found["win_rate"] == ranked.win_rate[0].tolist()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ArrFastError, match="kind must be one of"):
        judge_dataset(None, Work("guess", JUDGE))  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def cluster():
    """One cluster for both files: the command joins what its process is connected to."""
    ray = pytest.importorskip("ray")
    os.environ.update(BUSY_MACHINE)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.mark.ray
@pytest.mark.usefixtures("cluster")
@pytest.mark.parametrize("ending", ["parquet", "jsonl"])
def test_two_actors_judge_a_file(judge, rubric_file, tmp_path, ending):
    path = tmp_path / f"pairs.{ending}"
    given = rows(10)
    if ending == "parquet":
        pq.write_table(pa.Table.from_pylist(given), path, row_group_size=2)
    else:
        for row in given:
            for side in ("image_a", "image_b"):
                (tmp_path / f"{row['id']}-{side}.png").write_bytes(row[side])
                row[side] = f"{row['id']}-{side}.png"
        path.write_text("".join(json.dumps(row) + "\n" for row in given), encoding="utf-8")
    command = ["judge-dataset", str(path), str(tmp_path / "out"), "--model", MODEL]
    command += ["--device", "cpu", "--rubric", rubric_file, "--replicas", "2"]
    result = CliRunner().invoke(app, [*command, "--batch-size", "2", "--gpus-per-replica", "0"])
    assert result.exit_code == 0, result.output
    found = {row["name"]: row for row in pq.read_table(tmp_path / "out").to_pylist()}
    assert len(found) == 10
    for seed in range(10):
        assert_close(json.loads(found[f"r{seed}"]["verdict"]), verdict(judge, seed))
