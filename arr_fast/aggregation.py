"""From verdicts per criterion to one signed number per pair: small, named rules.

Every rule is odd under exchange of A and B: Z(-preference) = -Z(preference). Shapes: B pairs,
K criteria (padded), legend `_BK`.

    log_odds_mean  Z = sum w_j x_j / sum |w_j|                 the default
    log_odds_sum   Z = sum w_j x_j                             naive Bayes
    weighted_sum   Z = sum w_j (2 p_j - 1) / sum |w_j|         p_j = sigmoid(x_j / T); P = (1+Z)/2
    majority       Z = sum w_j sign(x_j) / sum |w_j|
    veto           an essential criterion lost loses the pair; both lose one: 0; none: log_odds_mean
    holistic       Z = preference of the whole-rubric leaf
    learned        Z = sum beta_j x_j                          l1 logistic weights, no intercept

x_j is the preference of criterion j in nats. P(A > B) = sigmoid(Z / T) unless stated.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np

from arr_fast.errors import VerdictError

AggregationName = Literal[
    "log_odds_mean", "log_odds_sum", "weighted_sum", "majority", "veto", "holistic", "learned"
]
AGGREGATIONS: tuple[AggregationName, ...] = get_args(AggregationName)
# What is read of each pair: a verdict per criterion, one for the whole rubric, or both.
Mode = Literal["criteria", "holistic", "both"]


def rule_of(
    aggregation: AggregationName | None, mode: Mode, learned_weights: Any
) -> AggregationName:
    """The rule of a call: the one asked for, or that of the mode.

    Raises:
        VerdictError: An unknown rule, one whose input the mode does not read, or weights that the
            rule does not take.
    """
    if learned_weights is not None and aggregation != "learned":
        raise VerdictError('learned_weights are for aggregation "learned" alone')
    if aggregation is None:
        return "holistic" if mode == "holistic" else "log_odds_mean"
    if aggregation not in AGGREGATIONS:
        known = ", ".join(AGGREGATIONS)
        raise VerdictError(f"unknown aggregation {aggregation!r}; there are: {known}")
    if aggregation == "holistic" and mode == "criteria":
        raise VerdictError('aggregation "holistic" needs the whole-rubric leaf: mode="holistic"')
    if aggregation != "holistic" and mode == "holistic":
        raise VerdictError(f'aggregation "{aggregation}" needs criteria: mode="criteria" or "both"')
    if aggregation == "learned" and learned_weights is None:
        raise VerdictError('aggregation "learned" needs learned_weights')
    return aggregation


@dataclass(frozen=True, slots=True)
class Evidence:
    """What a rule may look at. Entries outside the mask are ignored, whatever they hold.

    Attributes:
        preference_BK: float64 [B, K], positive where A is better, in nats.
        mask_BK: bool [B, K], True where pair b has criterion k.
        weights_BK: float64 [B, K], finite inside the mask.
        essential_BK: bool [B, K].
        abstain_BK: bool [B, K], verdicts too weak to count as a vote (low label mass).
        holistic_B: float64 [B] or None: preference of the whole-rubric leaf.
        learned_BK: float64 [B, K] or None: fitted weights.
        temperature: T above, one for all pairs or float64 [B].
        margin: Preferences up to this size lose no essential criterion; as temperature.
    """

    preference_BK: np.ndarray
    mask_BK: np.ndarray
    weights_BK: np.ndarray
    essential_BK: np.ndarray
    abstain_BK: np.ndarray
    holistic_B: np.ndarray | None = None
    learned_BK: np.ndarray | None = None
    temperature: float | np.ndarray = 1.0
    margin: float | np.ndarray = 0.0

    def with_preference(self, preference_BK: np.ndarray, holistic_B: np.ndarray | None) -> Evidence:
        """Returns the same evidence about other preferences (one order alone, for example)."""
        return replace(self, preference_BK=preference_BK, holistic_B=holistic_B)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Logistic function that neither overflows nor warns; float64, any shape, NaN stays NaN."""
    half = 0.5 * np.asarray(x, dtype=np.float64)
    result: np.ndarray = 0.5 * (1.0 + np.tanh(half))
    return result


def aggregate(name: AggregationName, evidence: Evidence) -> np.ndarray:
    """Applies a rule.

    Returns:
        Z, float64 [B].

    Raises:
        VerdictError: for an unknown rule, or one whose input is missing.
    """
    if name not in _RULES:
        raise VerdictError(f"unknown aggregation {name!r}; there are: {', '.join(AGGREGATIONS)}")
    return _RULES[name](evidence)


def probability(
    name: AggregationName, score_B: np.ndarray, temperature: float | np.ndarray
) -> np.ndarray:
    """Returns P(A > B), float64 [B], for the Z of a rule and one temperature or [B]."""
    if name == "weighted_sum":
        # The temperature has acted inside, on each p_j.
        return np.asarray(0.5 * (1.0 + score_B))
    return sigmoid(score_B / temperature)


def _column(number: float | np.ndarray) -> np.ndarray:
    """One number, or one per pair [B], against [B, K]."""
    return np.asarray(number, dtype=np.float64)[..., None]


def _weighted(evidence: Evidence, values_BK: np.ndarray, counted_BK: np.ndarray) -> np.ndarray:
    """sum w v / sum |w| over the counted entries; 0 where nothing counts."""
    weights = np.where(counted_BK, evidence.weights_BK, 0.0)
    total = np.abs(weights).sum(axis=1)
    products = weights * np.where(counted_BK, values_BK, 0.0)
    result: np.ndarray = products.sum(axis=1) / np.where(total > 0.0, total, 1.0)
    return result


def _log_odds_mean(evidence: Evidence) -> np.ndarray:
    return _weighted(evidence, evidence.preference_BK, evidence.mask_BK)


def _log_odds_sum(evidence: Evidence) -> np.ndarray:
    products = evidence.weights_BK * evidence.preference_BK
    return np.asarray(np.where(evidence.mask_BK, products, 0.0).sum(axis=1))


def _weighted_sum(evidence: Evidence) -> np.ndarray:
    counted = evidence.mask_BK & ~evidence.abstain_BK
    # tanh(x / 2) = 2 sigmoid(x) - 1, and is exactly odd.
    signed = np.tanh(0.5 * evidence.preference_BK / _column(evidence.temperature))
    return _weighted(evidence, signed, counted)


def _majority(evidence: Evidence) -> np.ndarray:
    counted = evidence.mask_BK & ~evidence.abstain_BK
    return _weighted(evidence, np.sign(evidence.preference_BK), counted)


def _veto(evidence: Evidence) -> np.ndarray:
    # A pitfall (negative weight) is lost by the image that shows it.
    direction = np.where(evidence.weights_BK < 0.0, -1.0, 1.0)
    signed = direction * np.where(evidence.mask_BK, evidence.preference_BK, 0.0)
    is_clear = np.abs(signed) > _column(evidence.margin)
    decisive = evidence.mask_BK & evidence.essential_BK & is_clear
    lost_by_a = (decisive & (signed < 0.0)).any(axis=1)
    lost_by_b = (decisive & (signed > 0.0)).any(axis=1)
    # The size of a veto: mean preference over the essential criteria lost, all of one sign.
    count = decisive.sum(axis=1)
    vetoed = np.where(decisive, signed, 0.0).sum(axis=1) / np.maximum(count, 1)
    either = np.where(lost_by_a | lost_by_b, vetoed, _log_odds_mean(evidence))
    return np.asarray(np.where(lost_by_a & lost_by_b, 0.0, either))


def _holistic(evidence: Evidence) -> np.ndarray:
    if evidence.holistic_B is None:
        raise VerdictError('aggregation "holistic" needs the whole-rubric leaf: mode="holistic"')
    return evidence.holistic_B


def _learned(evidence: Evidence) -> np.ndarray:
    if evidence.learned_BK is None:
        raise VerdictError('aggregation "learned" needs learned_weights')
    products = evidence.learned_BK * evidence.preference_BK
    return np.asarray(np.where(evidence.mask_BK, products, 0.0).sum(axis=1))


_RULES: dict[AggregationName, Callable[[Evidence], np.ndarray]] = {
    "log_odds_mean": _log_odds_mean,
    "log_odds_sum": _log_odds_sum,
    "weighted_sum": _weighted_sum,
    "majority": _majority,
    "veto": _veto,
    "holistic": _holistic,
    "learned": _learned,
}
