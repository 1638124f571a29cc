"""The measures against arithmetic written out by hand, and against slow, plain loops."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from arr_fast.evals.calibration import (
    assign_folds,
    brier,
    cross_fitted_temperature,
    fit_temperature,
    reliability,
)
from arr_fast.evals.intervals import estimates, number_clusters, resample_weights
from arr_fast.evals.metrics import (
    group_accuracy,
    pair_columns,
    paired_difference,
    summarise,
    tie_calibrated_accuracy,
)

# Five pairs. z_AB, z_BA are log-odds that the image shown first is better.
#        pair      0     1     2     3     4
Z_AB = np.array([2.0, 1.0, -1.0, 3.0, 0.0])
Z_BA = np.array([-1.0, 2.0, 2.0, -4.0, -1.0])
LABEL = np.array([1, 1, -1, -1, 1])
FORWARD, REVERSE = Z_AB, -Z_BA
# A first:  A right, A right, B right, A wrong, none -> 1 1 1 0 .5
# B first:  A right, B wrong, B right, A wrong, A right -> 1 0 1 0 1
# score = (z_AB - z_BA) / 2 = 1.5 -.5 -1.5 3.5 .5 -> right: 1 0 1 0 1


def measures():
    return {k: v[0] for k, v in summarise(pair_columns(FORWARD, REVERSE, LABEL)).items()}


def test_measures_by_hand():
    found = measures()
    expected = {
        "forward": 3.5 / 5,
        "reverse": 3 / 5,
        "mean": 6.5 / 10,
        "both": 2 / 5,
        "debiased": 3 / 5,
        "gap": 0.5 / 5,
        # The preferred image first: A first where A is preferred, else B first: 1 1 1 0 .5
        "preferred_first": 3.5 / 5,
        "preferred_second": 3 / 5,
        "preferred_gap": 0.5 / 5,
        # Orders agree: 0 (A, A), 2 (B, B), 3 (A, A).
        "consistent": 3 / 5,
        "consistent_right": 2 / 3,
        # Bias (z_AB + z_BA) / 2 = .5 1.5 .5 -.5 -.5
        "position_bias": 1.5 / 5,
        "bias_ratio": (0.5 + 1.5 + 0.5 + 0.5 + 0.5) / (1.5 + 0.5 + 1.5 + 3.5 + 0.5),
        "tie": 2 / 5,
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-12), name


def test_a_margin_makes_ties():
    columns = pair_columns(FORWARD, REVERSE, LABEL, margin=1.5)
    np.testing.assert_array_equal(columns["tie"], [1, 1, 1, 0, 1])


def test_a_judge_of_places_has_the_widest_gap():
    """One that always prefers the first image: every measure is known."""
    z = np.full(4, 2.0)
    found = {k: v[0] for k, v in summarise(pair_columns(z, -z, np.array([1, 1, 1, -1]))).items()}
    assert (found["forward"], found["reverse"], found["gap"]) == (0.75, 0.25, 0.5)
    # In whichever order the file lists them, the preferred image wins if it is shown first.
    assert (found["preferred_first"], found["preferred_second"]) == (1.0, 0.0)
    assert (found["consistent"], found["position_bias"], found["debiased"]) == (0.0, 2.0, 0.5)
    assert math.isnan(found["consistent_right"]) and math.isnan(found["bias_ratio"])


FLOATS = st.floats(-5, 5, allow_nan=False)
PAIRS = st.lists(st.tuples(FLOATS, FLOATS, st.sampled_from([1, -1])), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS)
def test_exchanging_the_images_changes_no_accuracy(pairs):
    """Call A B and B A: what was forward is reverse, and everything that both orders give stays."""
    forward, reverse, label = (np.array(column) for column in zip(*pairs, strict=True))
    here = summarise(pair_columns(forward, reverse, label))
    there = summarise(pair_columns(-reverse, -forward, -label))
    assert here["forward"] == there["reverse"]
    for name in ("mean", "both", "debiased", "preferred_gap", "consistent", "position_bias"):
        np.testing.assert_allclose(here[name], there[name], atol=1e-12)
    np.testing.assert_allclose(here["gap"], -there["gap"], atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS, seed=st.integers(0, 99))
def test_weights_are_repetitions(pairs, seed):
    forward, reverse, label = (np.array(column) for column in zip(*pairs, strict=True))
    weights = np.random.default_rng(seed).integers(0, 4, len(pairs)) + (np.arange(len(pairs)) == 0)
    weighted = summarise(pair_columns(forward, reverse, label), weights[None].astype(float))
    again = np.repeat(np.arange(len(pairs)), weights)
    repeated = summarise(pair_columns(forward[again], reverse[again], label[again]))
    for name, value in repeated.items():
        np.testing.assert_allclose(weighted[name], value, atol=1e-9, err_msg=name)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (([1.0], [1.0], [0]), "label must be 1 or -1"),
        (([1.0], [1.0, 2.0], [1]), "reverse 2"),
        (([float("nan")], [1.0], [1]), "forward has values that are not finite"),
    ],
)
def test_arguments_are_checked(arguments, expected):
    with pytest.raises(ValueError, match=expected):
        pair_columns(*map(np.array, arguments))


def slow_tie_accuracy(score, label):
    """Every threshold tried, one answer after the other."""
    best = -1.0
    for epsilon in [0.0, *np.abs(score)]:
        answers = [0 if abs(s) <= epsilon else (1 if s > 0 else -1) for s in score]
        best = max(best, sum(a == y for a, y in zip(answers, label, strict=True)) / len(score))
    return best


@settings(max_examples=100, deadline=None)
@given(
    pairs=st.lists(
        st.tuples(st.sampled_from([-2.0, -1.0, -0.5, 0.0, 0.5, 1.0]), st.sampled_from([-1, 0, 1])),
        min_size=1,
        max_size=10,
    )
)
def test_tie_calibrated_accuracy_is_the_best_threshold(pairs):
    score, label = (np.array(column) for column in zip(*pairs, strict=True))
    accuracy, epsilon = tie_calibrated_accuracy(score, label)
    assert accuracy == pytest.approx(slow_tie_accuracy(score, label), abs=1e-12)
    answers = np.where(np.abs(score) <= epsilon, 0, np.sign(score))
    assert accuracy == pytest.approx((answers == label).mean(), abs=1e-12)


def test_tie_calibrated_accuracy_by_hand():
    score, label = np.array([3.0, -2.0, 0.4, -0.2]), np.array([1, -1, 0, 1])
    assert tie_calibrated_accuracy(score, label) == (0.75, 0.4)


def test_groups_are_right_as_a_whole():
    right = np.array([1.0, 1.0, 1.0, 0.5, 1.0])
    assert group_accuracy(right, ["a", "a", "b", "b", None]) == (0.5, 2)
    assert group_accuracy(right, [None] * 5) is None


def test_mcnemar_interval_by_hand():
    """100 pairs: 15 that only the first gets right, 5 that only the second does."""
    first = np.array([1.0] * 15 + [0.0] * 5 + [1.0] * 80)
    second = np.array([0.0] * 15 + [1.0] * 5 + [1.0] * 80)
    difference, low, high = paired_difference(first, second)
    half = 1.96 * math.sqrt((15 + 5 - (15 - 5) ** 2 / 100) / 100**2)
    assert difference == pytest.approx(0.10)
    assert (low, high) == pytest.approx((0.10 - half, 0.10 + half), abs=1e-5)


def test_brier_by_hand():
    found = brier(np.array([math.log(3), -math.log(3), 0.0]), np.array([1, 1, -1]))
    np.testing.assert_allclose(found, [0.25**2, 0.75**2, 0.25], atol=1e-12)
    cooled = brier(np.array([2 * math.log(3)]), np.array([1]), 2.0)
    np.testing.assert_allclose(cooled, [0.25**2], atol=1e-12)


def test_reliability_by_hand():
    """Confidence .82 three times (two right) and .62 once (wrong): bins 6 and 2 of ten."""
    sure, unsure = math.log(0.82 / 0.18), math.log(0.62 / 0.38)
    found = reliability(np.array([sure, -sure, sure, unsure]), np.array([1, -1, -1, -1]))
    assert found.count.tolist() == [0, 0, 1, 0, 0, 0, 3, 0, 0, 0]
    assert found.confidence[6] == pytest.approx(0.82) and found.accuracy[6] == pytest.approx(2 / 3)
    assert found.ece == pytest.approx(0.75 * (0.82 - 2 / 3) + 0.25 * 0.62)


def test_the_temperature_of_a_judge_that_is_too_sure():
    """Labels drawn with P = sigmoid(Z / 4): the fit must find 4, and repair ECE."""
    rng = np.random.default_rng(0)
    score = rng.normal(0, 6, 20_000)
    label = np.where(rng.random(20_000) < 1 / (1 + np.exp(-score / 4)), 1, -1)
    assert fit_temperature(score, label) == pytest.approx(4.0, rel=0.05)
    fitted = cross_fitted_temperature(score, label, np.arange(20_000) % 5)
    assert len(np.unique(fitted)) == 5
    assert reliability(score, label).ece > 0.08
    assert reliability(score, label, fitted).ece < 0.015
    # The best of a plain grid is no better.
    grid = np.exp(np.linspace(-3, 3, 301))
    losses = [np.logaddexp(0, -score * label / t).mean() for t in grid]
    assert abs(math.log(fit_temperature(score, label) / grid[int(np.argmin(losses))])) < 0.03


def test_a_pair_has_no_part_in_its_own_temperature():
    rng = np.random.default_rng(1)
    score, label = rng.normal(0, 2, 100), rng.choice([-1, 1], 100)
    folds = assign_folds(np.arange(100), 5, 0)
    before = cross_fitted_temperature(score, label, folds)
    mine = folds == folds[0]
    changed = np.where(mine, -label, label)
    after = cross_fitted_temperature(score, changed, folds)
    np.testing.assert_array_equal(before[mine], after[mine])
    assert not np.allclose(before[~mine], after[~mine])


def test_clusters_stay_in_one_fold():
    clusters = number_clusters([("a",), ("b",), ("a",), ("c",), ("b",), ("d",)])
    assert clusters.tolist() == [0, 1, 0, 2, 1, 3]
    folds = assign_folds(clusters, 3, 0)
    assert len({(c, f) for c, f in zip(clusters, folds, strict=True)}) == 4
    assert sorted(np.bincount(assign_folds(np.arange(10), 5, 3))) == [2] * 5


def test_bootstrap_agrees_with_scipy():
    rng = np.random.default_rng(2)
    values = rng.random(300)
    weights = resample_weights(np.arange(300), 4000, 0)
    assert (weights.sum(axis=1) == 300).all()
    found = estimates(lambda w: summarise({"x": values}, w), weights)["x"]
    theirs = stats.bootstrap(
        (values,), np.mean, n_resamples=4000, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_clusters_widen_intervals():
    """Ten copies of each value say no more than one: the interval must be that of the values."""
    rng = np.random.default_rng(3)
    values = rng.random(60)
    copies = np.repeat(values, 10)
    single = estimates(
        lambda w: summarise({"x": values}, w), resample_weights(np.arange(60), 1000, 7)
    )["x"]
    clustered = estimates(
        lambda w: summarise({"x": copies}, w),
        resample_weights(np.repeat(np.arange(60), 10), 1000, 7),
    )["x"]
    naive = estimates(
        lambda w: summarise({"x": copies}, w), resample_weights(np.arange(600), 1000, 7)
    )["x"]
    assert (clustered.low, clustered.high) == pytest.approx((single.low, single.high), abs=1e-12)
    assert naive.high - naive.low < 0.5 * (clustered.high - clustered.low)


def test_no_resamples_no_interval():
    found = estimates(
        lambda w: summarise({"x": np.ones(3)}, w), resample_weights(np.arange(3), 0, 0)
    )
    assert found["x"].to_json() == {"value": 1.0, "low": None, "high": None}
