"""Whether probabilities mean what they say: Brier score, ECE, and a temperature that fits them.

The probability of the label is sigmoid(Z y / T), y = 1 or -1. Confidence is that of the winner, so
that nothing here depends on which image a file puts first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from arr_fast.aggregation import sigmoid
from arr_fast.errors import MissingDependencyError

BINS = 10
_LOG_T = (-6.0, 6.0)


@dataclass(frozen=True, slots=True)
class Reliability:
    """Confidence and accuracy per bin of equal width over [0.5, 1].

    Attributes:
        count: int [BINS].
        confidence: float64 [BINS], mean confidence; NaN for an empty bin.
        accuracy: float64 [BINS], share right; NaN for an empty bin.
    """

    count: np.ndarray
    confidence: np.ndarray
    accuracy: np.ndarray

    @property
    def ece(self) -> float:
        """Expected calibration error: mean |confidence - accuracy|, weighted by count."""
        gaps = np.nan_to_num(np.abs(self.confidence - self.accuracy))
        return float((self.count * gaps).sum() / max(int(self.count.sum()), 1))


def brier(score: np.ndarray, label: np.ndarray, temperature: Any = 1.0) -> np.ndarray:
    """Squared error of the label's probability, float64 [N]; 0.25 says nothing."""
    return np.asarray((1.0 - sigmoid(score * label / temperature)) ** 2)


def reliability(score: np.ndarray, label: np.ndarray, temperature: Any = 1.0) -> Reliability:
    """Bins pairs by confidence.

    Args:
        score: float64 [N].
        label: [N], 1 or -1.
        temperature: A number, or float64 [N] where each pair has that of its fold.
    """
    confidence = sigmoid(np.abs(score) / temperature)
    right = 0.5 * (np.sign(score * label) + 1.0)
    place = np.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)
    count = np.bincount(place, minlength=BINS)
    with np.errstate(invalid="ignore"):
        return Reliability(
            count,
            np.bincount(place, weights=confidence, minlength=BINS) / count,
            np.bincount(place, weights=right, minlength=BINS) / count,
        )


def fit_temperature(score: np.ndarray, label: np.ndarray) -> float:
    """Returns the T that minimises the mean of log(1 + exp(-Z y / T)), within e^-6 .. e^6.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.optimize import minimize_scalar
    except ImportError:
        raise MissingDependencyError("scipy", "evals") from None
    margin = score * label

    def loss(log_temperature: float) -> float:
        return float(np.logaddexp(0.0, -margin / np.exp(log_temperature)).mean())

    found = minimize_scalar(loss, bounds=_LOG_T, method="bounded", options={"xatol": 1e-6})
    return float(np.exp(found.x))


def cross_fitted_temperature(score: np.ndarray, label: np.ndarray, folds: np.ndarray) -> np.ndarray:
    """Returns for each pair the temperature fitted on the other folds, float64 [N].

    Args:
        score: float64 [N].
        label: [N].
        folds: int [N], see `assign_folds`.
    """
    temperatures = np.ones(len(score))
    for fold in np.unique(folds):
        held_out = folds == fold
        if not held_out.all():
            fitted = fit_temperature(score[~held_out], label[~held_out])
            temperatures[held_out] = fitted
    return temperatures


def assign_folds(clusters: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Returns a fold per pair, int [N]; pairs of one cluster stay together.

    Args:
        clusters: int [N], numbered from 0.
        folds: How many; fewer where there are fewer clusters.
        seed: Of the shuffle.
    """
    count = int(clusters.max()) + 1 if len(clusters) else 0
    order = np.random.default_rng(seed).permutation(count)
    fold_of = np.empty(count, dtype=int)
    fold_of[order] = np.arange(count) % max(min(folds, count), 1)
    return np.asarray(fold_of[clusters])
