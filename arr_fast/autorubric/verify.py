"""Verify (eq. 7): does a judge that reads the pair by its criteria recover the label?

All criteria of a pair are read in one forward, both orders.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arr_fast.autorubric.call_log import Progress
from arr_fast.autorubric.generate import PairCriteria
from arr_fast.autorubric.verdict_log import VerdictLog


@dataclass(frozen=True, slots=True, eq=False)
class Verification:
    """What the judge said about the criteria of one pair.

    Attributes:
        passed: It prefers what people prefer.
        score: Mean log-odds for the preferred image; NaN without criteria or verdict.
        support: float64 [K], log-odds for the preferred image, both orders averaged.
        bias: float64 [K], log-odds that the first place gains.
        critique: The table that a rewrite is given.
    """

    passed: bool
    score: float
    support: np.ndarray
    bias: np.ndarray
    critique: str

    def failed_texts(self, texts: Sequence[str]) -> list[str]:
        """Criteria that did not point to the preferred image."""
        return [text for text, s in zip(texts, self.support, strict=True) if not s > 0.0]

    def to_json(self) -> dict[str, Any]:
        """Returns the numbers, for files."""
        return {
            "passed": self.passed,
            "score": None if np.isnan(self.score) else self.score,
            "support": _numbers(self.support),
            "position_bias": _numbers(self.bias),
        }


def verify(
    verdicts: VerdictLog,
    states: Sequence[PairCriteria],
    *,
    require_consistent: bool = False,
    progress: Progress | None = None,
) -> list[Verification]:
    """Judges every pair by its own criteria.

    Args:
        verdicts: The judge and its log.
        states: Pairs with criteria; one without criteria fails.
        require_consistent: Each order alone must recover the label too.
        progress: Told how many of the pairs are judged.
    """
    odds = verdicts.log_odds(
        [state.pair for state in states], [state.texts for state in states], progress
    )
    return [
        _verification(state, both, require_consistent)
        for state, both in zip(states, odds, strict=True)
    ]


def unverified(state: PairCriteria) -> Verification:
    """What is known of a pair before it is judged: nothing."""
    blank = np.full(len(state.texts), np.nan)
    return Verification(False, float("nan"), blank, blank, "")


def _verification(state: PairCriteria, odds: np.ndarray, consistent: bool) -> Verification:
    sign = state.pair.label
    forward, reverse = sign * odds[:, 0], -sign * odds[:, 1]
    support, bias = 0.5 * (forward + reverse), 0.5 * (odds[:, 0] + odds[:, 1])
    if not len(support) or not np.isfinite(support).all():
        return Verification(False, float("nan"), support, bias, "")
    passed = float(support.mean()) > 0.0
    if consistent:
        passed = passed and float(forward.mean()) > 0.0 and float(reverse.mean()) > 0.0
    critique = critique_table(state.texts, support, bias)
    return Verification(passed, float(support.mean()), support, bias, critique)


def critique_table(texts: Sequence[str], support: np.ndarray, bias: np.ndarray) -> str:
    """Per criterion the log-odds for the preferred image and what the order of showing adds."""
    rows = ["log-odds | order bias | criterion"]
    rows += [
        f"{s:+8.2f} | {b:+10.2f} | {text}" for text, s, b in zip(texts, support, bias, strict=True)
    ]
    return "\n".join([*rows, f"{support.mean():+8.2f} |            | mean of all"])


def _numbers(values: np.ndarray) -> list[float | None]:
    return [float(value) if np.isfinite(value) else None for value in values]
