"""From label logits per path to padded arrays, and from those to verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from arr_fast.aggregation import AggregationName, Mode
from arr_fast.engine.engine import PathResult
from arr_fast.judge_items import Item, Orders
from arr_fast.provenance import Provenance
from arr_fast.rubric import Criterion
from arr_fast.verdicts import PairVerdicts, PointVerdicts, pair_verdicts, point_verdicts


@dataclass(frozen=True)
class Readings:
    """What one order of images said about B items; NaN where an item failed or is padded.

    Attributes:
        log_odds: float64 [B, K], first label over second, or None without criteria leaves.
        label_mass: float64 [B, K] or None when it was not asked for.
        holistic: float64 [B], or None without a holistic leaf.
        holistic_mass: float64 [B] or None.
    """

    log_odds: np.ndarray | None
    label_mass: np.ndarray | None
    holistic: np.ndarray | None
    holistic_mass: np.ndarray | None


def read_leg(
    items: Sequence[Item], results: Sequence[Any], leg: int, mode: Mode, label_mass: bool
) -> Readings:
    """Arrays of one leg.

    Args:
        items: B items.
        results: For each item a list over legs of lists over leaves, or an exception.
        leg: Which leg.
        mode: Which leaves there are: one per criterion, the holistic one last, or both.
        label_mass: Whether the vocabulary's log-sum-exp was read.
    """
    width = max(len(item.rubric.criteria) for item in items)
    odds, mass = (np.full((len(items), width + 1), np.nan) for _ in range(2))
    for row, (item, result) in enumerate(zip(items, results, strict=True)):
        if not isinstance(result, list):
            continue
        columns = [*range(len(item.rubric.criteria))] if mode != "holistic" else []
        columns += [width] if mode != "criteria" else []
        for column, reading in zip(columns, result[leg], strict=True):
            odds[row, column] = log_odds(reading)
            mass[row, column] = np.exp(np.logaddexp.reduce(reading.labels) - reading.vocab_lse)
    has_criteria, has_holistic = mode != "holistic", mode != "criteria"
    return Readings(
        log_odds=odds[:, :width] if has_criteria else None,
        label_mass=mass[:, :width] if has_criteria and label_mass else None,
        holistic=odds[:, width] if has_holistic else None,
        holistic_mass=mass[:, width] if has_holistic and label_mass else None,
    )


def log_odds(reading: PathResult) -> float:
    """First label over second, in nats."""
    return float(reading.labels[0]) - float(reading.labels[1])


def criterion_matrix(items: Sequence[Item], value: Callable[[Criterion], float]) -> np.ndarray:
    """float64 [B, K] of a number per criterion, padded with 0."""
    width = max(len(item.rubric.criteria) for item in items)
    matrix = np.zeros((len(items), width))
    for row, item in enumerate(items):
        matrix[row, : len(item.rubric.criteria)] = [value(c) for c in item.rubric.criteria]
    return matrix


def message_of(item: Item, result: Any) -> str | None:
    """Why an item has no verdict, or None."""
    error = item.error or (result if isinstance(result, BaseException) else None)
    if error is None:
        return None
    return f"{item.name}: {error}" if item.name not in str(error) else str(error)


def pair_results(
    items: Sequence[Item],
    results: Sequence[Any],
    *,
    provenance: Provenance,
    orders: Orders,
    mode: Mode,
    label_mass: bool,
    label_mass_threshold: float = 0.5,
    aggregation: AggregationName,
    temperature: float | None = None,
    margin: float | None = None,
    inconsistent: Literal["tie", "keep"] = "tie",
    learned_weights: Any = None,
) -> PairVerdicts:
    """Verdicts on pairs from what the engine read; options as in `Judge.compare`.

    Each pair takes the calibration of its own rubric, so its company never changes its verdict.
    """
    fitted = _calibrations(items, provenance.revision, aggregation)
    names = ("AB", "BA") if orders == "both" else (orders,)
    read = {name: read_leg(items, results, leg, mode, label_mass) for leg, name in enumerate(names)}
    ab, ba = read.get("AB"), read.get("BA")
    masses = [r.holistic_mass for r in read.values() if r.holistic_mass is not None]
    return pair_verdicts(
        ab.log_odds if ab else None,
        ba.log_odds if ba else None,
        provenance=provenance,
        criteria=[item.rubric.ids for item in items],
        weights=criterion_matrix(items, lambda c: c.weight) if mode != "holistic" else None,
        essential=criterion_matrix(items, lambda c: float(c.essential))
        if mode != "holistic"
        else None,
        holistic_ab=ab.holistic if ab else None,
        holistic_ba=ba.holistic if ba else None,
        label_mass_ab=ab.label_mass if ab else None,
        label_mass_ba=ba.label_mass if ba else None,
        holistic_label_mass=np.minimum.reduce(masses) if masses else None,
        label_mass_threshold=label_mass_threshold,
        aggregation=aggregation,
        temperature=fitted[0] if temperature is None else temperature,
        margin=fitted[1] if margin is None else margin,
        inconsistent=inconsistent,
        learned_weights=learned_weights,
        errors=[message_of(item, result) for item, result in zip(items, results, strict=True)],
    )


def _calibrations(items: Sequence[Item], revision: str, rule: str) -> tuple[np.ndarray, np.ndarray]:
    """Temperature and margin [B] fitted for this model and each item's rubric, else 1 and 0."""
    rubrics = {id(item.rubric): item.rubric for item in items}
    fits = {key: rubric.calibration_for(revision, rule) for key, rubric in rubrics.items()}
    found = [fits[id(item.rubric)] for item in items]
    return (
        np.array([1.0 if fit is None else fit.temperature for fit in found]),
        np.array([0.0 if fit is None else fit.margin for fit in found]),
    )


def point_results(
    items: Sequence[Item],
    results: Sequence[Any],
    *,
    provenance: Provenance,
    label_mass: bool,
    label_mass_threshold: float,
) -> PointVerdicts:
    """Verdicts on single images from what the engine read; see `Judge.score`."""
    read = read_leg(items, results, 0, "criteria", label_mass)
    return point_verdicts(
        read.log_odds,
        provenance=provenance,
        criteria=[item.rubric.ids for item in items],
        weights=criterion_matrix(items, lambda c: c.weight),
        essential=criterion_matrix(items, lambda c: float(c.essential)),
        label_mass=read.label_mass,
        label_mass_threshold=label_mass_threshold,
        errors=[message_of(item, result) for item, result in zip(items, results, strict=True)],
    )
