"""Verdicts from the log are the engine's own, whatever stood beside them in a forward."""

from __future__ import annotations

import numpy as np
import pytest

from arr_fast.autorubric.call_log import CallLog
from arr_fast.autorubric.labelled import LabelledPair
from arr_fast.autorubric.verdict_log import VerdictLog
from arr_fast.errors import VerdictError
from arr_fast.judge import Judge
from arr_fast.rubric import Criterion, Rubric
from tests.engine import scenes

MODEL = "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0,max_positions=512]"
A, B, C = (scenes.image(64, 64, n) for n in range(3))
TEXTS = ["Edges are sharp.", "It shows {caption}.", "Nothing is cut off.", "Colours match."]
PAIRS = [
    LabelledPair("one", "a cat", (A, B), 1),
    LabelledPair("edit", "make it red", (A, B), 2, C),
    LabelledPair("two", "a dog", (B, C), 2),
]


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(MODEL, device="cpu")


def direct(judge: Judge, pair: LabelledPair, text: str) -> list[float]:
    rubric = Rubric(name="r", task=pair.task, criteria=(Criterion(id="c", text=text),))
    sources = None if pair.source is None else [pair.source]
    found = judge.compare(
        [pair.prompt], [pair.images[0]], [pair.images[1]], rubric, sources=sources
    )
    return [found.log_odds_ab[0, 0], found.log_odds_ba[0, 0]]


def test_each_verdict_equals_that_criterion_alone_and_is_asked_once(judge, tmp_path) -> None:
    with CallLog(tmp_path / "v.jsonl") as log:
        verdicts = VerdictLog(judge, log, batch_size=2)
        found = verdicts.log_odds(PAIRS, [TEXTS[:2], TEXTS, TEXTS[1:3]])
        assert verdicts.cost.verdicts == 2 * 8 and verdicts.cost.calls == 2
        more = verdicts.log_odds(PAIRS, [TEXTS] * 3)
        assert verdicts.cost.verdicts == 2 * 12
    for pair, row, some in zip(PAIRS, more, found, strict=True):
        expected = np.array([direct(judge, pair, text) for text in TEXTS])
        np.testing.assert_allclose(row, expected, atol=1e-4)
        assert all(any(np.array_equal(z, y) for y in row) for z in some)
    with CallLog(tmp_path / "v.jsonl") as log:
        again = VerdictLog(judge, log)
        np.testing.assert_array_equal(again.log_odds(PAIRS, [TEXTS] * 3), more)
        # The label of a pair is nothing that a judge sees; the order of its images is.
        other = LabelledPair("renamed", "a cat", (A, B), 2)
        np.testing.assert_array_equal(again.log_odds([other], [TEXTS])[0], more[0])
        assert again.cost.calls == 0
        again.log_odds([LabelledPair("turned", "a cat", (B, A), 1)], [TEXTS])
        assert again.cost.calls == 1


def test_the_matrix_has_labels_and_signs(judge) -> None:
    t2i = [PAIRS[0], PAIRS[2]]
    matrix = VerdictLog(judge, CallLog(None)).matrix(t2i, TEXTS)
    np.testing.assert_allclose(matrix.preference, 0.5 * (matrix.ab - matrix.ba))
    np.testing.assert_allclose(matrix.ab[0, 1], direct(judge, PAIRS[0], TEXTS[1])[0], atol=1e-4)
    assert matrix.label.tolist() == [1, -1] and matrix.clusters.tolist() == [0, 1]
    assert matrix.columns([TEXTS[2], TEXTS[0]]).tolist() == [2, 0]


def test_a_pair_that_cannot_be_judged_is_named_and_takes_no_other_down(judge) -> None:
    long = LabelledPair("too long", "word " * 2000, (A, B), 1)
    verdicts = VerdictLog(judge, CallLog(None))
    found = verdicts.log_odds([PAIRS[0], long], [TEXTS, TEXTS])
    assert np.isfinite(found[0]).all() and np.isnan(found[1]).all()
    assert "context holds 512" in verdicts.failures["too long"]
    with pytest.raises(VerdictError, match="too long"):
        verdicts.matrix([PAIRS[0], long], TEXTS)
