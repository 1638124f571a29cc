"""Honest cross-validation of everything after verification.

Per fold, the criteria that were written for the other folds' pairs are structured anew, weighted on
the other folds, and score the fold that was held out. Only verification reads a criterion's own
pair. What is measured is thus the procedure; the final rubric refits it on all pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arr_fast.autorubric.select import METHODS, Method, log_loss, solve
from arr_fast.autorubric.verdict_log import ScoreMatrix
from arr_fast.evals.calibration import assign_folds
from arr_fast.evals.metrics import credit

StructureRows = Callable[[Sequence[int]], Sequence[str]]
ScoreTexts = Callable[[Sequence[str]], ScoreMatrix]


@dataclass(frozen=True, slots=True)
class MethodResult:
    """How one method did on pairs that it had not seen.

    Attributes:
        accuracy: Share right, no preference counting half.
        log_loss: In nats; log 2 says nothing. NaN for "unweighted", which has no scale.
    """

    accuracy: float
    log_loss: float

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes."""
        loss = None if np.isnan(self.log_loss) else self.log_loss
        return {"accuracy": self.accuracy, "log_loss": loss}


@dataclass(frozen=True, slots=True)
class CrossValidation:
    """Held-out results by method, and the method that the final rubric uses.

    Attributes:
        results: By method; "unweighted" takes all structured criteria alike.
        best: The method with the lowest log-loss.
        folds: Pairs per fold.
    """

    results: dict[str, MethodResult]
    best: Method
    folds: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object."""
        return {
            "folds": list(self.folds),
            "best": self.best,
            "methods": {name: result.to_json() for name, result in self.results.items()},
        }


def cross_validate(
    label: np.ndarray,
    clusters: np.ndarray,
    structure_rows: StructureRows,
    score_texts: ScoreTexts,
    *,
    limit: int,
    folds: int,
    seed: int,
) -> CrossValidation:
    """Runs structure and selection once per fold, without the fold.

    Args:
        label: [N], 1 or -1.
        clusters: int [N]; pairs of one cluster are held out together.
        structure_rows: Maps the numbers of pairs to the criteria structured from them alone.
        score_texts: Maps criteria to their matrix on all N pairs; asked once, for every fold's.
        limit: Most criteria.
        folds, seed: Of outer and inner folds.

    Raises:
        ValueError: Fewer than two clusters.
    """
    fold_of = assign_folds(clusters, folds, seed)
    numbers = np.unique(fold_of)
    if len(numbers) < 2:
        raise ValueError("cross-validation needs pairs of at least two prompts")
    scores: dict[str, np.ndarray] = {
        name: np.zeros(len(label)) for name in ("unweighted", *METHODS)
    }
    texts_of = [
        tuple(structure_rows([int(i) for i in np.flatnonzero(fold_of != fold)])) for fold in numbers
    ]
    everything = score_texts(list(dict.fromkeys(text for texts in texts_of for text in texts)))
    for fold, texts in zip(numbers, texts_of, strict=True):
        held_out = fold_of == fold
        matrix = everything.only(texts)
        shown = matrix.preference[held_out]
        scores["unweighted"][held_out] = shown.mean(axis=1)
        for method in METHODS:
            fitted = solve(matrix.take(~held_out), method, limit=limit, folds=folds, seed=seed)
            scores[method][held_out] = shown @ fitted.weights
    results = {
        name: MethodResult(
            float(credit(score * label).mean()),
            float("nan") if name == "unweighted" else log_loss(score, label),
        )
        for name, score in scores.items()
    }
    best = min(METHODS, key=lambda name: results[name].log_loss)
    return CrossValidation(results, best, tuple(int((fold_of == f).sum()) for f in numbers))
