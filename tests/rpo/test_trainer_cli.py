"""`arr-fast train` and `sample` from end to end, on a small generator and judges that are stubs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import yaml
from PIL import Image
from typer.testing import CliRunner

from arr_fast.cli import app, training
from arr_fast.integrations import rpo_reward as rewards
from arr_fast.provenance import Provenance
from arr_fast.rpo.policies import shapes
from arr_fast.verdicts import pair_verdicts
from tests.rpo.small_generator import save_small

RUNNER = CliRunner()


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    return save_small(tmp_path_factory.mktemp("generator"))


def configured(tmp_path, generator, **changes):
    data = {
        "output": str(tmp_path / "run"),
        "iterations": 2,
        "compile": False,
        "trackers": [],
        "micro_batch": 8,
        "policy": {"model": str(generator)},
        "prompts": {"count": 12},
        "sampler": {"steps": 3, "trained": 1, "window": 2},
        "rollout": {"pairs": 4, "chunks": 2},
        "judges": {"rubric": {"call": "tests.rpo.small_generator:red_judge"}},
        "evaluation": {"every": 2, "count": 3, "steps": 2, "grid": 2},
        "checkpoint": {"every": 1},
    }
    for key, value in changes.items():
        data[key] = {**data[key], **value} if isinstance(value, dict) else value
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(data))
    return path


def call(*arguments):
    return RUNNER.invoke(app, [str(a) for a in arguments])


def test_train_resume_and_sample(tmp_path, generator):
    config = configured(tmp_path, generator, trackers=["tensorboard"])
    done = call("train", config, "--json", tmp_path / "out.json")
    assert done.exit_code == 0, done.output
    assert "2 iterations, 2 updates, 0 skipped" in done.output
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["schema"] == "arr_fast.train/1"
    assert "held_out/evaluator" in result["last"]
    assert list((tmp_path / "run").rglob("events.out.tfevents*"))

    again = call("train", config)
    assert again.exit_code == 1
    assert "use --resume" in " ".join(again.output.split())
    further = call("train", config, "--resume", "--iterations", 3)
    assert "3 iterations, 3 updates" in further.output, further.output
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["iteration"] for line in lines] == [0, 1, 2, 3]

    pictures = {}
    for name, options in (("trained", []), ("base", ["--base"]), ("ema", ["--ema"])):
        text = "a red circle and a blue square on a white background"
        drawn = call("sample", tmp_path / "run", "--prompt", text, "--out", tmp_path / name,
                     "--count", 2, *options)  # fmt: skip
        assert drawn.exit_code == 0, drawn.output
        pictures[name] = [np.asarray(Image.open(p)) for p in sorted((tmp_path / name).iterdir())]
        assert len(pictures[name]) == 2
    assert not np.array_equal(pictures["trained"], pictures["base"])
    assert not np.array_equal(pictures["trained"], pictures["ema"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": {"betta": 1}}, "unknown key loss.betta (did you mean beta?)"),
        ({"loss": {"beta": -1}}, "loss.beta"),
        ({"policy": {"height": 32}}, "draws 64 x 64 pixels, got 32 x 64"),
        ({"policy": {"guidance": 3.5}}, "no guidance"),
        ({"prompts": {"source": "nothing.txt"}}, "cannot read prompts"),
        ({"prompts": {"source": "builtin:cubes"}}, "unknown prompts"),
        ({"rollout": {"pairs": 5}}, "pairs 5 is not a multiple of chunks 2"),
        ({"judges": {"r": {"call": "tests.rpo.small_generator:missing"}}}, "cannot import"),
        (
            {"judges": {"rubric": {"call": "tests.rpo.small_generator:failing_judge"}}},
            "no verdict on 4 of 4 pairs",
        ),
        ({"evaluation": {"evaluator": "no_colon"}}, "not of the form package.module:callable"),
    ],
)
def test_bad_input_is_one_line(tmp_path, generator, changes, message):
    base = {"loss": {}, "evaluation": {"every": None}}
    merged = {key: {**base.get(key, {}), **changes.get(key, {})} for key in {*base, *changes}}
    if "judges" in changes:
        merged["judges"] = changes["judges"]
    if "evaluator" in changes.get("evaluation", {}):
        merged["evaluation"] = changes["evaluation"]
    path = configured(tmp_path, generator)
    data = yaml.safe_load(path.read_text())
    for key, value in merged.items():
        data[key] = value if key == "judges" else {**data.get(key, {}), **value}
    path.write_text(yaml.safe_dump(data))
    result = call("train", path)
    assert result.exit_code == 1
    assert isinstance(result.exception, SystemExit)
    assert message in " ".join(result.output.split())


def test_an_empty_line_in_a_prompt_file_is_named(tmp_path, generator):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red circle\n\na blue square\n")
    result = call("train", configured(tmp_path, generator, prompts={"source": str(prompts)}))
    assert result.exit_code == 1
    assert "prompts.txt:2: empty line" in " ".join(result.output.split())


def test_config_or_demo(tmp_path):
    result = call("train")
    assert result.exit_code == 1
    assert "give a configuration file, or --demo" in result.output


def test_options_that_would_do_nothing_are_refused(tmp_path, generator):
    path = configured(tmp_path, generator)
    cases = {
        ("train", path, "--edit"): "--edit goes with --demo",
        ("sample", path, "--prompt", "x", "--ema"): "--ema needs a run or a checkpoint",
        ("sample", path, "--prompt", "x", "--base", "--ema"): "--base draws with the untrained",
    }
    for arguments, message in cases.items():
        result = call(*arguments)
        assert result.exit_code == 1
        assert message in " ".join(result.output.split())


class RedJudge:
    """Stands in for `Judge`: the redder image wins on every criterion."""

    def submit(self, method, prompts, images_a, images_b, rubrics, *, orders, sources):
        red = [[float(np.asarray(i)[..., 0].mean()) for i in c] for c in (images_a, images_b)]
        z = np.subtract(*red)
        self.seen = rubrics
        wide = max(len(rubric) for rubric in rubrics)
        matrix = np.repeat(z[:, None], wide, axis=1)
        verdicts = pair_verdicts(
            matrix,
            -matrix,
            provenance=Provenance("stub", "r1", (), 1),
            criteria=[rubric.ids for rubric in rubrics],
        )
        from concurrent.futures import Future

        assert method == "compare"
        future = Future()
        future.set_result(verdicts)
        return future


@pytest.mark.parametrize("edit", [False, True])
def test_the_demo_runs_end_to_end(tmp_path, monkeypatch, edit):
    directory = save_small(tmp_path / "generator", "edit" if edit else "t2i")
    monkeypatch.setattr(shapes, "generator_directory", lambda name: directory)
    judge = RedJudge()
    local = rewards.LocalComparer(judge, "both", {})
    monkeypatch.setattr(rewards, "_comparer", lambda section, device: local)
    read = training._settings

    def shortened(*arguments):
        settings = read(*arguments)
        return settings.changed(
            rollout={"pairs": 8}, evaluation={"count": 4}, prompts={"count": 40}
        )

    monkeypatch.setattr(training, "_settings", shortened)
    result = call("train", "--demo", *["--edit"][: int(edit)], "--output", tmp_path / "run",
                  "--iterations", 1)  # fmt: skip
    assert result.exit_code == 0, result.output
    last = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["pairs/decided"] > 0
    assert last["rubric/preference/object_0"] > 0
    assert "held_out/evaluator" in last
    assert {rubric.task for rubric in judge.seen} == {"edit" if edit else "t2i"}
