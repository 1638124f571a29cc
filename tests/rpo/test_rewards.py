"""Verdicts as judgements, rubrics of prompts, and the acceptance table's arithmetic."""

from __future__ import annotations

import math
from concurrent.futures import Future

import numpy as np
import pytest
import torch
from PIL import Image

from arr_fast.integrations.rpo_reward import (
    LocalComparer,
    RemoteComparer,
    RubricOf,
    RubricReward,
    _then,
    judgement_of,
)
from arr_fast.provenance import Provenance
from arr_fast.rpo.evaluation import diverges
from arr_fast.rpo.judging import JudgeRequest
from arr_fast.rpo.prompts import Prompt, PromptWalk, load_prompts
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
    assert prompt.source is not None and prompt.source.size == (8, 8)
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
