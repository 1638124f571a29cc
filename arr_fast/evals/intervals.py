"""Bootstrap intervals: whole clusters (the pairs of one prompt) are drawn with replacement.

One set of draws serves every measure of an evaluation, so what is compared is paired.
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
    """Returns how often each resample holds each pair, uint16 [R, N].

    Args:
        clusters: int [N], numbered from 0.
        resamples: R.
        seed: Of the draws.
    """
    rng = np.random.default_rng(seed)
    count = int(clusters.max()) + 1 if len(clusters) else 0
    weights = np.empty((resamples, len(clusters)), dtype=np.uint16)
    for start in range(0, resamples if count else 0, CHUNK):
        size = min(CHUNK, resamples - start)
        draws = rng.multinomial(count, np.full(count, 1 / count), size)
        weights[start : start + size] = draws[:, clusters]
    return weights


def estimates(
    measure: Callable[[np.ndarray | None], dict[str, np.ndarray]], weights: np.ndarray
) -> dict[str, Estimate]:
    """Returns every measure with its interval.

    Args:
        measure: Maps weights float64 [R, N] to measures [R]; None means all pairs once.
        weights: From `resample_weights`; R = 0 for no intervals.
    """
    point = {name: float(values[0]) for name, values in measure(None).items()}
    # A resample can miss all pairs of a criterion that only some pairs have.
    drawn = weights[weights.any(axis=1)].astype(np.float64)
    if not len(drawn):
        return {name: Estimate(value) for name, value in point.items()}
    result = {}
    for name, values in measure(drawn).items():
        finite = values[np.isfinite(values)]
        ends = np.quantile(finite, (0.025, 0.975)) if len(finite) else (np.nan, np.nan)
        result[name] = Estimate(point[name], float(ends[0]), float(ends[1]))
    return result
