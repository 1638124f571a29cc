"""Verdicts as judgements, rubrics of prompts, and the acceptance table's arithmetic."""

from __future__ import annotations

import inspect
import math
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Event

import numpy as np
import pytest
import torch
from PIL import Image

from arr_fast.cli.training import build_parts
from arr_fast.errors import ConfigError
from arr_fast.integrations.rpo_reward import (
    LocalComparer,
    RemoteComparer,
    RubricOf,
    RubricReward,
    _then,
    build_rewards,
    judgement_of,
)
from arr_fast.judge import Judge
from arr_fast.provenance import Provenance
from arr_fast.rpo.config import PromptsConfig, preset_config, read_config
from arr_fast.rpo.evaluation import diverges
from arr_fast.rpo.judge_config import JudgeConfig
from arr_fast.rpo.judging import JudgeRequest
from arr_fast.rpo.prompts import Prompt, PromptWalk, load_prompts, source_images
from arr_fast.verdicts import group_verdicts, pair_verdicts
from tests.rpo.toy import done

SOURCE = Provenance("stub", "r1", (), 1)


def request(groups: int = 3, size: int = 2) -> JudgeRequest:
    image = Image.new("RGB", (4, 4))
    rows = tuple({} for _ in range(groups))
    images = tuple((image,) * size for _ in range(groups))
    return JudgeRequest(tuple(range(groups)), ("p",) * groups, images, None, rows)


class FixedJudge:
    """Returns given verdicts."""

    def __init__(self, verdicts) -> None:
        self.verdicts = verdicts

    def submit(self, method, *arguments, **options):
        self.method = method
        return done(self.verdicts)


def test_pairs_become_wins_and_metrics():
    ab = np.array([[2.0, 1.0], [-3.0, 1.0], [1.0, 1.0]])
    ba = np.array([[-1.0, -1.0], [3.0, -1.0], [math.nan, 1.0]])
    verdicts = pair_verdicts(ab, ba, provenance=SOURCE, criteria=[("x", "y")] * 3)
    judge = FixedJudge(verdicts)
    reward = RubricReward(LocalComparer(judge, "both", {}), RubricOf("t2i"))
    found = reward(request()).result()
    assert judge.method == "compare"
    assert found.wins[0, 0, 1] == 1 and found.wins[0, 1, 0] == -1
    assert found.wins[1, 0, 1] == -1
    assert torch.isnan(found.wins[2, 0, 1])
    assert "prompt 2" in found.errors[0]
    # preference of x: 1.5 for the winner of pair 0, 3 for that of pair 1; of y: 1 and -1.
    assert found.metrics["preference/x"] == pytest.approx(4.5)
    assert found.metrics["preference/y"] == pytest.approx(0.0)
    assert found.counts["preference/x"] == 2


def test_groups_become_wins():
    pairs = pair_verdicts([[1.0], [-1.0], [0.0]], provenance=SOURCE)
    verdicts = group_verdicts(pairs, [(0, 0, 1), (0, 0, 2), (0, 1, 2)], [3])
    judge = FixedJudge(verdicts)
    reward = RubricReward(LocalComparer(judge, "AB", {}), RubricOf("t2i"))
    wins = reward(request(1, 3)).result().wins
    assert judge.method == "rank"
    assert torch.equal(wins[0], torch.tensor([[0.0, 1, -1], [-1, 0, 0], [1, 0, 0]]))


def test_a_server_gives_the_same_wins_as_a_judge_in_process():
    pairs = pair_verdicts([[2.0], [-1.0], [0.0]], provenance=SOURCE, criteria=[("x",)] * 3)
    groups = group_verdicts(pairs, [(0, 0, 1), (0, 0, 2), (0, 1, 2)], [3])

    class Client:
        def compare(self, prompts, images_a, images_b, rubric, *, sources, orders):
            assert len(rubric) == len(prompts) == len(images_a) == len(images_b)
            return pairs.to_json()

        def rank(self, prompts, given, rubric, *, sources, orders):
            return groups.to_json()

    for ask, verdicts in ((request(3, 2), pairs), (request(1, 3), groups)):
        remote = RubricReward(RemoteComparer(Client(), "AB", {}), RubricOf("t2i"))
        local = RubricReward(LocalComparer(FixedJudge(verdicts), "AB", {}), RubricOf("t2i"))
        assert torch.equal(remote(ask).result().wins, local(ask).result().wins)


def test_errors_pass_through_futures():
    broken: Future = Future()
    broken.set_exception(OSError("gone"))
    with pytest.raises(OSError, match="gone"):
        _then(broken, lambda v: v).result()
    with pytest.raises(ZeroDivisionError):
        _then(done(1), lambda v: v / 0).result()


def test_a_prompt_brings_its_own_rubric():
    own = {"name": "n", "criteria": [{"id": "a", "text": "A circle."}]}
    rubric_of = RubricOf("t2i")
    assert rubric_of({"rubric": own}, edits=False).ids == ("a",)
    assert rubric_of({}, edits=False).name != "n"
    hashes = rubric_of.hashes([Prompt(0, "x"), Prompt(1, "y", metadata={"rubric": own})])
    assert len(hashes) == 2


def test_judgement_counts_what_failed():
    pair = {"a": 0, "b": 1, "winner": "A", "status": "low_label_mass", "criteria": []}
    found = judgement_of([[pair]], 2)
    assert torch.isnan(found.wins[0, 0, 1])
    assert found.errors == ("prompt 0: low_label_mass",)


def test_jsonl_prompts_bring_images_and_metadata(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png")
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "make it blue", "image": "a.png", "rubric": "edit"}\n')
    (prompt,) = load_prompts(str(path), count=10)
    image = prompt.image()
    assert image is not None and image.size == (8, 8)
    assert prompt.metadata == {"rubric": "edit"}
    path.write_text('{"prompt": " "}\n')
    with pytest.raises(ValueError, match=r"edits\.jsonl:1"):
        load_prompts(str(path), count=10)


def test_the_walk_sets_tied_prompts_aside_and_takes_them_back():
    prompts = [Prompt(number, str(number)) for number in range(4)]
    walk = PromptWalk(prompts, seed=0, tied_limit=2, rest=1)
    seen = []
    for _ in range(6):
        taken = walk.take(4) if walk.set_aside == 0 else walk.take(3)
        seen.append({p.id for p in taken})
        walk.note(taken, [p.id == 2 for p in taken])
    assert seen[0] == seen[1] == {0, 1, 2, 3}
    assert {0, 1, 3} in seen
    assert 2 in seen[-1] or 2 in seen[-2]


def test_divergence_needs_both_directions():
    assert diverges([(0.5, 0.6), (0.6, 0.5), (0.7, 0.4)], 3)
    assert not diverges([(0.5, 0.4), (0.6, 0.5), (0.7, 0.6)], 3)
    assert not diverges([(0.7, 0.6), (0.6, 0.5), (0.5, 0.4)], 3)
    assert not diverges([(0.5, 0.6), (0.6, 0.5)], 3)


def test_a_cancelled_judgement_is_never_begun():
    began = []
    with ThreadPoolExecutor(1) as pool:
        gate = Event()
        pool.submit(gate.wait)
        waiting = _then(_then(pool.submit(began.append, 1), str), str)
        assert waiting.cancel()
        gate.set()
    assert began == []


def test_a_judgement_cancelled_too_late_ends_in_silence(caplog):
    running: Future = Future()
    waiting = _then(running, str)
    running.set_running_or_notify_cancel()
    assert waiting.cancel()
    running.set_result(3)
    assert waiting.cancelled()
    assert not caplog.records


def test_judges_without_a_device_take_the_one_of_their_process(monkeypatch):
    asked = []

    def load(model, *, device, **other):
        asked.append(device)

    monkeypatch.setattr("arr_fast.judge.Judge.from_pretrained", load)
    judges = {"own": JudgeConfig(), "named": JudgeConfig(device="cuda:1")}
    build_rewards(judges, [], device="cuda:3")
    assert asked == ["cuda:3", "cuda:1"]


def test_a_judge_is_loaded_and_asked_as_configured(monkeypatch, tmp_path):
    loaded, asked = {}, {}

    class Recorder(FixedJudge):
        def submit(self, method, *arguments, **options):
            asked.update(options)
            return super().submit(method, *arguments, **options)

    def load(**arguments):
        inspect.signature(Judge.from_pretrained).bind(**arguments)
        loaded.update(arguments)
        return Recorder(pair_verdicts([[1.0]] * 3, [[-1.0]] * 3, provenance=SOURCE))

    config = preset_config(
        judges={
            "rubric": {
                **{"model": "m", "revision": "r2", "adapter": "lora", "quantization": "int8"},
                "engine": {"compile": True, "prefix_cache": "images"},
                "options": {"aggregation": "veto", "margin": 0.5},
            }
        }
    )
    config.save(tmp_path / "run.yaml")
    monkeypatch.setattr("arr_fast.judge.Judge.from_pretrained", load)
    rewards, _, _ = build_rewards(read_config(tmp_path / "run.yaml").judges, [], device="cpu")
    assert loaded == {
        **{"model": "m", "device": "cpu", "dtype": "auto", "revision": "r2", "adapter": "lora"},
        **{"quantization": "int8", "compile": True, "prefix_cache": "images"},
    }
    assert bool((rewards["rubric"](request()).result().wins[:, 0, 1] == 1).all())
    assert asked == {"orders": "both", "aggregation": "veto", "margin": 0.5, "sources": None}


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        ({"prefix_cash": "off"}, r"unknown key prefix_cash \(did you mean prefix_cache\?\)"),
        ({"prefix_cache": "all"}, "prefix_cache must be off, text or images"),
        ({"device": "cpu"}, "unknown key device"),
        ({"max_batch_rows": "many"}, "max_batch_rows must be an integer of at least 1, got 'many'"),
        ({"prefix_cache_bytes": 1e9}, "prefix_cache_bytes must be an integer of at least 0"),
    ],
)
def test_bad_engine_settings_are_refused_before_anything_is_loaded(monkeypatch, engine, message):
    def load(*arguments, **options):
        raise AssertionError("loaded")

    monkeypatch.setattr("arr_fast.rpo.building.build_policy", load)
    monkeypatch.setattr("arr_fast.judge.Judge.from_pretrained", load)
    config = preset_config(judges={"a": {"engine": engine}})
    with pytest.raises(ConfigError, match=rf"judges\.a\.engine: .*({message})"):
        build_parts(config)


def test_a_file_of_prompts_is_read_whole(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("".join(f"prompt {number}\n" for number in range(5000)))
    assert len(load_prompts(str(path), count=PromptsConfig().count)) == 5000
    assert [p.text for p in load_prompts(str(path), count=2)] == ["prompt 0", "prompt 1"]


def test_source_images_are_opened_when_they_are_needed(tmp_path):
    file = tmp_path / "a.png"
    Image.new("RGB", (8, 8), "red").save(file)
    path = tmp_path / "edits.jsonl"
    path.write_text('{"prompt": "make it blue", "image": "a.png"}\n')
    prompts = load_prompts(str(path))
    assert [image.getpixel((0, 0)) for image in source_images(prompts)] == [(255, 0, 0)]
    Image.new("RGB", (8, 8), "blue").save(file)
    assert [image.getpixel((0, 0)) for image in source_images(prompts)] == [(0, 0, 255)]
    file.write_bytes(b"no image")
    with pytest.raises(ConfigError, match=r"prompt 0: image .*a\.png"):
        source_images(prompts)
    with pytest.raises(ConfigError, match=r"edits\.jsonl:1: image .*a\.png"):
        load_prompts(str(path))
    assert source_images([Prompt(0, "x")]) is None
