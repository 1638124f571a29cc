"""The correctness gate: no speed is printed for an engine that does not compute the verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np

if TYPE_CHECKING:
    from arr_fast.bench.engine_transformers import PlainEngine
    from arr_fast.bench.workloads import Inputs

# DESIGN: |delta log-odds| <= 1e-4 in float32, and no flip where |log-odds| > 2e-4.
TOLERANCE = 1e-4
FLIP_MARGIN = 2e-4
# A probability read back as float32 resolves no more than this near 0 and 1.
PROBABILITY_TOLERANCE = 2e-5

Scale = Literal["log_odds", "probability"]


@dataclass(frozen=True, slots=True)
class Reference:
    """Verdicts of plain transformers on a workload, all or a fixed sample of them.

    Attributes:
        index: int64 [N, 3]: item, leg, criterion.
        log_odds: float64 [N].
    """

    index: np.ndarray
    log_odds: np.ndarray


@dataclass(frozen=True, slots=True)
class GateResult:
    """One engine against the reference.

    Attributes:
        engine, workload: What was compared.
        passed: Whether it agrees.
        max_difference: Largest difference in log-odds (in probability where `scale` says so).
        flips: Verdicts that name the other image.
        verdicts: How many were compared.
        spread: Standard deviation of the reference's log-odds; a gate needs inputs that move it.
        scale: What was compared.
    """

    engine: str
    workload: str
    passed: bool
    max_difference: float
    flips: int
    verdicts: int
    spread: float
    scale: Scale = "log_odds"

    def __str__(self) -> str:
        word = "passed" if self.passed else "FAILED"
        return (
            f"gate {word}: {self.engine} on {self.workload}, {self.verdicts} verdicts, largest "
            f"difference {self.max_difference:.2e} ({self.scale}), {self.flips} flips, "
            f"reference spread {self.spread:.2f}"
        )


class GateError(RuntimeError):
    """An engine disagrees with plain transformers; the message names it and by how much."""


def make_reference(plain: PlainEngine, inputs: Inputs, limit: int = 60, seed: int = 0) -> Reference:
    """Runs plain transformers on a workload, or on a sample of `limit` of its verdicts.

    Args:
        plain: The reference engine, prepared.
        inputs: The workload's inputs.
        limit: Most verdicts to compute.
        seed: Seed of the sample.
    """
    workload = inputs.workload
    shape = (workload.n_pairs, len(workload.legs), workload.criteria)
    flat = np.arange(workload.verdicts)
    if len(flat) > limit:
        flat = np.sort(np.random.default_rng(seed).choice(flat, limit, replace=False))
    index = np.stack(np.unravel_index(flat, shape), axis=1)
    values = np.empty(len(index))
    for item, leg in {(int(i), int(j)) for i, j, _ in index}:
        rows = np.flatnonzero((index[:, 0] == item) & (index[:, 1] == leg))
        values[rows] = plain.verdicts(
            inputs, item, workload.legs[leg], [int(k) for k in index[rows, 2]]
        )
    return Reference(index, values)


def check(
    engine: str, inputs: Inputs, log_odds: np.ndarray, reference: Reference, scale: Scale
) -> GateResult:
    """Compares an engine's verdicts with the reference.

    Args:
        engine: Its name.
        inputs: The workload's inputs.
        log_odds: float64 [items, legs, K], the engine's result.
        reference: What plain transformers says.
        scale: Compare log-odds, or probabilities for an engine that returns only those.
    """
    expected = reference.log_odds
    found = log_odds[tuple(reference.index.T)]
    if scale == "log_odds":
        difference, tolerance = np.abs(found - expected), TOLERANCE
    else:
        difference = np.abs(_sigmoid(found) - _sigmoid(expected))
        tolerance = PROBABILITY_TOLERANCE
    flips = int(((np.sign(found) != np.sign(expected)) & (np.abs(expected) > FLIP_MARGIN)).sum())
    worst = float(difference.max()) if np.isfinite(difference).all() else float("inf")
    return GateResult(
        engine=engine,
        workload=inputs.workload.name,
        passed=worst <= tolerance and flips == 0,
        max_difference=worst,
        flips=flips,
        verdicts=len(expected),
        spread=float(expected.std()),
        scale=scale,
    )


def _sigmoid(values: np.ndarray) -> np.ndarray:
    result: np.ndarray = 1 / (1 + np.exp(-values))
    return result
