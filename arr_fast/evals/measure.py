"""All measures of one evaluation, with intervals: what the tables, files and plots are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from arr_fast.aggregation import AggregationName
from arr_fast.evals.calibration import (
    Reliability,
    assign_folds,
    brier,
    cross_fitted_temperature,
    fit_temperature,
    reliability,
)
from arr_fast.evals.intervals import Estimate, estimates, number_clusters, resample_weights
from arr_fast.evals.judging import LogOdds
from arr_fast.evals.metrics import (
    group_accuracy,
    pair_columns,
    paired_difference,
    summarise,
    tie_calibrated_accuracy,
)
from arr_fast.evals.scores import (
    FOLDS,
    Scores,
    first_criteria,
    learned_weights,
    one_set_of_criteria,
    random_criteria,
    rule_scores,
    rules_for,
)

ABLATION = (1, 5, 10, 20)
SUBSETS = 20
# A criterion that fewer pairs were judged by has no row of its own.
MIN_SHARE = 0.05


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """One way to judge, measured.

    Attributes:
        name: "direct", "holistic", "criteria", a rule, or a criterion.
        pairs: How many labelled pairs without ties.
        measures: By name, see `metrics`; with brier and brier_fitted.
        scores: The numbers behind it (all pairs with a decided label).
        temperature: Fitted on all pairs; None where it was not asked for.
        before, after: Reliability without and with cross-fitted temperature.
        tie_accuracy: acc* and its epsilon where people call some pairs a tie.
        groups: Share of groups with every pair right, and their number.
    """

    name: str
    pairs: int
    measures: dict[str, Estimate]
    scores: Scores
    temperature: float | None = None
    before: Reliability | None = None
    after: Reliability | None = None
    tie_accuracy: tuple[float, float] | None = None
    groups: tuple[float, int] | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Evaluation:
    """Everything measured on one set of pairs.

    Attributes:
        pairs: Judged pairs with a label.
        label_ties: How many of them people call a tie (they count only in tie accuracy).
        label: [N], of the decided pairs.
        forms: direct, holistic, criteria, as far as asked.
        rules: Every aggregation rule over the criteria.
        criteria: Every criterion by itself, in rubric order.
        ablation: (K, accuracy of the first K, mean accuracy of random K).
        differences: (form, other form, difference of debiased accuracy, low, high).
    """

    pairs: int
    label_ties: int
    label: np.ndarray
    forms: list[Measured] = field(default_factory=list)
    rules: list[Measured] = field(default_factory=list)
    criteria: list[Measured] = field(default_factory=list)
    ablation: list[tuple[int, dict[str, Estimate], dict[str, float]]] = field(default_factory=list)
    differences: list[tuple[str, str, float, float, float]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class _Setting:
    label: np.ndarray
    folds: np.ndarray
    weights: np.ndarray
    seed: int
    margin: float


def evaluate(
    odds: LogOdds,
    labels: Sequence[int],
    clusters: Sequence[Any],
    groups: Sequence[str | None] = (),
    *,
    aggregation: AggregationName = "log_odds_mean",
    resamples: int = 2000,
    seed: int = 0,
    margin: float = 0.0,
) -> Evaluation:
    """Measures a judge.

    Args:
        odds: Its log-odds on N pairs.
        labels: N labels: 1 (A), -1 (B) or 0 (a tie).
        clusters: N keys; pairs with equal keys are resampled and held out together.
        groups: N group names or None; see `metrics.group_accuracy`.
        aggregation: The rule of the form "criteria".
        resamples: Bootstrap resamples; 0 for no intervals.
        seed: Of resamples, folds and random subsets.
        margin: |score| up to this is a tie of the judge.
    """
    every = np.asarray(labels)
    decided = every != 0
    result = Evaluation(len(odds), int((~decided).sum()), every[decided])
    if not decided.any():
        return result
    numbers = number_clusters([key for key, keep in zip(clusters, decided, strict=True) if keep])
    folds = assign_folds(numbers, FOLDS, seed)
    weights = resample_weights(numbers, resamples, seed)
    setting = _Setting(every[decided], folds, weights, seed, margin)
    kept = odds.take(decided)
    names = [name for name, keep in zip(groups, decided, strict=False) if keep]
    for name, whole in _forms(odds, aggregation):
        part = Scores(*(getattr(whole, side)[decided] for side in ("forward", "reverse", "score")))
        ties = tie_calibrated_accuracy(whole.score, every) if result.label_ties else None
        result.forms.append(_measure_form(name, part, setting, names, ties))
    if kept.ab.shape[1]:
        _measure_criteria(kept, setting, result)
    _compare(result)
    return result


def _forms(odds: LogOdds, aggregation: AggregationName) -> list[tuple[str, Scores]]:
    found = []
    if odds.direct is not None:
        found.append(("direct", Scores.of_orders(odds.direct)))
    if odds.holistic is not None:
        found.append(("holistic", Scores.of_orders(odds.holistic)))
    if odds.ab.shape[1]:
        found.append(("criteria", rule_scores(aggregation, odds)))
    return found


def _measure(name: str, scores: Scores, setting: _Setting) -> Measured:
    columns = pair_columns(
        scores.forward, scores.reverse, setting.label, scores.score, setting.margin
    )
    return Measured(name, len(setting.label), _with_intervals(columns, setting), scores)


def _with_intervals(columns: dict[str, np.ndarray], setting: _Setting) -> dict[str, Estimate]:
    return estimates(lambda weights: summarise(columns, weights), setting.weights)


def _measure_form(
    name: str,
    scores: Scores,
    setting: _Setting,
    groups: list[str | None],
    ties: tuple[float, float] | None,
) -> Measured:
    label, score = setting.label, scores.score
    fitted = cross_fitted_temperature(score, label, setting.folds)
    columns = pair_columns(scores.forward, scores.reverse, label, score, setting.margin)
    columns["brier"] = brier(score, label)
    columns["brier_fitted"] = brier(score, label, fitted)
    return Measured(
        name,
        len(label),
        _with_intervals(columns, setting),
        scores,
        temperature=fit_temperature(score, label),
        before=reliability(score, label),
        after=reliability(score, label, fitted),
        tie_accuracy=ties,
        groups=group_accuracy(columns["debiased"], groups) if groups else None,
    )


def _measure_criteria(odds: LogOdds, setting: _Setting, result: Evaluation) -> None:
    for rule in rules_for(odds):
        result.rules.append(_measure(rule, rule_scores(rule, odds), setting))
    same = one_set_of_criteria(odds)
    if same is not None and len(np.unique(setting.folds)) > 1:
        learned = learned_weights(odds, setting.label, setting.folds)
        scores = rule_scores("learned", odds, learned)
        result.rules.append(_measure("learned (cross-fitted)", scores, setting))
    places: dict[str, list[tuple[int, int]]] = {}
    for row, names in enumerate(odds.ids):
        for k, name in enumerate(names):
            places.setdefault(name, []).append((row, k))
    for name, found in places.items():
        if len(found) >= MIN_SHARE * len(odds):
            rows, columns = np.array(found).T
            orders = np.stack([odds.ab[rows, columns], odds.ba[rows, columns]], axis=1)
            part = replace(
                setting,
                label=setting.label[rows],
                folds=setting.folds[rows],
                weights=setting.weights[:, rows],
            )
            result.criteria.append(_measure(name, Scores.of_orders(orders), part))
    _ablate(odds, setting, result)


def _ablate(odds: LogOdds, setting: _Setting, result: Evaluation) -> None:
    """Accuracy against the number of criteria: verdicts do not depend on each other, so this is
    arithmetic on one run."""
    width = odds.ab.shape[1]
    rng = np.random.default_rng(setting.seed)
    for count in sorted({*(k for k in ABLATION if k < width), width}):
        first = _measure(
            f"K={count}", rule_scores("log_odds_mean", first_criteria(odds, count)), setting
        )
        drawn: list[dict[str, np.ndarray]] = []
        for _ in range(SUBSETS if count < width else 1):
            scores = rule_scores("log_odds_mean", random_criteria(odds, count, rng))
            columns = pair_columns(scores.forward, scores.reverse, setting.label, scores.score)
            drawn.append(summarise(columns))
        random = {
            name: float(np.mean([float(each[name][0]) for each in drawn]))
            for name in ("mean", "debiased", "gap")
        }
        result.ablation.append((count, first.measures, random))


def _compare(result: Evaluation) -> None:
    right = {
        form.name: pair_columns(
            form.scores.forward, form.scores.reverse, result.label, form.scores.score
        )["debiased"]
        for form in result.forms
    }
    names = list(right)
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            difference = paired_difference(right[second], right[first])
            result.differences.append((second, first, *difference))
