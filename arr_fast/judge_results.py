"""From label logits per path to the padded arrays that verdicts are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arr_fast.engine.engine import PathResult
from arr_fast.judge_items import Item, Mode
from arr_fast.rubric import Criterion


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
