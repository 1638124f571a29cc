"""Parsing what was written back to claims, and the check of a writer by the renderer."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from arr_fast.autorubric.text_backend import TextBackendError, TextReply
from arr_fast.shapes import writing
from arr_fast.shapes.claims import EDIT_KINDS, T2I_KINDS, Claim
from arr_fast.shapes.criterion_parser import parse_criterion
from arr_fast.shapes.evaluate_writing import ask, score_writing, writing_tasks
from arr_fast.shapes.grammar import wording
from arr_fast.shapes.hidden_preference import (
    NEAR_TIE,
    HiddenPreference,
    oracle_credit,
    sample_pairs,
    scene_keys,
    write_pairs,
)
from arr_fast.shapes.judge_training import TruthProbes
from arr_fast.shapes.pairs import candidate_claims, sample_edit_pair, sample_pair
from arr_fast.shapes.rows import BatchMaker
from arr_fast.shapes.tokenizer import build_tokenizer
from arr_fast.shapes.writing import GENERAL_KINDS


def test_every_wording_parses_back_to_its_claim() -> None:
    rng = np.random.default_rng(0)
    seen = set()
    for split in ("train", "held_out"):
        for sampler in (sample_pair, sample_edit_pair):
            for _ in range(60):
                for criterion in sampler(rng, split, 16).criteria:
                    assert parse_criterion(criterion.text) == criterion.claim, criterion.text
                    seen.add(criterion.kind)
    assert seen == {*T2I_KINDS, *EDIT_KINDS}


@pytest.mark.parametrize("text", ["", "There is a red dog.", "There is a red circle", "Sharp."])
def test_other_texts_have_no_claim(text: str) -> None:
    assert parse_criterion(text) is None


class Writer:
    """Writes true claims of the preferred picture, or what `spoil` makes of them."""

    identity = "writer"

    def __init__(self, tasks, spoil=lambda texts: texts) -> None:
        self.tasks, self.spoil = tasks, spoil

    def generate(self, requests, on_result) -> None:
        rng = np.random.default_rng(0)
        for place, task in enumerate(self.tasks):
            claims = candidate_claims(rng, (task.scene,), task.context, "held_out")
            true = [
                claim
                for claim in dict.fromkeys(claims)
                if claim.truth(task.scene, task.context) is True
                and (task.form != "general" or claim.kind in GENERAL_KINDS)
            ][:5]
            texts = [wording(claim, rng, "train") for claim in true] or ["none"]
            on_result(place, TextReply(json.dumps({"criteria": self.spoil(texts)})))


def test_true_writing_is_valid_and_every_fault_is_told_apart() -> None:
    tasks = writing_tasks(10, seed=0)
    assert {t.form for t in tasks} == {"caption", "general", "specific"} and len(tasks) == 30
    for form, score in score_writing(tasks, ask(Writer(tasks), tasks)).items():
        assert score.valid_share > 0.95, (form, score.examples)
    spoilt = Writer(tasks, lambda texts: [*texts[:2], "There is a red dog.", texts[0]])
    for score in score_writing(tasks, ask(spoilt, tasks)).values():
        assert score.verdicts["not in the grammar"] == 10 == score.verdicts["duplicate"]
        assert score.valid_share == pytest.approx(score.verdicts["valid"] / 40, abs=0.02)
    one = [t for t in tasks if t.form == "general"][:3]
    results = [
        TextReply(json.dumps({"criteria": ["There is an object.", "There is no object."]})),
        TextReply("sorry"),
        TextBackendError("gone"),
    ]
    (score,) = score_writing(one, results).values()
    assert score.verdicts["wrong kind"] == 2 and score.unusable == 2 and score.valid_share == 0.0
    caption = next(t for t in tasks if t.form == "caption")
    kind = caption.scene.objects[0].kind
    lie = wording(Claim("absence", kind), np.random.default_rng(0), "train")
    (score,) = score_writing([caption], [TextReply(json.dumps({"criteria": [lie]}))]).values()
    assert score.verdicts["false"] == 1


def test_hidden_labels_follow_bradley_terry_and_near_ties_are_a_third() -> None:
    hidden = HiddenPreference.draw(5)
    weights = sorted(hidden.weights.values(), reverse=True)
    assert weights.count(0.0) == 4 and weights[0] > 2 * weights[1] > 0
    pairs = sample_pairs(hidden, 400, seed=1)
    gaps = np.array([pair.gap for pair in pairs])
    assert (np.abs(gaps) < NEAR_TIE).mean() == 0.3
    wins = np.array([pair.preferred == 1 for pair in pairs])
    expected = 1 / (1 + np.exp(-gaps))
    assert abs((wins - expected).mean()) < 3 * 0.5 / 20
    credit = oracle_credit(pairs)
    assert credit.mean() == pytest.approx(np.maximum(expected, 1 - expected).mean(), abs=0.07)
    assert HiddenPreference.draw(5) == hidden and HiddenPreference.draw(6) != hidden
    again = sample_pairs(hidden, 400, seed=1)
    assert [p.preferred for p in again] == [p.preferred for p in pairs]
    keys = [scene_keys(pair.example) for pair in pairs]
    other = sample_pairs(hidden, 40, seed=1, taken=frozenset().union(*keys[:100]))
    assert not any(scene_keys(p.example) & keys[n] for p in other for n in range(100))


def test_written_pairs_are_read_as_any_data(tmp_path) -> None:
    from arr_fast.autorubric.labelled import read_labelled
    from arr_fast.data.registry import read_records

    pairs = sample_pairs(HiddenPreference.draw(0), 5, seed=0)
    reading = read_labelled(read_records(write_pairs(pairs, tmp_path)))
    assert [p.preferred for p in reading.pairs] == [p.preferred for p in pairs]
    assert [p.prompt for p in reading.pairs] == [p.example.caption for p in pairs]


def test_a_pair_about_which_nothing_can_be_written_is_skipped(monkeypatch):
    """Four requests of a pair come to nothing; the row holds the next pair's."""
    real, asked = writing.pair_criteria, []

    def none_at_first(*args):
        asked.append(args)
        return ((), ()) if len(asked) <= 4 else real(*args)

    monkeypatch.setattr(writing, "pair_criteria", none_at_first)
    maker = BatchMaker(build_tokenizer())
    batch, patches = maker.batch(np.random.default_rng(0), 1, "train", {"write": 1.0})
    assert len(asked) >= 8
    pictures = 3 if asked[4][1].source else 2
    assert len(patches) == pictures
    assert '{"criteria": ["' in maker.tokenizer.decode(batch.answer_ids)


@torch.no_grad()
def test_plans_say_what_the_answer_that_follows_is_made_of():
    """Read back from the packed tokens: a plan stands before every general answer and before no
    other; what is written holds on the preferred picture, and fails on the other where anything
    does; the plan's loss is the mean cross-entropy of its known facts."""
    maker = BatchMaker(build_tokenizer())
    batch, _ = maker.batch(np.random.default_rng(1), 12, "train", {"write": 1.0})
    ids = batch.ids.flatten().tolist()
    end = maker.tokenizer.convert_tokens_to_ids("<|im_end|>")
    kinds = len(GENERAL_KINDS)
    deciding = 0
    for (row, at), plan in zip(batch.plan_at.tolist(), batch.plans, strict=True):
        start = row * batch.ids.shape[1] + at + 1
        asked = maker.tokenizer.decode(ids[start - 20 : start])
        assert asked.endswith("Write general criteria.<|im_end|>\n<|im_start|>assistant\n")
        written = maker.tokenizer.decode(ids[start : ids.index(end, start)])
        places = [
            GENERAL_KINDS.index(parse_criterion(text).kind)
            for text in json.loads(written)["criteria"]
        ]
        preferred, other = plan[:kinds], plan[kinds:]
        assert (preferred[places] == 1).all()
        decides = (preferred == 1) & (other == 0)
        if decides.any():
            assert decides[places].all()
            deciding += 1
    text = maker.tokenizer.decode(ids)
    assert len(batch.plans) == text.count("Write general criteria.") >= deciding >= 12
    probes = TruthProbes(192)
    states = torch.randn(len(batch.plans), 192)
    scaled = states / states.square().mean(1, keepdim=True).sqrt()
    p = torch.sigmoid(scaled @ probes.plan.weight.T + probes.plan.bias)
    likely = torch.where(batch.plans == 1, p, 1 - p)[~batch.plans.isnan()]
    loss = probes.plan_loss(states, batch.plans)
    torch.testing.assert_close(loss, -likely.log().mean(), rtol=1e-4, atol=0)
    assert probes.plan_loss(states[:0], torch.zeros(0, 0)) == 0


def test_what_is_known_before_writing_about_a_pair():
    """A sharp picture beside the same one blurred; an edit that was done beside one that was not.
    What a caption asks for makes no sense under an edit, and the other way round."""
    rng = np.random.default_rng(2)
    pair = sample_pair(rng, "train", 0)
    clear = replace(pair.scenes[0], blur=0.0, noise=0.0, hidden=None)
    pair = replace(pair, scenes=(clear, replace(clear, blur=2.0)))
    place = GENERAL_KINDS.index
    kinds = len(GENERAL_KINDS)
    for preferred, sharp in ((0, [1, 0]), (1, [0, 1])):
        truths = writing.general_truths(pair, preferred)
        assert truths[[place("sharpness"), kinds + place("sharpness")]].tolist() == sharp
        assert np.isnan(truths[[place("edit_done"), kinds + place("edit_done")]]).all()
    edit = sample_edit_pair(rng, "train", 0)
    done = edit.context.edit.apply(edit.source)
    truths = writing.general_truths(replace(edit, scenes=(done, edit.source)), 0)
    assert truths[[place("edit_done"), kinds + place("edit_done")]].tolist() == [1, 0]
    assert np.isnan(truths[[place("caption_objects"), place("faithful")]]).all()
