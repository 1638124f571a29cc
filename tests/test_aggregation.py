"""Aggregation rules against naive loops; oddness, monotonicity and invariance as properties."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from arr_fast.aggregation import AGGREGATIONS, Evidence, aggregate, probability, sigmoid
from arr_fast.errors import VerdictError

B, K = 3, 6
EDGES = np.array([0.0, -0.0, 1e-9, -1e-9, 0.5, -0.5, 40.0, -40.0, 700.0])


def evidence(seed: int, positive: bool = False) -> Evidence:
    """Random evidence from one seed: cheap to draw many of, and the seed reproduces it."""
    rng = np.random.default_rng(seed)

    def odds(*shape: int) -> np.ndarray:
        return np.where(rng.random(shape) < 0.3, rng.choice(EDGES, shape), rng.normal(0, 3, shape))

    mask = rng.random((B, K)) < 0.7
    mask[:, 0] = True
    weights = rng.uniform(0.1 if positive else -3.0, 3.0, (B, K))
    weights = np.where((rng.random((B, K)) < 0.1) & (not positive), 0.0, weights)
    return Evidence(
        preference_BK=np.where(mask, odds(B, K), np.nan),
        mask_BK=mask,
        weights_BK=weights,
        essential_BK=rng.random((B, K)) < rng.choice([0.0, 0.2, 0.9]),
        abstain_BK=rng.random((B, K)) < rng.choice([0.0, 0.5, 1.0]),
        holistic_B=odds(B),
        learned_BK=rng.normal(0, 1, (B, K)),
        temperature=rng.uniform(0.1, 10.0),
        margin=rng.choice([0.0, 0.5, 5.0]),
    )


SEEDS = st.integers(0, 2**32 - 1)


def naive(name: str, e: Evidence, b: int) -> float:
    """The rules as DESIGN.md, section 3, writes them: one pair, one criterion at a time."""
    used = [
        (e.preference_BK[b, j], e.weights_BK[b, j], e.essential_BK[b, j], e.abstain_BK[b, j], j)
        for j in range(K)
        if e.mask_BK[b, j]
    ]
    total = sum(abs(w) for _, w, _, _, _ in used)
    mean = sum(w * x for x, w, _, _, _ in used) / total if total else 0.0
    if name == "log_odds_mean":
        return mean
    if name == "log_odds_sum":
        return sum(w * x for x, w, _, _, _ in used)
    if name == "holistic":
        return float(e.holistic_B[b])
    if name == "learned":
        return sum(e.learned_BK[b, j] * x for x, _, _, _, j in used)
    if name == "veto":
        lost_a, lost_b, sizes = False, False, []
        for x, w, essential, _, _ in used:
            toward_a = -x if w < 0 else x
            if essential and abs(x) > e.margin:
                lost_a, lost_b = lost_a or toward_a < 0, lost_b or toward_a > 0
                sizes.append(toward_a)
        if lost_a and lost_b:
            return 0.0
        return sum(sizes) / len(sizes) if sizes else mean
    votes = [(x, w) for x, w, _, abstains, _ in used if not abstains]
    total = sum(abs(w) for _, w in votes)
    if not total:
        return 0.0
    if name == "majority":
        return sum(w * (int(x > 0) - int(x < 0)) for x, w in votes) / total
    assert name == "weighted_sum"
    return sum(w * (2.0 / (1.0 + math.exp(-x / e.temperature)) - 1.0) for x, w in votes) / total


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(seed=SEEDS)
def test_rules_equal_naive_loops(name, seed):
    e = evidence(seed)
    expected = [naive(name, e, b) for b in range(B)]
    np.testing.assert_allclose(aggregate(name, e), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(seed=SEEDS)
def test_rules_are_odd_under_exchange(name, seed):
    e = evidence(seed)
    swapped = e.with_preference(-e.preference_BK, -e.holistic_B)
    z, mirrored = aggregate(name, e), aggregate(name, swapped)
    np.testing.assert_array_equal(mirrored, -z)
    p = probability(name, z, e.temperature)
    np.testing.assert_allclose(p + probability(name, mirrored, e.temperature), 1.0, atol=1e-12)
    assert ((p >= 0) & (p <= 1)).all()


@pytest.mark.parametrize("name", AGGREGATIONS)
@given(seed=SEEDS)
def test_padding_never_matters(name, seed):
    e = evidence(seed)
    junk = replace(
        e,
        preference_BK=np.where(e.mask_BK, e.preference_BK, 1e6),
        essential_BK=e.essential_BK | ~e.mask_BK,
        weights_BK=np.where(e.mask_BK, e.weights_BK, 99.0),
    )
    np.testing.assert_array_equal(aggregate(name, junk), aggregate(name, e))


@pytest.mark.parametrize("name", ["log_odds_mean", "log_odds_sum", "weighted_sum", "majority"])
@given(seed=SEEDS)
def test_better_evidence_never_lowers_the_score(name, seed):
    e = evidence(seed, positive=True)
    gain = np.random.default_rng(seed + 1).exponential(3.0, (B, K))
    raised = e.with_preference(e.preference_BK + gain, e.holistic_B)
    assert (aggregate(name, raised) >= aggregate(name, e) - 1e-9).all()


@pytest.mark.parametrize("name", ["log_odds_mean", "weighted_sum", "majority"])
@given(seed=SEEDS)
def test_means_do_not_depend_on_the_scale_of_weights(name, seed):
    e = evidence(seed)
    scaled = replace(e, weights_BK=4.0 * e.weights_BK)
    np.testing.assert_allclose(aggregate(name, scaled), aggregate(name, e), rtol=1e-12)


def single(preference, weights=None, essential=None, **changes) -> Evidence:
    x = np.array([preference], dtype=float)
    return Evidence(
        preference_BK=x,
        mask_BK=np.ones(x.shape, bool),
        weights_BK=np.ones(x.shape) if weights is None else np.array([weights], float),
        essential_BK=np.zeros(x.shape, bool) if essential is None else np.array([essential]),
        abstain_BK=np.zeros(x.shape, bool),
        **changes,
    )


@pytest.mark.parametrize(
    ("preference", "essential", "weights", "sign"),
    [
        ([9.0, 9.0, -0.1], [False, False, True], None, -1),
        ([9.0, 9.0, -0.1], [False, True, True], None, 0),
        ([9.0, 9.0, -0.1], [False, False, False], None, 1),
        ([-9.0, -9.0, 0.0], [False, False, True], None, -1),
        # A pitfall: A shows it more strongly, so A loses it.
        ([9.0, 9.0, 0.1], [False, False, True], [1.0, 1.0, -1.0], -1),
    ],
)
def test_veto(preference, essential, weights, sign):
    (z,) = aggregate("veto", single(preference, weights, essential))
    assert np.sign(z) == sign


def test_veto_ignores_losses_within_the_margin():
    e = single([9.0, -0.4], essential=[False, True], margin=0.5)
    assert aggregate("veto", e)[0] == pytest.approx(4.3)


def test_abstentions_leave_both_sums():
    e = single([2.0, -50.0, 1.0])
    e = replace(e, abstain_BK=np.array([[False, True, False]]))
    expected = (math.tanh(1.0) + math.tanh(0.5)) / 2
    assert aggregate("weighted_sum", e)[0] == pytest.approx(expected)
    assert aggregate("majority", e)[0] == 1.0


def test_extreme_log_odds_stay_finite():
    x = np.array([-1e308, -800.0, 0.0, 800.0, 1e308])
    with np.errstate(all="raise"):
        assert sigmoid(x).tolist() == [0.0, 0.0, 0.5, 1.0, 1.0]
    assert np.isnan(sigmoid(np.array([np.nan]))).all()


def test_missing_inputs_are_named():
    with pytest.raises(VerdictError, match="whole-rubric leaf"):
        aggregate("holistic", single([1.0]))
    with pytest.raises(VerdictError, match="learned_weights"):
        aggregate("learned", single([1.0]))
    with pytest.raises(VerdictError, match=r"'mean'.*log_odds_mean"):
        aggregate("mean", single([1.0]))
