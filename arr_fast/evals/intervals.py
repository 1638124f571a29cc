"""Bootstrap intervals: whole clusters (the pairs of one prompt) are drawn with replacement.

One draw serves every measure, so differences between judges are paired by construction.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

import numpy as np

CHUNK = 250


@dataclass(frozen=True, slots=True)
class Estimate:
    """A number with its 95 % percentile interval; the ends are NaN where there is none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")

    def to_json(self) -> dict[str, float | None]:
        """Returns {"value", "low", "high"}; NaN becomes null."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        return {name: float(v) if np.isfinite(v) else None for name, v in numbers.items()}


def number_clusters(keys: Sequence[Hashable]) -> np.ndarray:
    """Returns int [N]: equal keys get equal numbers, from 0 in order of appearance."""
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(key, len(numbers)) for key in keys], dtype=int)


def resample_weights(clusters: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Returns how often each resample holds each pair, float64 [R, N].

    Args:
        clusters: int [N], numbered from 0.
        resamples: R.
        seed: Of the draws.
    """
    count = int(clusters.max()) + 1
    draws = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), resamples)
    return np.asarray(draws[:, clusters], dtype=np.float64)


def estimates(
    measure: Callable[[np.ndarray | None], dict[str, np.ndarray]],
    clusters: np.ndarray,
    resamples: int,
    seed: int,
) -> dict[str, Estimate]:
    """Returns every measure with its interval.

    Args:
        measure: Maps weights [R, N] to measures [R]; None means all pairs once.
        clusters: int [N].
        resamples: How many; 0 for no intervals.
        seed: Of the draws.
    """
    point = {name: float(values[0]) for name, values in measure(None).items()}
    if resamples < 1 or not len(clusters):
        return {name: Estimate(value) for name, value in point.items()}
    found: dict[str, list[np.ndarray]] = {name: [] for name in point}
    for number, start in enumerate(range(0, resamples, CHUNK)):
        size = min(CHUNK, resamples - start)
        for name, values in measure(resample_weights(clusters, size, seed + number)).items():
            found[name].append(values)
    result = {}
    for name, value in point.items():
        drawn = np.concatenate(found[name])
        drawn = drawn[np.isfinite(drawn)]
        ends = np.quantile(drawn, (0.025, 0.975)) if len(drawn) else (np.nan, np.nan)
        result[name] = Estimate(value, float(ends[0]), float(ends[1]))
    return result
