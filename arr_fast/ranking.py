"""Groups of candidates: all pairs -> win rates, Bradley-Terry scores and a ranking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from arr_fast.aggregation import sigmoid
from arr_fast.errors import VerdictError
from arr_fast.pairwise import PairVerdicts
from arr_fast.provenance import Provenance
from arr_fast.verdict_arrays import NO_WINNER, SCHEMA_VERSION, jsonable

RIDGE = 0.01


@dataclass(frozen=True, slots=True, eq=False)
class GroupVerdicts:
    """Verdicts on N groups, group n of G_n candidates.

    Attributes:
        score: Per group, float64 [G, G]: Z of candidate i against j; antisymmetric, 0 on the
            diagonal, NaN where judging failed.
        winner_code: Per group, int8 [G, G]: 1 if i beats j, -1 if it loses, 0 for a tie (and on
            the diagonal), NO_WINNER where judging failed or the label mass was low.
        win_rate: Per group, float64 [G]: wins plus half of the ties, over judged opponents; NaN
            without any. A pair of low label mass judges nobody, as in `PairVerdicts.reward`.
        bradley_terry: Per group, float64 [G], log-odds scores of mean 0 from the same pairs; NaN
            for a candidate without a judged opponent.
        ranking: Per group, int64 [G], candidates from best to worst.
        pairs: The verdicts behind them.
        pair_index: Per pair: (group, i, j) with candidate i as A and j as B.
    """

    score: tuple[np.ndarray, ...]
    winner_code: tuple[np.ndarray, ...]
    win_rate: tuple[np.ndarray, ...]
    bradley_terry: tuple[np.ndarray, ...]
    ranking: tuple[np.ndarray, ...]
    pairs: PairVerdicts
    pair_index: tuple[tuple[int, int, int], ...]

    def __len__(self) -> int:
        return len(self.score)

    @property
    def provenance(self) -> Provenance:
        """Where the numbers come from."""
        return self.pairs.provenance

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object; NaN becomes null."""
        return {
            "schema": f"arr_fast.group_verdicts/{SCHEMA_VERSION}",
            "provenance": self.provenance.to_json(),
            "groups": [self.group_json(index) for index in range(len(self))],
        }

    def group_json(self, index: int) -> dict[str, Any]:
        """Returns group `index` as a JSON-able object."""
        return {
            "ranking": [int(i) for i in self.ranking[index]],
            "bradley_terry": [jsonable(x) for x in self.bradley_terry[index]],
            "win_rate": [jsonable(x) for x in self.win_rate[index]],
            "score": [[jsonable(x) for x in row] for row in self.score[index]],
            "pairs": [
                {"a": i, "b": j, **self.pairs.pair_json(place)}
                for place, (group, i, j) in enumerate(self.pair_index)
                if group == index
            ],
        }


def group_verdicts(
    pairs: PairVerdicts,
    pair_index: Sequence[tuple[int, int, int]],
    sizes: Sequence[int],
    *,
    ridge: float = RIDGE,
) -> GroupVerdicts:
    """Arranges pair verdicts by group and ranks each group.

    Args:
        pairs: Verdicts on all pairs of all groups.
        pair_index: Per pair (group, i, j): i was A, j was B. A pair may come once per group.
        sizes: G of each group.
        ridge: See `bradley_terry`.

    Raises:
        VerdictError: for an index outside the groups, a pair that comes twice, or other lengths.
    """
    if len(pair_index) != len(pairs):
        raise VerdictError(f"pair_index has {len(pair_index)} items, pairs has {len(pairs)}")
    score = [np.where(np.eye(size, dtype=bool), 0.0, np.nan) for size in sizes]
    odds = [np.where(np.eye(size, dtype=bool), 0.5, np.nan) for size in sizes]
    code = [np.where(np.eye(size, dtype=bool), 0, NO_WINNER).astype(np.int8) for size in sizes]
    seen: set[tuple[int, int, int]] = set()
    for place, (group, i, j) in enumerate(pair_index):
        if not 0 <= group < len(sizes) or not (0 <= i < sizes[group] and 0 <= j < sizes[group]):
            raise VerdictError(f"pair_index[{place}] = {(group, i, j)} is outside the groups")
        key = (group, min(i, j), max(i, j))
        if i == j or key in seen:
            raise VerdictError(f"pair_index[{place}] = {(group, i, j)} repeats a pair")
        seen.add(key)
        if pairs.status[place] == "error":
            continue
        score[group][i, j], score[group][j, i] = pairs.score[place], -pairs.score[place]
        if pairs.status[place] == "low_label_mass":
            continue
        p = pairs.probability[place]
        odds[group][i, j], odds[group][j, i] = p, 1.0 - p
        won = int(pairs.winner_code[place])
        code[group][i, j], code[group][j, i] = won, -won
    rates = [_win_rate(c) for c in code]
    strengths = [bradley_terry(p, ridge=ridge) for p in odds]
    return GroupVerdicts(
        score=tuple(score),
        winner_code=tuple(code),
        win_rate=tuple(rates),
        bradley_terry=tuple(strengths),
        ranking=tuple(_rank(s, r) for s, r in zip(strengths, rates, strict=True)),
        pairs=pairs,
        pair_index=tuple(pair_index),
    )


def bradley_terry(
    win_probability: np.ndarray,
    *,
    ridge: float = RIDGE,
    tolerance: float = 1e-10,
    max_iterations: int = 100,
) -> np.ndarray:
    """Bradley-Terry scores by penalised maximum likelihood.

    Maximises sum_{i<j} [p_ij log sigmoid(s_i - s_j) + p_ji log sigmoid(s_j - s_i)] - ridge/2 |s|^2
    by Newton's method with step halving. p may be soft (probabilities) or hard (0, 0.5, 1). The
    ridge makes the problem strictly concave: a candidate that wins all of its pairs gets a finite
    score (near log(1/ridge)), and groups that were never compared get comparable ones; scores
    shrink towards 0 by about `ridge` relative to the curvature.

    Args:
        win_probability: float64 [G, G], P(i beats j); p_ij + p_ji = 1; NaN where unknown.
        ridge: Strength of the penalty; positive.
        tolerance: Largest gradient component at the end.
        max_iterations: Newton steps at most.

    Returns:
        float64 [G], in nats, mean 0 over the scored candidates; NaN without any known opponent.

    Raises:
        VerdictError: for a non-square or non-complementary matrix, or a ridge that is not positive.
    """
    p = np.array(win_probability, dtype=np.float64)
    if p.ndim != 2 or p.shape[0] != p.shape[1]:
        raise VerdictError(f"win_probability has shape {list(p.shape)}, expected [G, G]")
    if not ridge > 0.0:
        raise VerdictError(f"ridge must be positive, got {ridge}")
    known = np.isfinite(p) & np.isfinite(p.T) & ~np.eye(len(p), dtype=bool)
    if np.abs(np.where(known, p + p.T - 1.0, 0.0)).max(initial=0.0) > 1e-9:
        raise VerdictError("win_probability[i, j] + win_probability[j, i] must be 1")
    p = np.where(known, p, 0.0)
    scores = np.zeros(len(p))
    value = _penalised(scores, p, known, ridge)
    for _ in range(max_iterations):
        expected = np.where(known, sigmoid(scores[:, None] - scores[None, :]), 0.0)
        gradient = (p - expected).sum(axis=1) - ridge * scores
        if np.abs(gradient).max(initial=0.0) <= tolerance:
            break
        curvature = expected * expected.T
        hessian = np.diag(curvature.sum(axis=1) + ridge) - curvature
        step = np.linalg.solve(hessian, gradient)
        # Newton overshoots where the sigmoid saturates; halve until the objective rises.
        for _ in range(40):
            candidate = _penalised(scores + step, p, known, ridge)
            if candidate >= value:
                break
            step = 0.5 * step
        else:
            break
        scores, value = scores + step, candidate
    alone = ~known.any(axis=1)
    scores = scores - (scores[~alone].mean() if not alone.all() else 0.0)
    return np.asarray(np.where(alone, np.nan, scores))


def _penalised(scores: np.ndarray, p: np.ndarray, known: np.ndarray, ridge: float) -> float:
    gaps = scores[:, None] - scores[None, :]
    # log sigmoid(x) = -log(1 + exp(-x)), without overflow.
    likelihood = np.where(known, p * -np.logaddexp(0.0, -gaps), 0.0).sum()
    return float(likelihood - 0.5 * ridge * (scores @ scores))


def _win_rate(code: np.ndarray) -> np.ndarray:
    judged = (code != NO_WINNER) & ~np.eye(len(code), dtype=bool)
    points = np.where(code == 1, 1.0, np.where(code == 0, 0.5, 0.0))
    count = judged.sum(axis=1)
    total = np.where(judged, points, 0.0).sum(axis=1)
    return np.asarray(np.where(count > 0, total / np.maximum(count, 1), np.nan))


def _rank(strengths: np.ndarray, rates: np.ndarray) -> np.ndarray:
    """Best first: by score, then win rate, then place; unjudged candidates last."""
    # Rounded, so that the last bits of the solver do not break ties.
    keys = [np.where(np.isnan(x), np.inf, -np.round(x, 9)) for x in (rates, strengths)]
    return np.asarray(np.lexsort(keys))
