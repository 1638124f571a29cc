"""Single images with a label: yes/no questions (accuracy, calibration) or scores (correlation)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arr_fast.data.record import ItemError, Record
from arr_fast.errors import MissingDependencyError
from arr_fast.evals.calibration import (
    assign_folds,
    brier,
    cross_fitted_temperature,
    fit_temperature,
    reliability,
)
from arr_fast.evals.intervals import Estimate, estimates, number_clusters, resample_weights
from arr_fast.evals.judging import judge_identity
from arr_fast.evals.metrics import credit, summarise
from arr_fast.evals.scores import FOLDS
from arr_fast.rubric import Criterion, Rubric

if TYPE_CHECKING:
    from rich.console import Console

    from arr_fast.cli.session import Outcome, Prepared
    from arr_fast.judge import Judge

QUESTION = "question"


def question_rubric(record: Record) -> Rubric:
    """The record's own question as a rubric of one criterion.

    Raises:
        ItemError: if it has none.
    """
    if record.criterion is None:
        raise ItemError(f"{record.place or record.name}: criterion: missing, expected a question")
    criterion = Criterion(id=QUESTION, text=record.criterion)
    return Rubric(name=QUESTION, task=record.task, criteria=(criterion,))


def judge_points(
    judge: Judge,
    points: Sequence[Record],
    *,
    rubric_of: Callable[[Record], Rubric],
    label_mass: bool,
    batch_size: int,
    out: Path | None,
    console: Console,
) -> Outcome:
    """Scores single images, or takes their lines from an earlier run; see `judging.judge_pairs`."""
    from arr_fast.cli.session import run

    def judge_batch(batch: list[Prepared]) -> list[dict[str, Any]]:
        verdicts = judge.score(
            [p.item.prompt for p in batch],
            [p.images[0] for p in batch],
            [p.rubric for p in batch],
            sources=None if batch[0].source is None else [p.source for p in batch],
            label_mass=label_mass,
        )
        common = {"provenance": verdicts.provenance.to_json()}
        return [{**verdicts.image_json(i), **common} for i in range(len(batch))]

    return run(
        points,
        judge_batch,
        command="eval",
        rubric_of=rubric_of,
        settings={**judge_identity(judge), "label_mass": label_mass},
        batch_size=batch_size,
        out=out,
        console=console,
    )


def answer_measures(
    log_odds: np.ndarray,
    answers: np.ndarray,
    clusters: Sequence[Any],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Estimate]:
    """Measures yes/no answers.

    Args:
        log_odds: float64 [N], of "Yes".
        answers: [N], 1 for yes and 0 for no.
        clusters: N keys, the pictures: their questions are resampled together.
        resamples, seed: Of the bootstrap and the folds.

    Returns:
        accuracy, yes_right and no_right (accuracy by the true answer), said_yes, brier,
        brier_fitted, ece, ece_fitted, temperature.
    """
    label = np.where(answers > 0.5, 1, -1)
    numbers = number_clusters(list(clusters))
    fitted = cross_fitted_temperature(log_odds, label, assign_folds(numbers, FOLDS, seed))
    right = credit(log_odds * label)
    columns = {
        "accuracy": right,
        "said_yes": credit(log_odds),
        "brier": brier(log_odds, label),
        "brier_fitted": brier(log_odds, label, fitted),
    }
    weights = resample_weights(numbers, resamples, seed)
    found = estimates(lambda drawn: summarise(columns, drawn), weights)
    for name, side in (("yes_right", label > 0), ("no_right", label < 0)):
        if side.any():
            found[name] = Estimate(float(right[side].mean()))
    found["ece"] = Estimate(reliability(log_odds, label).ece)
    found["ece_fitted"] = Estimate(reliability(log_odds, label, fitted).ece)
    found["temperature"] = Estimate(fit_temperature(log_odds, label))
    return found


def score_measures(scores: np.ndarray, labels: np.ndarray) -> dict[str, Estimate]:
    """Measures scores of single images by rank correlation with people's.

    Args:
        scores: float64 [N].
        labels: float64 [N].

    Returns:
        kendall_tau (b) and spearman_rho.

    Raises:
        MissingDependencyError: scipy is not installed.
    """
    try:
        from scipy.stats import kendalltau, spearmanr
    except ImportError:
        raise MissingDependencyError("scipy", "evals") from None
    return {
        "kendall_tau": Estimate(float(kendalltau(scores, labels).statistic)),
        "spearman_rho": Estimate(float(spearmanr(scores, labels).statistic)),
    }
