"""Pair, point and group verdicts against the formulas written out naively."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from arr_fast.errors import VerdictError
from arr_fast.provenance import Provenance
from arr_fast.verdicts import (
    AGGREGATIONS,
    NO_WINNER,
    bradley_terry,
    group_verdicts,
    pair_verdicts,
    point_verdicts,
)

HERE = Provenance("model", "rev", ("hash",), 1)


def pairs(ab=None, ba=None, **options):
    return pair_verdicts(ab, ba, provenance=HERE, **options)


@given(seed=st.integers(0, 2**32 - 1))
def test_two_orders_against_the_formulas(seed):
    rng = np.random.default_rng(seed)
    ab, ba = (rng.normal(0, 3, (3, 4)).round(rng.integers(0, 4)) for _ in range(2))
    v = pairs(ab, ba)
    for b in range(3):
        total = 0.0
        for k in range(4):
            assert v.preference[b, k] == (ab[b, k] - ba[b, k]) / 2
            assert v.position_bias[b, k] == (ab[b, k] + ba[b, k]) / 2
            assert v.consistent[b, k] == (ab[b, k] * ba[b, k] < 0)
            total += (ab[b, k] - ba[b, k]) / 2 / 4
        assert v.score[b] == pytest.approx(total, abs=1e-12)
        assert v.probability[b] == pytest.approx(1 / (1 + math.exp(-total)), abs=1e-12)
        agree = ab[b].sum() > 0 > ba[b].sum() or ab[b].sum() < 0 < ba[b].sum()
        if abs(ab[b].sum()) > 1e-9 and abs(ba[b].sum()) > 1e-9:
            assert v.order_consistent[b] == agree
            assert v.winner[b] == (("A" if total > 0 else "B") if agree else "tie")
            assert v.status[b] == ("ok" if agree else "tie")


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@given(seed=st.integers(0, 2**32 - 1))
def test_swapping_the_images_mirrors_everything(aggregation, seed):
    rng = np.random.default_rng(seed)
    # Rounded coarsely, so that exact ties and zeros come up.
    ab, ba = (rng.normal(0, 2, (2, 3)).round(rng.integers(0, 3)) for _ in range(2))
    whole = rng.normal(0, 2, (2, 2)).round(1)
    options = {
        "aggregation": aggregation,
        "weights": rng.uniform(-2, 2, 3),
        "essential": rng.random(3) < 0.4,
        "learned_weights": rng.normal(0, 1, 3),
        "temperature": 1.7,
        "margin": 0.01,
    }
    v = pairs(ab, ba, holistic_ab=whole[0], holistic_ba=whole[1], **options)
    # With A and B exchanged, what was "A first" is "B first".
    w = pairs(ba, ab, holistic_ab=whole[1], holistic_ba=whole[0], **options)
    np.testing.assert_array_equal(w.preference, -v.preference)
    np.testing.assert_array_equal(w.position_bias, v.position_bias)
    np.testing.assert_array_equal(w.consistent, v.consistent)
    np.testing.assert_array_equal(w.order_consistent, v.order_consistent)
    np.testing.assert_array_equal(w.score, -v.score)
    np.testing.assert_array_equal(w.winner_code, -v.winner_code)
    assert w.status == v.status
    np.testing.assert_allclose(w.probability + v.probability, 1.0, atol=1e-12)
    np.testing.assert_array_equal(w.reward().reward, v.reward().reward[:, ::-1])


def test_one_order_knows_no_bias():
    ab = np.array([[1.0, -3.0, 4.0]])
    for v in (pairs(ab), pairs(None, -ab)):
        np.testing.assert_array_equal(v.preference, ab)
        assert np.isnan(v.position_bias).all()
        assert v.consistent is None and v.order_consistent is None
        assert v.winner == ("A",)


def test_inconsistent_orders_are_a_tie_unless_kept():
    ab, ba = [[3.0, 3.0]], [[1.0, 1.0]]
    assert pairs(ab, ba).status == ("tie",)
    kept = pairs(ab, ba, inconsistent="keep")
    assert (kept.winner, kept.status, bool(kept.order_consistent[0])) == (("A",), ("ok",), False)


def test_consistency_is_decided_on_the_aggregate():
    # Criterion 1 flips with the order, the pair does not.
    v = pairs([[5.0, 1.0]], [[-5.0, 1.0]])
    assert v.consistent.tolist() == [[True, False]]
    assert v.winner == ("A",)


def test_margin_and_exact_ties():
    ab = [[0.4], [0.6], [-0.6], [0.0]]
    assert pairs(ab, margin=0.5).winner == ("tie", "A", "B", "tie")
    assert pairs(ab).winner == ("A", "A", "B", "tie")
    assert pairs([[0.5], [-0.5]], margin=0.5).winner == ("tie", "tie")
    assert pairs(ab).status == ("ok", "ok", "ok", "tie")


def test_identical_images_tie():
    z = np.array([[0.7, -0.2]])
    v = pairs(z, z)
    assert (v.preference == 0).all() and v.winner == ("tie",) and v.probability[0] == 0.5


def test_temperature_scales_the_log_odds_of_the_pair():
    hot = pairs([[2.0, 4.0]], temperature=3.0)
    assert hot.score[0] == 3.0
    assert hot.probability[0] == pytest.approx(1 / (1 + math.exp(-1.0)))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_every_pair_has_its_own_calibration(aggregation):
    rng = np.random.default_rng(4)
    ab, ba = rng.normal(0, 2, (2, 6, 3))
    whole = rng.normal(0, 2, (2, 6))
    temperature, margin = rng.uniform(0.3, 4, 6), np.array([0, 0.5, 0, 3, 9, 0.1])
    options = {
        "aggregation": aggregation,
        "essential": [True, False, True],
        "learned_weights": [1.0, -0.5, 2.0],
        "inconsistent": "keep",
    }
    v = pairs(
        ab, ba, holistic_ab=whole[0], holistic_ba=whole[1], temperature=temperature, margin=margin,
        **options,
    )  # fmt: skip
    for b in range(6):
        own = slice(b, b + 1)
        alone = pairs(
            ab[own], ba[own], holistic_ab=whole[0, own], holistic_ba=whole[1, own],
            temperature=float(temperature[b]), margin=float(margin[b]), **options,
        )  # fmt: skip
        assert (v.score[b], v.probability[b]) == (alone.score[0], alone.probability[0])
        assert (v.winner[b], v.status[b]) == (alone.winner[0], alone.status[0])
    data = v.to_json()
    assert data["temperature"] is None and data["margin"] is None
    assert [pair["margin"] for pair in data["pairs"]] == margin.tolist()
    assert pairs(ab, temperature=2.0).to_json()["temperature"] == 2.0


def test_ragged_criteria_are_padded_with_nan():
    ids = [["a", "b", "c"], ["d"], ["e", "f"]]
    ab = np.array([[1.0, 1, 1], [-2, 99, 99], [3, 5, 99]])
    v = pairs(ab, criteria=ids)
    assert v.criteria_mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]
    assert np.isnan(v.preference[~v.criteria_mask]).all()
    np.testing.assert_array_equal(v.score, [1.0, -2.0, 4.0])
    same = pairs(ab, criteria_mask=v.criteria_mask)
    np.testing.assert_array_equal(same.score, v.score)
    assert [len(p["criteria"]) for p in v.to_json()["pairs"]] == [3, 1, 2]


def test_errors_touch_only_their_pair():
    ab = np.array([[1.0, 2.0], [np.nan, np.nan], [1.0, np.nan], [-1.0, -1.0]])
    v = pairs(
        ab, -ab, errors=[None, "images_b[1]: truncated", None, None], criteria=[["x", "y"]] * 4
    )
    assert v.status == ("ok", "error", "error", "ok")
    assert v.winner == ("A", None, None, "B")
    assert v.winner_code.tolist() == [1, NO_WINNER, NO_WINNER, -1]
    assert v.errors[1] == "images_b[1]: truncated"
    assert v.errors[2] == "log-odds are not finite for: y"
    assert np.isnan(v.probability[[1, 2]]).all() and np.isnan(v.score[[1, 2]]).all()
    assert (v.count("ok"), v.count("error")) == (2, 2)


def test_an_item_that_failed_before_judging_may_have_an_empty_mask():
    v = pairs(
        [[1.0], [np.nan]],
        criteria=[["a"], ["a"]],
        criteria_mask=[[True], [False]],
        errors=[None, "broken"],
    )
    assert v.status == ("ok", "error")
    assert v.pair_json(1)["criteria"][0]["preference"] is None


def test_rewards_of_equation_11():
    v = pairs([[2.0], [-2.0], [0.0]])
    reward, weight = v.reward(lam=1.0, gamma=0.1)
    assert reward.dtype == weight.dtype == np.float32
    expected = np.array([[1.0, -0.1], [-0.1, 1.0], [0.0, 0.0]], np.float32)
    np.testing.assert_array_equal(reward, expected)
    assert weight.tolist() == [1.0, 1.0, 0.0]


def test_reward_policies_for_errors(caplog):
    v = pairs([[2.0], [np.nan]], errors=[None, "boom"])
    reward, weight = v.reward()
    assert reward[1].tolist() == [0.0, 0.0] and weight.tolist() == [1.0, 0.0]
    reward, weight = v.reward(on_error="zero")
    assert reward[1].tolist() == [0.0, 0.0] and weight.tolist() == [1.0, 1.0]
    assert "1 of 2" in caplog.text
    with pytest.raises(VerdictError, match="pair 1: boom"):
        v.reward(on_error="raise")
    with pytest.raises(VerdictError, match="on_error"):
        v.reward(on_error="ignore")


def test_low_label_mass_is_flagged_and_not_rewarded():
    mass = np.array([[0.9, 0.9], [0.9, 0.05], [0.3, 0.3]])
    ab = np.array([[1.0, 1.0], [1.0, -9.0], [1.0, 1.0]])
    v = pairs(ab, -ab, label_mass_ab=mass, label_mass_ba=np.ones_like(mass))
    np.testing.assert_array_equal(v.label_mass, mass)
    assert v.status == ("ok", "low_label_mass", "low_label_mass")
    assert v.winner == ("A", "B", "A")
    assert v.reward().weight.tolist() == [1.0, 0.0, 0.0]
    # A verdict with little label mass casts no vote.
    voted = pairs(ab, -ab, label_mass_ab=mass, aggregation="weighted_sum")
    assert voted.winner[1] == "A" and voted.score[1] == pytest.approx(math.tanh(0.5))
    assert voted.score[2] == 0.0 and voted.status[2] == "low_label_mass"
    assert pairs(ab, label_mass_ab=mass, label_mass_threshold=0.01).status == ("ok",) * 3


def test_label_mass_that_is_nan_is_low():
    assert pairs([[1.0]], label_mass_ab=[[np.nan]]).status == ("low_label_mass",)


def test_holistic_alone_and_beside_criteria():
    v = pairs(holistic_ab=[2.0, -1.0, 1.0], holistic_ba=[-4.0, 1.0, 1.0], aggregation="holistic")
    np.testing.assert_array_equal(v.score, [3.0, -1.0, 0.0])
    np.testing.assert_array_equal(v.holistic_bias, [-1.0, 0.0, 1.0])
    assert v.winner == ("A", "B", "tie")
    assert v.preference.shape == (3, 0)
    both = pairs([[-5.0]], holistic_ab=[2.0])
    assert both.winner == ("B",) and both.holistic_preference[0] == 2.0
    chosen = pairs([[-5.0]], holistic_ab=[2.0], aggregation="holistic")
    assert chosen.winner == ("A",)
    named = pairs(holistic_ab=[2.0], aggregation="holistic", criteria=[["a", "b"]])
    assert named.winner == ("A",) and json.dumps(named.to_json())
    weak = pairs(holistic_ab=[2.0], aggregation="holistic", holistic_label_mass=[0.1])
    assert weak.status == ("low_label_mass",)
    broken = pairs(holistic_ab=[np.nan], aggregation="holistic")
    assert broken.status == ("error",)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda: pairs(), "no log-odds"),
        (lambda: pairs([[1.0]], [[1.0], [2.0]]), "log_odds_ba has 2 items, log_odds_ab has 1"),
        (lambda: pairs([[1.0]], [[1.0, 2.0]]), "log_odds_ba has 2 criteria, log_odds_ab has 1"),
        (lambda: pairs([1.0]), "expected 2 dimensions"),
        (lambda: pairs([[1.0]], criteria=[["a"], ["b"]]), "criteria has 2 items"),
        (lambda: pairs([[1.0]], criteria=[["a", "b"]]), r"criteria\[0\] has 2 ids"),
        (
            lambda: pairs([[1.0, 1.0]], criteria=[["a"]], criteria_mask=[[True, True]]),
            "has 2 criteria, criteria.0. has 1 ids",
        ),
        (lambda: pairs([[1.0]], weights=[1.0, 2.0]), "weights has 2 criteria, expected 1"),
        (lambda: pairs([[1.0]], weights=[np.nan]), "weights must be finite"),
        (lambda: pairs([[1.0]], learned_weights=[np.nan]), "learned_weights must be finite"),
        (lambda: pairs([[1.0]], temperature=0.0), "temperature"),
        (lambda: pairs([[1.0], [2.0]], temperature=[1.0, np.nan]), "temperature"),
        (lambda: pairs([[1.0]], temperature=[1.0, 1.0]), r"temperature has shape \[2\]"),
        (lambda: pairs([[1.0]], margin=-1.0), "margin"),
        (lambda: pairs([[1.0]], inconsistent="maybe"), "inconsistent"),
        (lambda: pairs([[1.0]], errors=[]), "errors has 0 items"),
        (lambda: pairs([[1.0]], holistic_ab=[1.0, 2.0]), "holistic_ab has 2 items"),
        (lambda: pairs([[1.0]], aggregation="holistic"), "whole-rubric leaf"),
    ],
)
def test_bad_calls_are_named(call, expected):
    with pytest.raises(VerdictError, match=expected):
        call()


def test_pair_json_is_complete_and_strict():
    v = pairs([[1.0, 2.0], [np.nan, 1.0]], criteria=[["a", "b"], ["a", "b"]])
    data = json.loads(json.dumps(v.to_json(), allow_nan=False))
    assert data["schema"] == "arr_fast.pair_verdicts/1"
    assert data["provenance"]["rubric_hashes"] == ["hash"]
    first, second = data["pairs"]
    assert first["criteria"][1] == {
        "id": "b",
        "preference": 2.0,
        "position_bias": None,
        "log_odds_ab": 2.0,
        "weight": 1.0,
    }
    assert (second["status"], second["winner"], second["score"]) == ("error", None, None)


def points(log_odds, **options):
    return point_verdicts(log_odds, provenance=HERE, **options)


def test_point_verdicts():
    v = points(
        [[0.0, math.log(3.0)], [math.log(4.0), 9.0]], criteria=[["a", "b"], ["a"]], weights=[1, 3]
    )
    assert v.probability[0].tolist() == pytest.approx([0.5, 0.75])
    assert v.score.tolist() == pytest.approx([(0.5 + 3 * 0.75) / 4, 0.8])
    assert np.isnan(v.probability[1, 1])
    assert v.status == ("ok", "ok")
    failed = points([[1.0], [np.nan]], errors=[None, "images[1]: truncated"])
    assert failed.status == ("ok", "error") and np.isnan(failed.score[1])
    data = json.loads(json.dumps(failed.to_json(), allow_nan=False))
    assert data["images"][1]["error"] == "images[1]: truncated"
    assert points([[1.0]], label_mass=[[0.2]]).status == ("low_label_mass",)


def test_pointwise_pairs_are_log_odds_differences():
    a, b = points([[2.0, -1.0], [0.0, 0.0]]), points([[-1.0, 1.0], [3.0, np.nan]])
    v = a.versus(b)
    assert v.preference[0].tolist() == [3.0, -2.0]
    assert v.score[0] == 0.5 and v.consistent is None and np.isnan(v.position_bias).all()
    assert v.status == ("ok", "error")
    assert a.versus(b, aggregation="majority").winner[0] == "tie"
    with pytest.raises(VerdictError, match="same criteria"):
        a.versus(points([[1.0]]))


def all_pairs(scores, **options):
    """Group verdicts for candidates whose true strengths are given."""
    index, ab = [], []
    for group, strengths in enumerate(scores):
        for i, j in itertools.combinations(range(len(strengths)), 2):
            index.append((group, i, j))
            ab.append([strengths[i] - strengths[j]])
    return group_verdicts(pairs(ab, **options), index, [len(s) for s in scores])


def test_groups_of_different_sizes():
    strengths = [[0.3, -1.0, 2.0, 0.1], [1.0, 0.0]]
    g = all_pairs(strengths)
    assert [r.tolist() for r in g.ranking] == [[2, 0, 3, 1], [0, 1]]
    assert g.win_rate[0].tolist() == pytest.approx([2 / 3, 0, 1, 1 / 3])
    for z, s in zip(g.score, strengths, strict=True):
        np.testing.assert_allclose(z, np.subtract.outer(s, s), atol=1e-12)
        np.testing.assert_array_equal(z, -z.T)
    assert g.winner_code[1].tolist() == [[0, 1], [-1, 0]]
    data = json.loads(json.dumps(g.to_json(), allow_nan=False))
    assert data["groups"][0]["ranking"] == [2, 0, 3, 1]
    assert [(p["a"], p["b"]) for p in data["groups"][1]["pairs"]] == [(0, 1)]


def test_a_failed_pair_leaves_the_group_ranked():
    errors = ["boom"] + [None] * 5
    g = all_pairs([[0.0, 1.0, 2.0, 3.0]], errors=errors)
    assert np.isnan(g.score[0][0, 1]) and g.winner_code[0][1, 0] == NO_WINNER
    assert g.ranking[0].tolist() == [3, 2, 1, 0]
    lone = all_pairs([[0.0, 1.0]], errors=["boom"])
    assert np.isnan(lone.win_rate[0]).all() and np.isnan(lone.bradley_terry[0]).all()
    assert lone.ranking[0].tolist() == [0, 1]


def test_a_pair_of_low_label_mass_judges_nobody():
    mass = [[0.1], [0.9], [0.9]]
    g = all_pairs([[5.0, 1.0, 0.0]], label_mass_ab=mass)
    assert g.pairs.status == ("low_label_mass", "ok", "ok")
    assert g.winner_code[0].tolist() == [[0, NO_WINNER, 1], [NO_WINNER, 0, 1], [-1, -1, 0]]
    assert g.win_rate[0].tolist() == [1.0, 1.0, 0.0]
    # Z itself stays to be looked at; the strengths are those of the two usable pairs.
    assert g.score[0][0, 1] == 4.0
    failed = all_pairs([[5.0, 1.0, 0.0]], errors=["boom", None, None])
    np.testing.assert_array_equal(g.bradley_terry[0], failed.bradley_terry[0])
    weak = all_pairs([[2.0, 1.0]], label_mass_ab=[[0.0]])
    assert np.isnan(weak.win_rate[0]).all()


@pytest.mark.parametrize("index", [[(0, 0, 0)], [(0, 0, 2)], [(1, 0, 1)], []])
def test_bad_group_indices(index):
    with pytest.raises(VerdictError, match="pair_index"):
        group_verdicts(pairs([[1.0]]), index, [2])
    with pytest.raises(VerdictError, match="repeats"):
        group_verdicts(pairs([[1.0], [1.0]]), [(0, 0, 1), (0, 1, 0)], [2])


def test_bradley_terry_recovers_strengths():
    s = np.array([0.5, -1.5, 2.0, -1.0])
    p = 1 / (1 + np.exp(-np.subtract.outer(s, s)))
    np.testing.assert_allclose(bradley_terry(p, ridge=1e-9), s, atol=1e-6)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_bradley_terry_equals_a_general_optimiser(seed):
    rng = np.random.default_rng(seed)
    upper = np.triu(np.ones((5, 5), bool), 1)
    p = np.where(upper, rng.choice([0.0, 0.2, 0.5, 0.9, 1.0], (5, 5)), 0.0)
    p = p + np.where(upper.T, 1.0 - p.T, 0.0)
    unknown = upper & (rng.random((5, 5)) < 0.4)
    p[unknown | unknown.T] = np.nan
    ridge = 0.05
    known = [(i, j) for i in range(5) for j in range(i + 1, 5) if np.isfinite(p[i, j])]

    def loss(s):
        value = 0.5 * ridge * float(s @ s)
        for i, j in known:
            d = s[i] - s[j]
            value += p[i, j] * np.logaddexp(0, -d) + p[j, i] * np.logaddexp(0, d)
        return value

    best = minimize(loss, np.zeros(5), tol=1e-12).x
    scored = [k for k in range(5) if any(k in pair for pair in known)]
    found = bradley_terry(p, ridge=ridge)
    assert np.isnan(found[[k for k in range(5) if k not in scored]]).all()
    if scored:
        np.testing.assert_allclose(found[scored], best[scored] - best[scored].mean(), atol=2e-4)


def test_bradley_terry_on_separable_data_is_finite_and_ordered():
    p = np.triu(np.ones((6, 6)), 1) + 0.5 * np.eye(6)
    s = bradley_terry(p)
    assert np.isfinite(s).all() and (np.diff(s) < 0).all() and s[0] < 12


@pytest.mark.parametrize(
    ("matrix", "options", "expected"),
    [
        (np.ones((2, 3)), {}, "expected"),
        (np.ones((2, 2)), {}, "must be 1"),
        (np.full((2, 2), 0.5), {"ridge": 0.0}, "ridge"),
    ],
)
def test_bradley_terry_checks_its_input(matrix, options, expected):
    with pytest.raises(VerdictError, match=expected):
        bradley_terry(matrix, **options)
