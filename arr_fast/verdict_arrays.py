"""Shapes, masks and failures of verdict arrays: what pairwise and pointwise verdicts share.

Shapes: B items, K criteria (padded).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from arr_fast.aggregation import AggregationName, Evidence
from arr_fast.errors import VerdictError

SCHEMA_VERSION = 1
NO_WINNER = -128
Status = Literal["ok", "tie", "low_label_mass", "error"]


@dataclass(frozen=True, slots=True)
class Inputs:
    """The common size of a call: B items of up to K criteria."""

    items: int
    criteria: int

    @staticmethod
    def of(
        matrices: dict[str, Any],
        vectors: dict[str, Any],
        criteria: Sequence[Sequence[str]] | None,
        mask: Any,
    ) -> Inputs:
        """Finds B and K from whatever was given.

        Raises:
            VerdictError: if nothing was given, or two arguments disagree (naming both).
        """
        sizes: dict[str, tuple[int, ...]] = {}
        for name, value in {**matrices, "criteria_mask": mask}.items():
            if value is not None:
                sizes[name] = _shape(value, name, 2)
        widths = {name: size[1] for name, size in sizes.items()}
        counts = {name: size[0] for name, size in sizes.items()}
        for name, value in vectors.items():
            if value is not None:
                counts[name] = _shape(value, name, 1)[0]
        if not counts:
            raise VerdictError("no log-odds were given")
        if criteria is not None:
            counts["criteria"] = len(criteria)
            if not widths:
                widths["criteria"] = max((len(ids) for ids in criteria), default=0)
        _agree(counts, "items")
        _agree(widths, "criteria")
        return Inputs(next(iter(counts.values())), next(iter(widths.values()), 0))


def _shape(value: Any, name: str, ndim: int) -> tuple[int, ...]:
    shape: tuple[int, ...] = np.shape(value)
    if len(shape) != ndim:
        raise VerdictError(f"{name} has shape {list(shape)}, expected {ndim} dimensions")
    return shape


def _agree(sizes: dict[str, int], unit: str) -> None:
    (first, expected), *rest = list(sizes.items()) or [("", 0)]
    for name, size in rest:
        if size != expected:
            raise VerdictError(f"{name} has {size} {unit}, {first} has {expected}")


def matrix(value: Any, shape: Inputs, name: str) -> np.ndarray:
    """Returns value as float64 [B, K]; a scalar or [K] is repeated for every item."""
    array = np.asarray(value, dtype=np.float64)
    target = (shape.items, shape.criteria)
    if array.ndim > 2 or (array.ndim == 2 and array.shape != target):
        raise VerdictError(f"{name} has shape {list(array.shape)}, expected {list(target)}")
    if array.ndim == 1 and array.shape[0] != shape.criteria:
        raise VerdictError(f"{name} has {array.shape[0]} criteria, expected {shape.criteria}")
    return np.array(np.broadcast_to(array, target))


def vector(value: Any, shape: Inputs, name: str) -> np.ndarray | None:
    """Returns value as float64 [B], or None."""
    if value is None:
        return None
    array = np.array(value, dtype=np.float64)
    if array.shape != (shape.items,):
        raise VerdictError(f"{name} has shape {list(array.shape)}, expected [{shape.items}]")
    return array


def per_item(value: Any, shape: Inputs, name: str) -> np.ndarray:
    """Returns value as float64 [B]; a scalar is repeated for every item."""
    array = np.asarray(value, dtype=np.float64)
    if array.ndim and array.shape != (shape.items,):
        raise VerdictError(f"{name} has shape {list(array.shape)}, expected [{shape.items}]")
    return np.array(np.broadcast_to(array, (shape.items,)))


def criterion_mask(
    shape: Inputs, criteria: Sequence[Sequence[str]] | None, mask: Any
) -> tuple[np.ndarray, tuple[tuple[str, ...], ...]]:
    """Returns the mask, bool [B, K], and the ids per item.

    Raises:
        VerdictError: if an item has more ids than K, or its mask is neither empty (it failed) nor
            exactly its first len(ids) places.
    """
    size = (shape.items, shape.criteria)
    given = None if mask is None else np.array(mask, dtype=bool)
    if criteria is None:
        full = np.ones(size, dtype=bool) if given is None else given
        names = tuple(str(k) for k in range(shape.criteria))
        return full, tuple(names[: _extent(row)] for row in full)
    ids = tuple(tuple(item) for item in criteria)
    full = np.zeros(size, dtype=bool)
    for index, item in enumerate(ids):
        # A holistic call names its criteria though it judged none of them alone.
        if len(item) > shape.criteria and shape.criteria:
            raise VerdictError(
                f"criteria[{index}] has {len(item)} ids, log-odds have {shape.criteria} criteria"
            )
        full[index, : len(item)] = True
    if given is None:
        return full, ids
    for index in range(shape.items):
        if given[index].any() and not np.array_equal(given[index], full[index]):
            raise VerdictError(
                f"criteria_mask[{index}] has {int(given[index].sum())} criteria, "
                f"criteria[{index}] has {len(ids[index])} ids"
            )
    return given, ids


def _extent(row: np.ndarray) -> int:
    places = np.flatnonzero(row)
    return int(places[-1]) + 1 if len(places) else 0


def lower(first: np.ndarray | None, second: np.ndarray | None) -> np.ndarray | None:
    """Returns the elementwise minimum of those that are given."""
    if first is None or second is None:
        return second if first is None else first
    return np.asarray(np.minimum(first, second))


def failures(
    shape: Inputs,
    aggregation: AggregationName,
    evidence: Evidence,
    ids: Sequence[Sequence[str]],
    errors: Sequence[str | None] | None,
) -> tuple[str | None, ...]:
    """Names, per item, what keeps it from having a verdict; None where nothing does."""
    if errors is not None and len(errors) != shape.items:
        raise VerdictError(f"errors has {len(errors)} items, log-odds have {shape.items} pairs")
    messages: list[str | None] = [None] * shape.items if errors is None else list(errors)
    for index in range(shape.items):
        if messages[index] is not None:
            continue
        if aggregation == "holistic":
            if evidence.holistic_B is not None and not np.isfinite(evidence.holistic_B[index]):
                messages[index] = "the whole-rubric log-odds are not finite"
            continue
        inside = evidence.mask_BK[index]
        bad = inside & ~np.isfinite(evidence.preference_BK[index])
        if bad.any():
            named = ", ".join(ids[index][int(k)] for k in np.flatnonzero(bad))
            messages[index] = f"log-odds are not finite for: {named}"
        elif not inside.any():
            messages[index] = "no criterion was judged"
    return tuple(messages)


def weak_items(
    mass: np.ndarray | None, weights: np.ndarray, mask: np.ndarray, threshold: float
) -> np.ndarray:
    """Items whose |weight|-weighted mean label mass is under the threshold (or NaN); bool [B]."""
    if mass is None:
        return np.zeros(mask.shape[0], dtype=bool)
    share = np.abs(weights)
    total = share.sum(axis=1)
    mean = np.where(mask, mass, 0.0) * share
    return np.asarray((total > 0.0) & ~(mean.sum(axis=1) >= threshold * total))


def status_of(code: int, weak: bool) -> Status:
    """Returns the status of an item with a winner code and a label-mass flag."""
    if code == NO_WINNER:
        return "error"
    if weak:
        return "low_label_mass"
    return "tie" if code == 0 else "ok"


def jsonable(value: Any) -> Any:
    """Returns a numpy scalar as a Python one, NaN and infinities as None."""
    if isinstance(value, np.bool_ | bool):
        return bool(value)
    if isinstance(value, np.integer | int):
        return int(value)
    number = float(value)
    return number if np.isfinite(number) else None
