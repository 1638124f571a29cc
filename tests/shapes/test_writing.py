"""Parsing what was written back to claims, and the check of a writer by the renderer."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch

from arr_fast.autorubric.text_backend import TextBackendError, TextReply
from arr_fast.shapes import writing
from arr_fast.shapes.captions import PLURALS, Caption, describe
from arr_fast.shapes.claims import EDIT_KINDS, T2I_KINDS, Claim, Context
from arr_fast.shapes.criterion_parser import parse_criterion
from arr_fast.shapes.evaluate_writing import ask, score_writing, writing_tasks
from arr_fast.shapes.generator_data import scene_of
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
from arr_fast.shapes.pairs import (
    Example,
    candidate_claims,
    choose_criteria,
    sample_edit_pair,
    sample_pair,
    single_picture,
)
from arr_fast.shapes.rows import BatchMaker
from arr_fast.shapes.scene import SHAPES, sample_scene
from arr_fast.shapes.tokenizer import build_tokenizer
from arr_fast.shapes.writing import ASPECTS, GENERAL_KINDS


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
def test_aspects_say_what_the_answers_are_made_of():
    """Read back from the packed tokens: the words after "Check" know what holds on the preferred
    picture and on the other; general criteria that follow hold on the preferred one, and fail on
    the other where any does."""
    maker = BatchMaker(build_tokenizer())
    batch, _ = maker.batch(np.random.default_rng(1), 12, "train", {"write": 1.0})
    facts = {
        tuple(at): f for at, f in zip(batch.fact_at.tolist(), batch.facts.tolist(), strict=True)
    }
    check = maker.tokenizer.convert_tokens_to_ids("Check")
    decided = 0
    for row, ids in enumerate(batch.ids.tolist()):
        text = maker.tokenizer.decode(ids)
        branches = re.findall(
            r"Check ([^.]*)\.\n(?:Not these:\n(?:\d\. [^\n]*\n)+)?"
            r"Write general [^\n]*\n[^\n]*\n(.*?)<",
            text,
        )
        starts = [at + 1 for at, token in enumerate(ids) if token == check]
        for start, (words, written) in zip(starts, branches, strict=True):
            task = "edit" if words.startswith("done") else "t2i"
            assert words == ", ".join(ASPECTS[task].values())
            truths = [facts.pop((row, start + 2 * i)) for i in range(len(ASPECTS[task]))]
            assert np.isnan([truth[:2] for truth in truths]).all()
            known = {kind: truth[2:] for kind, truth in zip(ASPECTS[task], truths, strict=True)}
            kinds = [parse_criterion(each).kind for each in json.loads(written)["criteria"]]
            assert all(known[kind][0] == 1 for kind in kinds)
            if [1, 0] in known.values():
                assert all(known[kind][1] == 0 for kind in kinds)
                decided += 1
    assert decided >= 8
    # What is left are the captions' own objects.
    shapes = {maker.tokenizer.decode(batch.ids[row, at]).strip() for row, at in facts}
    assert {"circle", "square"} <= shapes <= {*SHAPES, *PLURALS.values()}


@pytest.mark.parametrize("general", [True, False])
def test_what_is_taught_to_write_is_true_and_decides(general: bool) -> None:
    """Read back from its text: true of the preferred picture; false of the other, but where nothing
    decides; not said twice; what fails is not written, and is false or decides nothing."""
    rng = np.random.default_rng(4)
    decided = 0
    for sampler in (sample_pair, sample_edit_pair) * 40:
        example = sampler(rng, "held_out", 0)
        for preferred in (0, 1):
            own, other = example.scenes[preferred], example.scenes[1 - preferred]
            written, failing = writing.pair_criteria(rng, example, preferred, general)
            claims = [parse_criterion(text) for text in written]
            truths = [claim.truth(other, example.context) for claim in claims]
            assert all(claim.truth(own, example.context) for claim in claims)
            assert len(set(claims)) == len(claims) <= 4
            if False in truths:
                assert set(truths) == {False}
                decided += 1
            for claim in map(parse_criterion, failing):
                met = claim.truth(own, example.context)
                assert claim not in claims
                assert met is False or (met and claim.truth(other, example.context))
    assert decided > 80


def test_what_is_taught_to_write_of_a_caption_holds_on_its_scene() -> None:
    rng = np.random.default_rng(5)
    kinds = set()
    for _ in range(100):
        scene = sample_scene(rng, "held_out")
        caption = describe(rng, scene)
        claims = [parse_criterion(text) for text in writing.caption_criteria(caption)]
        # A relation or size that is too close to call is not false.
        truths = [claim.truth(scene, Context(caption=caption)) for claim in claims]
        assert False not in truths and truths.count(True) >= 1
        assert len(set(claims)) == len(claims) <= 4
        kinds |= {claim.kind for claim in claims}
    assert kinds == {"presence", "relation", "background", "size", "count"}


def test_a_captions_words_for_objects_know_which_picture_shows_them():
    maker = BatchMaker(build_tokenizer())
    rng = np.random.default_rng(0)
    red, blue, star = ("red", "circle"), ("blue", "square"), ("green", "star")
    both = scene_of(rng, (red, red, blue), "white", "grid")
    scenes = (both, scene_of(rng, (red, blue, star), "white", "grid"))
    context = Context(caption=Caption((red, red, blue)))
    text = "two red circles and a blue square"
    example = Example(text, context, scenes, choose_criteria(rng, scenes, context, "train", 4, {}))
    trees = [maker.pair_tree(example, 0), maker.writing_tree(rng, example, 0)]
    single = single_picture(example, 1)
    asked = [("presence", text, True, (), ()) for text in ("A star is visible.", "It is sharp.")]
    trees.append(maker.point_tree("t2i", text, asked, 0, (), single))
    for number, tree in enumerate(trees):
        words = [maker.tokenizer.decode([tree.paths[0].ids[at]]) for at, _ in tree.facts]
        assert words == [" circles", " square"]
        expected = [[1, 0], [1, 1]] if number < 2 else [[0, np.nan], [1, np.nan]]
        truths = np.array([known for _, known in tree.facts])
        np.testing.assert_array_equal(truths[:, :2], expected)
        assert np.isnan(truths[:, 2:]).all()


def test_the_loss_of_facts_is_their_cross_entropy():
    probes = TruthProbes(192)
    states = torch.randn(5, 192)
    nan = float("nan")
    truths = torch.tensor(
        [[1, 0, nan, nan], [0, nan, nan, nan], [nan, nan, 1, 1], [nan] * 4, [nan, nan, 0, 1]]
    )
    scaled = states / states.square().mean(1, keepdim=True).sqrt()
    p = torch.sigmoid(scaled @ probes.fact.weight.T + probes.fact.bias)
    likely = torch.where(truths == 1, p, 1 - p)[~truths.isnan()]
    torch.testing.assert_close(probes.fact_loss(states, truths), -likely.log().mean())
    assert probes.fact_loss(states[:0], truths[:0]) == 0


def test_what_is_known_before_writing_about_a_pair():
    """A sharp picture beside the same one blurred; an edit that was done beside none."""
    rng = np.random.default_rng(2)
    pair = sample_pair(rng, "train", 0)
    clear = replace(pair.scenes[0], blur=0.0, noise=0.0, hidden=None)
    pair = replace(pair, scenes=(clear, replace(clear, blur=2.0)))
    for preferred, sharp in ((0, [1, 0]), (1, [0, 1])):
        known = writing.aspect_truths(pair, preferred).tolist()
        truths = dict(zip(ASPECTS["t2i"], known, strict=True))
        assert truths["sharpness"] == sharp
        assert truths["noise"] == [1, 1] == truths["occlusion"]
    edit = sample_edit_pair(rng, "train", 0)
    done = edit.context.edit.apply(edit.source)
    truths = writing.aspect_truths(replace(edit, scenes=(done, edit.source)), 0)
    assert truths[list(ASPECTS["edit"]).index("edit_done")].tolist() == [1, 0]
    assert {*ASPECTS["t2i"], *ASPECTS["edit"]} == set(GENERAL_KINDS)
