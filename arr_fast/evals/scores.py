"""From log-odds per criterion to one signed number per pair and order, by every rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from arr_fast.aggregation import AGGREGATIONS, AggregationName, Evidence, aggregate
from arr_fast.errors import MissingDependencyError
from arr_fast.evals.judging import LogOdds

FOLDS = 5


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """One signed number per pair, A's side: from A shown first, from B shown first, from both."""

    forward: np.ndarray
    reverse: np.ndarray
    score: np.ndarray

    @staticmethod
    def of_orders(log_odds: np.ndarray) -> Scores:
        """From [N, 2] (z_AB, z_BA) of one question."""
        forward, reverse = log_odds[:, 0], -log_odds[:, 1]
        return Scores(forward, reverse, 0.5 * (forward + reverse))


def rule_scores(name: AggregationName, odds: LogOdds, learned: np.ndarray | None = None) -> Scores:
    """Applies a rule to each order alone and to their mean.

    Args:
        name: A rule other than holistic.
        odds: Log-odds with criteria.
        learned: float64 [N, K], for the learned rule.
    """
    mask = np.isfinite(odds.ab) & np.isfinite(odds.ba)
    evidence = Evidence(
        preference_BK=odds.ab,
        mask_BK=mask,
        weights_BK=odds.weights,
        essential_BK=odds.essential,
        abstain_BK=np.zeros(mask.shape, dtype=bool),
        learned_BK=learned,
    )
    sides = odds.ab, -odds.ba, 0.5 * (odds.ab - odds.ba)
    return Scores(*(aggregate(name, replace(evidence, preference_BK=side)) for side in sides))


def rules_for(odds: LogOdds) -> list[AggregationName]:
    """Returns the rules that say something of their own about these verdicts."""
    left_out = {"holistic", "learned"} | (set() if odds.essential.any() else {"veto"})
    return [name for name in AGGREGATIONS if name not in left_out]


def first_criteria(odds: LogOdds, count: int) -> LogOdds:
    """Returns the verdicts of the first `count` criteria of each pair's rubric."""
    return _chosen(odds, np.arange(odds.ab.shape[1], dtype=float), count)


def random_criteria(odds: LogOdds, count: int, rng: np.random.Generator) -> LogOdds:
    """Returns the verdicts of `count` criteria of each pair's rubric, drawn at random; the same
    ones wherever rubrics are as long as each other."""
    return _chosen(odds, rng.random((odds.ab.shape[1],)), count)


def _chosen(odds: LogOdds, rank_K: np.ndarray, count: int) -> LogOdds:
    """The `count` lowest ranked of each pair's own criteria, in the rubric's order."""
    own_B = np.array([len(names) for names in odds.ids])
    is_own_BK = np.arange(len(rank_K)) < own_B[:, None]
    order_BK = np.where(is_own_BK, rank_K, np.inf).argsort(axis=1, kind="stable")
    kept_BC = np.sort(order_BK[:, :count], axis=1)

    def take(values_BK: np.ndarray) -> np.ndarray:
        return np.take_along_axis(values_BK, kept_BC, axis=1)

    rows = zip(odds.ids, kept_BC.tolist(), strict=True)
    return replace(
        odds,
        ids=tuple(tuple(names[k] for k in kept if k < len(names)) for names, kept in rows),
        ab=take(odds.ab),
        ba=take(odds.ba),
        weights=take(odds.weights),
        essential=take(odds.essential),
    )


def learned_weights(odds: LogOdds, label: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Fits l1 logistic weights without intercept on the other folds of each pair.

    Args:
        odds: Log-odds whose pairs all have the same criteria.
        label: [N], 1 or -1.
        folds: int [N].

    Returns:
        float64 [N, K]: for each pair the weights that never saw its fold.

    Raises:
        MissingDependencyError: scikit-learn is not installed.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingDependencyError("scikit-learn", "evals") from None
    preference = 0.5 * (odds.ab - odds.ba)
    scale = preference.std(axis=0)
    scale = np.where(scale > 0.0, scale, 1.0)
    weights = np.zeros(preference.shape)
    for fold in np.unique(folds):
        held_out = folds == fold
        if held_out.all():
            continue
        rows, sign = preference[~held_out] / scale, label[~held_out]
        # Mirrored pairs say the same from B's side: both classes are there, and the rule is odd.
        model = LogisticRegression(l1_ratio=1.0, C=1.0, solver="liblinear", fit_intercept=False)
        model.fit(np.concatenate([rows, -rows]), np.concatenate([sign, -sign]))
        weights[held_out] = model.coef_[0] / scale
    return weights


def one_set_of_criteria(odds: LogOdds) -> Sequence[str] | None:
    """Returns the ids if every pair was judged by the same criteria, else None."""
    return odds.ids[0] if odds.ids and len(set(odds.ids)) == 1 and odds.ids[0] else None
