"""Verdicts on single images: P(yes) per criterion, a score, and pairs by log-odds differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arr_fast.aggregation import Evidence, sigmoid
from arr_fast.errors import VerdictError
from arr_fast.pairwise import PairVerdicts, pair_verdicts
from arr_fast.provenance import Provenance
from arr_fast.verdict_arrays import (
    NO_WINNER,
    SCHEMA_VERSION,
    Inputs,
    Status,
    criterion_mask,
    failures,
    jsonable,
    lower,
    matrix,
    status_of,
    weak_items,
)


@dataclass(frozen=True, slots=True, eq=False)
class PointVerdicts:
    """Verdicts on B single images.

    Attributes:
        criteria: Per image, the criterion ids.
        criteria_mask: bool [B, K].
        log_odds: float64 [B, K], log-odds of "Yes" against "No".
        probability: float64 [B, K], P(yes) under label normalisation.
        weights: float64 [B, K].
        essential: bool [B, K].
        label_mass: float64 [B, K] or None.
        score: float64 [B], sum w_j P_j(yes) / sum |w_j|; NaN for an error.
        status: ok | low_label_mass | error, per image.
        errors: Per image, the message of an error, else None.
        provenance: Where the numbers come from.
    """

    criteria: tuple[tuple[str, ...], ...]
    criteria_mask: np.ndarray
    log_odds: np.ndarray
    probability: np.ndarray
    weights: np.ndarray
    essential: np.ndarray
    label_mass: np.ndarray | None
    score: np.ndarray
    status: tuple[Status, ...]
    errors: tuple[str | None, ...]
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.status)

    def versus(self, other: PointVerdicts, **options: Any) -> PairVerdicts:
        """Compares image b of `self` (A) with image b of `other` (B) by log-odds differences.

        This is Bradley-Terry per criterion: no order was shown, so position_bias is NaN.

        Args:
            other: Verdicts on the rivals, by the same criteria.
            **options: aggregation, temperature, margin, learned_weights of `pair_verdicts`.

        Raises:
            VerdictError: if the criteria differ.
        """
        if self.criteria != other.criteria:
            raise VerdictError("pointwise verdicts can be compared only on the same criteria")
        return pair_verdicts(
            self.log_odds - other.log_odds,
            provenance=self.provenance,
            criteria=self.criteria,
            criteria_mask=self.criteria_mask,
            weights=self.weights,
            essential=self.essential,
            label_mass_ab=lower(self.label_mass, other.label_mass),
            errors=[a or b for a, b in zip(self.errors, other.errors, strict=True)],
            **options,
        )

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object; padding is dropped and NaN becomes null."""
        return {
            "schema": f"arr_fast.point_verdicts/{SCHEMA_VERSION}",
            "provenance": self.provenance.to_json(),
            "images": [self.image_json(index) for index in range(len(self))],
        }

    def image_json(self, index: int) -> dict[str, Any]:
        """Returns image `index` as a JSON-able object."""
        columns = {"probability": self.probability, "log_odds": self.log_odds}
        if self.label_mass is not None:
            columns["label_mass"] = self.label_mass
        return {
            "status": self.status[index],
            "score": jsonable(self.score[index]),
            "error": self.errors[index],
            "criteria": [
                {"id": name, **{key: jsonable(v[index, k]) for key, v in columns.items()}}
                for k, name in enumerate(self.criteria[index])
            ],
        }


def point_verdicts(
    log_odds: Any,
    *,
    provenance: Provenance,
    criteria: Sequence[Sequence[str]] | None = None,
    criteria_mask: Any = None,
    weights: Any = None,
    essential: Any = None,
    label_mass: Any = None,
    label_mass_threshold: float = 0.5,
    errors: Sequence[str | None] | None = None,
) -> PointVerdicts:
    """Turns pointwise log-odds [B, K] of "Yes" into verdicts; arguments as in `pair_verdicts`."""
    shape = Inputs.of({"log_odds": log_odds}, {}, criteria, criteria_mask)
    mask, ids = criterion_mask(shape, criteria, criteria_mask)
    z = np.where(mask, matrix(log_odds, shape, "log_odds"), np.nan)
    mass = None
    if label_mass is not None:
        mass = np.where(mask, matrix(label_mass, shape, "label_mass"), np.nan)
    weights_BK = np.where(mask, matrix(1.0 if weights is None else weights, shape, "weights"), 0.0)
    evidence = Evidence(
        preference_BK=z,
        mask_BK=mask,
        weights_BK=weights_BK,
        essential_BK=matrix(False if essential is None else essential, shape, "essential") > 0,
        abstain_BK=np.zeros(mask.shape, dtype=bool),
    )
    messages = failures(shape, "log_odds_mean", evidence, ids, errors)
    failed = np.array([message is not None for message in messages], dtype=bool)
    yes = sigmoid(z)
    share = np.abs(weights_BK).sum(axis=1)
    total = (weights_BK * np.where(mask, yes, 0.0)).sum(axis=1)
    weak = weak_items(mass, weights_BK, mask, label_mass_threshold)
    return PointVerdicts(
        criteria=ids,
        criteria_mask=mask,
        log_odds=z,
        probability=yes,
        weights=weights_BK,
        essential=evidence.essential_BK & mask,
        label_mass=mass,
        score=np.where(failed, np.nan, total / np.where(share > 0.0, share, 1.0)),
        status=tuple(
            status_of(NO_WINNER if f else 1, bool(w)) for f, w in zip(failed, weak, strict=True)
        ),
        errors=messages,
        provenance=provenance,
    )
