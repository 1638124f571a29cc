"""Select (eq. 5): the criteria, and their weights, by which the judge is right most often.

The matrix of log-odds is given; from here on it is arithmetic. Everything is odd under exchange of
A and B: there is no intercept, and each pair counts from both sides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from arr_fast.autorubric.redundancy import groups_of, scaled
from arr_fast.autorubric.verdict_log import ScoreMatrix
from arr_fast.errors import MissingDependencyError
from arr_fast.evals.calibration import assign_folds
from arr_fast.evals.metrics import credit

Method = Literal["greedy", "l1", "grouped l1"]
METHODS: tuple[Method, ...] = ("greedy", "l1", "grouped l1")
# Inverse strengths of the l1 penalty that cross-validation chooses from.
STRENGTHS = (0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 3.0)
# A criterion whose verdicts depend on position more than on the pictures is left out, if enough
# others remain.
MOST_BIAS, FEWEST = 1.0, 3
# What the criteria favour by position alone counts, this many times over, as a tie.
EVEN = 2.0
_SCALES = np.exp(np.linspace(-3.0, 3.0, 61))


@dataclass(frozen=True, slots=True, eq=False)
class Weights:
    """What a method makes of a matrix.

    Attributes:
        method: The method.
        weights: float64 [K] per unit of log-odds; 0 where a criterion was left out. Scaled so that
            sigmoid(sum weights * preference) is the fitted probability.
    """

    method: Method
    weights: np.ndarray

    @property
    def chosen(self) -> np.ndarray:
        """int: criteria in use, the heaviest first."""
        order = np.argsort(-np.abs(self.weights), kind="stable")
        return np.asarray(order[np.abs(self.weights[order]) > 0.0])


@dataclass(frozen=True, slots=True)
class PathStep:
    """One step of greedy forward selection.

    Attributes:
        size: Criteria so far.
        text: The one that was added.
        accuracy: On the pairs that chose it (optimistic).
        cross_validated: Mean over folds whose path was chosen without them.
    """

    size: int
    text: str
    accuracy: float
    cross_validated: float

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes."""
        return {
            "size": self.size,
            "text": self.text,
            "accuracy": self.accuracy,
            "cross_validated": self.cross_validated,
        }


def solve(matrix: ScoreMatrix, method: Method, *, limit: int, folds: int, seed: int) -> Weights:
    """Fits one method to all pairs of a matrix; its own choices are made by cross-validation.

    Criteria that carry position bias (see `biased_criteria`) are left out before; logistic weights
    also let as little as possible of what remains add up (see `_l1_weights`).

    Args:
        matrix: N pairs x K criteria.
        method: "greedy": forward selection, equal weights, size by cross-validated accuracy.
            "l1": logistic weights without intercept, strength by cross-validated log-loss.
            "grouped l1": the same, with one weight for criteria whose verdicts go together; few
            pairs can tell qualities apart, but not paraphrases, whose mean is less noisy than each.
        limit: Most criteria.
        folds, seed: Of the inner cross-validation.
    """
    usable = _usable(matrix)
    values, scale = scaled(matrix.preference[:, usable])
    bias = matrix.bias[:, usable].mean(axis=0) / scale
    fold_of = assign_folds(matrix.clusters, folds, seed)
    found = np.zeros(len(usable))
    if method == "greedy":
        size = _best_size(values, matrix.label, fold_of, limit)
        chosen = forward_path(values, matrix.label, size)
        found[chosen] = _best_scale(values[:, chosen].mean(axis=1), matrix.label) / size
    elif method == "l1":
        found = _fit_l1(values, matrix.label, bias, fold_of, limit)
    else:
        found = _fit_grouped(values, matrix.label, bias, fold_of, limit)
    weights = np.zeros(len(matrix.texts))
    weights[usable] = found / scale
    return Weights(method, weights)


def greedy_report(matrix: ScoreMatrix, *, limit: int, folds: int, seed: int) -> list[PathStep]:
    """Accuracy along the selection path, on the choosing pairs and cross-validated."""
    values, _ = scaled(matrix.preference)
    fold_of = assign_folds(matrix.clusters, folds, seed)
    path = forward_path(values, matrix.label, limit)
    honest = _path_accuracy(values, matrix.label, fold_of, limit)
    return [
        PathStep(
            size,
            matrix.texts[path[size - 1]],
            float(credit(values[:, path[:size]].sum(axis=1) * matrix.label).mean()),
            float(honest[size - 1]),
        )
        for size in range(1, len(path) + 1)
    ]


def forward_path(values: np.ndarray, label: np.ndarray, limit: int) -> list[int]:
    """Greedy forward selection: each step adds the criterion that gets most pairs right.

    Equal accuracies are parted by log-loss, then by place.

    Args:
        values: float64 [N, K], preferences of like scale.
        label: [N].
        limit: Most criteria.
    """
    signed = values * label[:, None]
    chosen: list[int] = []
    total = np.zeros(len(values))
    for _ in range(min(limit, values.shape[1])):
        best: tuple[float, float, int] | None = None
        for k in range(values.shape[1]):
            if k in chosen:
                continue
            mean = (total + signed[:, k]) / (len(chosen) + 1)
            key = (-float(credit(mean).mean()), float(np.logaddexp(0.0, -mean).mean()), k)
            best = key if best is None or key < best else best
        assert best is not None
        chosen.append(best[2])
        total = total + signed[:, best[2]]
    return chosen


def biased_criteria(matrix: ScoreMatrix) -> list[tuple[str, float, float]]:
    """Criteria whose verdict depends on position more than on the pictures.

    Returns:
        (text, mean |bias| / mean |preference|, share of pairs whose orders agree), for those with
        a ratio over 1, the worst first.
    """
    ratio = _bias_ratio(matrix)
    agree = (matrix.ab * matrix.ba < 0.0).mean(axis=0)
    return [
        (matrix.texts[k], float(ratio[k]), float(agree[k]))
        for k in np.argsort(-ratio, kind="stable")
        if ratio[k] > MOST_BIAS
    ]


def log_loss(score: np.ndarray, label: np.ndarray) -> float:
    """Mean of log(1 + exp(-score * label)), in nats; log 2 says nothing."""
    return float(np.logaddexp(0.0, -score * label).mean())


def _bias_ratio(matrix: ScoreMatrix) -> np.ndarray:
    size = np.abs(matrix.preference).mean(axis=0)
    return np.asarray(np.abs(matrix.bias).mean(axis=0) / np.maximum(size, 1e-12))


def _usable(matrix: ScoreMatrix) -> np.ndarray:
    """Places of the criteria that selection looks at."""
    usable = np.flatnonzero(_bias_ratio(matrix) <= MOST_BIAS)
    return usable if len(usable) >= FEWEST else np.arange(len(matrix.texts))


def _path_accuracy(
    values: np.ndarray, label: np.ndarray, fold_of: np.ndarray, limit: int
) -> np.ndarray:
    """Held-out accuracy of the paths that the other folds chose, float64 [sizes]."""
    sizes = min(limit, values.shape[1])
    right = np.zeros((len(values), sizes))
    for fold in np.unique(fold_of):
        held_out = fold_of == fold
        if held_out.all():
            return np.full(sizes, np.nan)
        path = forward_path(values[~held_out], label[~held_out], limit)
        sums = np.cumsum(values[held_out][:, path], axis=1)
        right[held_out] = credit(sums * label[held_out, None])
    return np.asarray(right.mean(axis=0))


def _best_size(values: np.ndarray, label: np.ndarray, fold_of: np.ndarray, limit: int) -> int:
    accuracy = _path_accuracy(values, label, fold_of, limit)
    return 1 + int(np.argmax(accuracy)) if np.isfinite(accuracy).all() else len(accuracy)


def _best_scale(mean: np.ndarray, label: np.ndarray) -> float:
    """The factor that makes a score's sigmoid fit the labels best, among a grid."""
    losses = [log_loss(scale * mean, label) for scale in _SCALES]
    return float(_SCALES[int(np.argmin(losses))])


def _fit_l1(
    values: np.ndarray, label: np.ndarray, bias: np.ndarray, fold_of: np.ndarray, limit: int
) -> np.ndarray:
    """l1 logistic weights, none negative, at most `limit`, strength by cross-validation."""
    losses = []
    for strength in STRENGTHS:
        scores = np.zeros(len(values))
        for fold in np.unique(fold_of):
            held_out = fold_of == fold
            if held_out.all():
                continue
            weights = _l1_weights(values[~held_out], label[~held_out], bias, strength, limit)
            scores[held_out] = values[held_out] @ weights
        losses.append(log_loss(scores, label))
    # Among equals the sparsest.
    strength = STRENGTHS[int(np.argmin(losses))]
    weights = _l1_weights(values, label, bias, strength, limit)
    if not weights.any():
        weights = _l1_weights(values, label, bias, STRENGTHS[-1], limit)
    return weights


def _fit_grouped(
    values: np.ndarray, label: np.ndarray, bias: np.ndarray, fold_of: np.ndarray, limit: int
) -> np.ndarray:
    """l1 weights of group means, shared out among at most `limit` members."""
    groups = groups_of(values)
    means, scale = scaled(np.stack([values[:, group].mean(axis=1) for group in groups], axis=1))
    tilt = np.array([bias[group].mean() for group in groups]) / scale
    shares = _fit_l1(means, label, tilt, fold_of, limit) / scale
    kept = _seats(shares, groups, limit)
    weights = np.zeros(values.shape[1])
    for share, group, count in zip(shares, groups, kept, strict=True):
        if count:
            weights[group[:count]] = share / count
    return weights


def _seats(shares: np.ndarray, groups: Sequence[np.ndarray], limit: int) -> list[int]:
    """Members that each group keeps: one each by weight, then a second, until all are seated."""
    kept = [0] * len(groups)
    order = [int(g) for g in np.argsort(-shares, kind="stable") if shares[g] > 0.0]
    while sum(kept) < limit:
        before = sum(kept)
        for g in order:
            if kept[g] < len(groups[g]) and sum(kept) < limit:
                kept[g] += 1
        if sum(kept) == before:
            break
    return kept


def _l1_weights(
    values: np.ndarray, label: np.ndarray, bias: np.ndarray, strength: float, limit: int
) -> np.ndarray:
    """One fit. Criteria with a negative weight are left out, then the lightest beyond the limit.

    A verified criterion says what is good: a weight against it is noise of few pairs. Beside each
    pair stands a tie whose evidence is `EVEN` times the mean position bias: weights under which the
    biases add up lose there, whichever side they favour, and those that cancel them do not.

    Args:
        values: float64 [N, K], preferences of like scale.
        label: [N].
        bias: float64 [K], mean position bias in the same units.
        strength: Inverse of the penalty.
        limit: Most criteria.
    """
    try:
        from sklearn.linear_model import LogisticRegression
    except ImportError:
        raise MissingDependencyError("scikit-learn", "autorubric") from None
    kept: Sequence[int] = range(values.shape[1])
    weights = np.zeros(values.shape[1])
    while len(kept):
        rows = values[:, list(kept)]
        # Mirrored pairs say the same from B's side: both classes are there, and the rule is odd.
        tie = EVEN * bias[list(kept)]
        model = LogisticRegression(
            l1_ratio=1.0,
            C=strength / 2,
            solver="liblinear",
            fit_intercept=False,
            random_state=0,
            max_iter=1000,
        )
        model.fit(
            np.concatenate([rows, -rows, tie[None], -tie[None]]),
            np.concatenate([label, -label, [1, 1]]),
            sample_weight=np.concatenate([np.ones(2 * len(rows)), np.full(2, len(rows))]),
        )
        found = model.coef_[0]
        order = np.argsort(-found, kind="stable")[:limit]
        good = [kept[k] for k in sorted(order) if found[k] > 0.0]
        if len(good) == len(kept):
            weights[list(kept)] = found
            break
        # Zeros need no new fit; a negative one or a surplus does.
        if not (found < 0.0).any() and (found > 0.0).sum() <= limit:
            weights[list(kept)] = np.maximum(found, 0.0)
            break
        kept = good
    return weights
