"""Verdicts on image pairs: log-odds -> preference, position bias, aggregate, status and reward.

Shapes: B pairs, K criteria, padded with NaN where `criteria_mask` is False. With z the log-odds
that the image shown FIRST is the better one:

    preference = (z_AB - z_BA) / 2    position_bias = (z_AB + z_BA) / 2    consistent: z_AB z_BA < 0
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from arr_fast import aggregation as rules
from arr_fast.aggregation import AggregationName, Evidence
from arr_fast.errors import VerdictError
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
    per_item,
    status_of,
    vector,
    weak_items,
)

OnError = Literal["abstain", "raise", "zero"]

logger = logging.getLogger(__name__)


class Rewards(NamedTuple):
    """Rewards of eq. 11 and the weight of each pair in a loss.

    Attributes:
        reward: float32 [B, 2], (A, B).
        weight: float32 [B]: 1 for a decided pair, 0 for a tie or an abstention.
    """

    reward: np.ndarray
    weight: np.ndarray


@dataclass(frozen=True, slots=True, eq=False)
class PairVerdicts:
    """Verdicts on B image pairs.

    Attributes:
        criteria: Per pair, the criterion ids in order.
        criteria_mask: bool [B, K].
        log_odds_ab: float64 [B, K], A shown first, or None where that order was not asked for.
        log_odds_ba: float64 [B, K], B shown first, or None.
        preference: float64 [B, K], positive where A is better.
        position_bias: float64 [B, K], positive where the first place gains; NaN for one order.
        consistent: bool [B, K]: both orders name one winner; None for one order.
        weights: float64 [B, K].
        essential: bool [B, K].
        holistic_preference: float64 [B] or None.
        holistic_bias: float64 [B] or None (NaN for one order).
        label_mass: float64 [B, K], P(any label), the lower of the orders, or None.
        aggregation: Name of the rule.
        temperature, margin: float64 [B], its calibration for each pair.
        score: float64 [B], Z of the rule; NaN for an error.
        order_consistent: bool [B]: the rule names one winner for both orders; None for one order.
        probability: float64 [B], P(A > B); NaN for an error.
        winner_code: int8 [B]: 1 A, -1 B, 0 tie, NO_WINNER error.
        status: Per pair: ok | tie | low_label_mass | error.
        errors: Per pair, the message of an error, else None.
        provenance: Where the numbers come from.
    """

    criteria: tuple[tuple[str, ...], ...]
    criteria_mask: np.ndarray
    log_odds_ab: np.ndarray | None
    log_odds_ba: np.ndarray | None
    preference: np.ndarray
    position_bias: np.ndarray
    consistent: np.ndarray | None
    weights: np.ndarray
    essential: np.ndarray
    holistic_preference: np.ndarray | None
    holistic_bias: np.ndarray | None
    label_mass: np.ndarray | None
    aggregation: AggregationName
    temperature: np.ndarray
    margin: np.ndarray
    score: np.ndarray
    order_consistent: np.ndarray | None
    probability: np.ndarray
    winner_code: np.ndarray
    status: tuple[Status, ...]
    errors: tuple[str | None, ...]
    provenance: Provenance

    def __len__(self) -> int:
        return len(self.status)

    @property
    def winner(self) -> tuple[Literal["A", "B", "tie"] | None, ...]:
        """The better image of each pair; None for an error."""
        names: dict[int, Literal["A", "B", "tie"]] = {1: "A", -1: "B", 0: "tie"}
        return tuple(names.get(int(code)) for code in self.winner_code)

    def count(self, status: Status) -> int:
        """Returns how many pairs have a status."""
        return self.status.count(status)

    def reward(
        self, lam: float = 1.0, gamma: float = 0.1, on_error: OnError = "abstain"
    ) -> Rewards:
        """Rewards of eq. 11: winner +lam, loser -gamma, tie 0 with weight 0.

        Args:
            lam: Reward of the winner.
            gamma: Penalty of the loser (a positive number).
            on_error: For pairs with status error or low_label_mass: "abstain" gives 0 with weight
                0; "raise" raises; "zero" gives 0 with weight 1 and logs how many.

        Raises:
            VerdictError: for such a pair under "raise", naming each; for an unknown policy.
        """
        if on_error not in ("abstain", "raise", "zero"):
            raise VerdictError(f"on_error must be abstain, raise or zero, got {on_error!r}")
        unusable = np.array([s in ("error", "low_label_mass") for s in self.status], dtype=bool)
        if unusable.any() and on_error == "raise":
            named = [
                f"pair {i}: {self.errors[i] or self.status[i]}" for i in np.flatnonzero(unusable)
            ]
            raise VerdictError(f"{len(named)} pairs have no usable verdict: {'; '.join(named)}")
        sign = np.where(unusable, 0, self.winner_code).astype(np.float32)
        first = np.where(sign > 0, lam, np.where(sign < 0, -gamma, 0.0))
        second = np.where(sign < 0, lam, np.where(sign > 0, -gamma, 0.0))
        weight = (sign != 0).astype(np.float32)
        if unusable.any() and on_error == "zero":
            weight[unusable] = 1.0
            logger.warning("%d of %d pairs got reward 0 for an error", unusable.sum(), len(self))
        return Rewards(np.stack([first, second], axis=1).astype(np.float32), weight)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object; padding is dropped and NaN becomes null.

        Its own temperature and margin are those of all pairs, null where pairs differ.
        """
        return {
            "schema": f"arr_fast.pair_verdicts/{SCHEMA_VERSION}",
            "provenance": self.provenance.to_json(),
            "aggregation": self.aggregation,
            "temperature": common(self.temperature.tolist()),
            "margin": common(self.margin.tolist()),
            "pairs": [self.pair_json(index) for index in range(len(self))],
        }

    def pair_json(self, index: int) -> dict[str, Any]:
        """Returns pair `index` as a JSON-able object."""
        columns = {
            "preference": self.preference,
            "position_bias": self.position_bias,
            "consistent": self.consistent,
            "log_odds_ab": self.log_odds_ab,
            "log_odds_ba": self.log_odds_ba,
            "label_mass": self.label_mass,
            "weight": self.weights,
        }
        # A pair that failed has no numbers, but it keeps the names of what was asked.
        criteria = [
            {
                "id": name,
                **{
                    key: jsonable(column[index, k])
                    for key, column in columns.items()
                    if column is not None and k < column.shape[1]
                },
            }
            for k, name in enumerate(self.criteria[index])
        ]
        values = {
            "score": self.score,
            "probability": self.probability,
            "temperature": self.temperature,
            "margin": self.margin,
            "consistent": self.order_consistent,
            "holistic_preference": self.holistic_preference,
            "holistic_bias": self.holistic_bias,
        }
        return {
            "status": self.status[index],
            "winner": self.winner[index],
            **{k: jsonable(v[index]) for k, v in values.items() if v is not None},
            "error": self.errors[index],
            "criteria": criteria,
        }


def pair_verdicts(
    log_odds_ab: Any = None,
    log_odds_ba: Any = None,
    *,
    provenance: Provenance,
    criteria: Sequence[Sequence[str]] | None = None,
    criteria_mask: Any = None,
    weights: Any = None,
    essential: Any = None,
    holistic_ab: Any = None,
    holistic_ba: Any = None,
    label_mass_ab: Any = None,
    label_mass_ba: Any = None,
    holistic_label_mass: Any = None,
    label_mass_threshold: float = 0.5,
    aggregation: AggregationName = "log_odds_mean",
    temperature: Any = 1.0,
    margin: Any = 0.0,
    inconsistent: Literal["tie", "keep"] = "tie",
    learned_weights: Any = None,
    errors: Sequence[str | None] | None = None,
) -> PairVerdicts:
    """Turns log-odds into verdicts.

    Args:
        log_odds_ab: [B, K] or None: z with A shown first.
        log_odds_ba: [B, K] or None: z with B shown first (positive: B, the first shown, is better).
        provenance: Where the log-odds come from.
        criteria: Ids per pair; "0", "1", ... by default.
        criteria_mask: bool [B, K]; by default the lengths of `criteria`, else all True.
        weights: [K] or [B, K]; 1 by default.
        essential: [K] or [B, K] bool, for the veto rule.
        holistic_ab, holistic_ba: [B] or None: the whole-rubric leaf.
        label_mass_ab, label_mass_ba: [B, K] or None.
        holistic_label_mass: [B] or None, the lower of the orders.
        label_mass_threshold: A verdict under it is flagged; it casts no vote in weighted_sum and
            majority; a pair whose weighted mean is under it has status low_label_mass.
        aggregation: The rule.
        temperature, margin: Its calibration, a number or [B]; |Z| <= margin is a tie.
        inconsistent: What a pair is whose two orders name different winners: "tie", or "keep" the
            winner of the mean.
        learned_weights: [K] or [B, K], for the learned rule.
        errors: Per pair, a message where judging failed, else None.

    Returns:
        PairVerdicts. A pair with an error, or with a NaN inside its mask, has status error.

    Raises:
        VerdictError: for shapes that do not match, naming both, or missing inputs of a rule.
    """
    if inconsistent not in ("tie", "keep"):
        raise VerdictError(f'inconsistent must be "tie" or "keep", got {inconsistent!r}')
    shape = Inputs.of(
        {"log_odds_ab": log_odds_ab, "log_odds_ba": log_odds_ba},
        {"holistic_ab": holistic_ab, "holistic_ba": holistic_ba},
        criteria,
        criteria_mask,
    )
    temperature_B = per_item(temperature, shape, "temperature")
    margin_B = per_item(margin, shape, "margin")
    if not ((temperature_B > 0.0) & np.isfinite(temperature_B)).all():
        raise VerdictError(f"temperature must be positive and finite, got {temperature}")
    if not ((margin_B >= 0.0) & np.isfinite(margin_B)).all():
        raise VerdictError(f"margin must be finite and at least 0, got {margin}")
    mask, ids = criterion_mask(shape, criteria, criteria_mask)
    ab, ba = (
        None if z is None else np.where(mask, matrix(z, shape, name), np.nan)
        for z, name in ((log_odds_ab, "log_odds_ab"), (log_odds_ba, "log_odds_ba"))
    )
    whole_ab = vector(holistic_ab, shape, "holistic_ab")
    whole_ba = vector(holistic_ba, shape, "holistic_ba")
    mass = lower(
        None if label_mass_ab is None else matrix(label_mass_ab, shape, "label_mass_ab"),
        None if label_mass_ba is None else matrix(label_mass_ba, shape, "label_mass_ba"),
    )
    if mass is not None:
        mass = np.where(mask, mass, np.nan)
    preference, bias = _debias(ab, ba)
    if preference is None or bias is None:
        preference = bias = np.full(mask.shape, np.nan)
    whole_preference, whole_bias = _debias(whole_ab, whole_ba)
    weights_BK = _finite_weights(1.0 if weights is None else weights, shape, mask, "weights")
    low = np.zeros(mask.shape, bool) if mass is None else mask & ~(mass >= label_mass_threshold)
    evidence = Evidence(
        preference_BK=preference,
        mask_BK=mask,
        weights_BK=weights_BK,
        essential_BK=matrix(False if essential is None else essential, shape, "essential") > 0,
        abstain_BK=low,
        holistic_B=whole_preference,
        learned_BK=None
        if learned_weights is None
        else _finite_weights(learned_weights, shape, mask, "learned_weights"),
        temperature=temperature_B,
        margin=margin_B,
    )
    messages = failures(shape, aggregation, evidence, ids, errors)
    failed = np.array([message is not None for message in messages], dtype=bool)
    score = np.where(failed, np.nan, rules.aggregate(aggregation, evidence))
    agree = _order_agreement(aggregation, evidence, ab, ba, whole_ab, whole_ba)
    code = np.where(np.abs(score) <= margin_B, 0.0, np.sign(score))
    if agree is not None and inconsistent == "tie":
        code = np.where(agree, code, 0.0)
    code = np.where(failed, NO_WINNER, code).astype(np.int8)
    weak = weak_items(mass, weights_BK, mask, label_mass_threshold)
    if aggregation == "holistic":
        whole_mass = vector(holistic_label_mass, shape, "holistic_label_mass")
        weak = (
            np.zeros(len(weak), bool)
            if whole_mass is None
            else ~(whole_mass >= label_mass_threshold)
        )
    return PairVerdicts(
        criteria=ids,
        criteria_mask=mask,
        log_odds_ab=ab,
        log_odds_ba=ba,
        preference=preference,
        position_bias=bias,
        consistent=None if ab is None or ba is None else mask & (ab * ba < 0.0),
        weights=weights_BK,
        essential=evidence.essential_BK & mask,
        holistic_preference=whole_preference,
        holistic_bias=whole_bias,
        label_mass=mass,
        aggregation=aggregation,
        temperature=temperature_B,
        margin=margin_B,
        score=score,
        order_consistent=agree,
        probability=rules.probability(aggregation, score, temperature_B),
        winner_code=code,
        status=tuple(status_of(int(c), bool(w)) for c, w in zip(code, weak, strict=True)),
        errors=messages,
        provenance=provenance,
    )


def _finite_weights(value: Any, shape: Inputs, mask: np.ndarray, name: str) -> np.ndarray:
    """Weights as float64 [B, K], 0 outside the mask."""
    weights = np.where(mask, matrix(value, shape, name), 0.0)
    if not np.isfinite(weights).all():
        raise VerdictError(f"{name} must be finite")
    return weights


def common(numbers: Sequence[float]) -> float | None:
    """The number that all pairs share, or None."""
    return numbers[0] if len(set(numbers)) == 1 else None


def _debias(
    ab: np.ndarray | None, ba: np.ndarray | None
) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Returns (preference, bias); with one order the preference is that order's and bias NaN."""
    if ab is not None and ba is not None:
        return 0.5 * (ab - ba), 0.5 * (ab + ba)
    if ab is not None:
        return ab, np.full(ab.shape, np.nan)
    if ba is not None:
        return -ba, np.full(ba.shape, np.nan)
    return None, None


def _order_agreement(
    aggregation: AggregationName,
    evidence: Evidence,
    ab: np.ndarray | None,
    ba: np.ndarray | None,
    whole_ab: np.ndarray | None,
    whole_ba: np.ndarray | None,
) -> np.ndarray | None:
    """Whether the rule names one winner for each order alone; bool [B], None for one order."""
    single = (whole_ab, whole_ba) if aggregation == "holistic" else (ab, ba)
    if single[0] is None or single[1] is None:
        return None
    blank = evidence.preference_BK
    forward = evidence.with_preference(blank if ab is None else ab, whole_ab)
    reverse = evidence.with_preference(
        blank if ba is None else -ba, None if whole_ba is None else -whole_ba
    )
    product = rules.aggregate(aggregation, forward) * rules.aggregate(aggregation, reverse)
    return np.asarray(product > 0.0)
