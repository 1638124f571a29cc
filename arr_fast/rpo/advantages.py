"""From judgements to advantages: pairs, groups, several rewards, vetoes.

Everything is done on pairs of candidates. A reward says M[p, i, j]: above 0 where candidate i of
prompt p is better than j, antisymmetric, NaN without a verdict (a scoring reward says s_i - s_j,
which makes the mean over j the usual group-relative score). Rewards are mixed there, and then

    A_i = mean over the decided opponents j of   lam M_ij if M_ij > 0 else gamma M_ij   (eq. 11)

or, centred, of M_ij (lam + gamma) / 2. An opponent is decided where M is known and not 0.
Shapes: P prompts, G candidates.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from arr_fast.rpo.judging import Judgement

Mixing = Literal["sum", "normalise_first"]
Scale = Literal["none", "group", "batch"]


@dataclass(frozen=True, slots=True)
class RewardSpec:
    """How one reward takes part in a mixture.

    Attributes:
        weight: Its factor.
        required: Where it has no verdict the pair has none; else the other rewards decide.
        veto: It does not add up, it rules out: a pairwise reward's loser loses the pair whatever
            the others say; a scoring reward rules out candidates below `threshold`, and a pair of
            two that are ruled out is a tie.
        threshold: Of a scoring veto.
    """

    weight: float = 1.0
    required: bool = True
    veto: bool = False
    threshold: float = 0.5

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight) or self.weight <= 0:
            raise ValueError(f"weight must be finite and above 0, got {self.weight}")


@dataclass(frozen=True, slots=True)
class Advantages:
    """What the loss reads.

    Attributes:
        value: float32 [P, G]; 0 where a candidate has no decided opponent.
        weight: float32 [P, G]: 1 where it has one, else 0.
        decided_pairs: Pairs i < j with a decision.
        tied_pairs: Pairs with a verdict and no decision.
        failed_pairs: Pairs without a verdict.
        failed: bool [P]: prompts with such a pair.
    """

    value: Tensor
    weight: Tensor
    decided_pairs: int
    tied_pairs: int
    failed_pairs: int
    failed: Tensor


def preferences(judgement: Judgement) -> Tensor:
    """M of one judge: float32 [P, G, G]."""
    if judgement.wins is not None:
        return judgement.wins.float()
    assert judgement.scores is not None
    scores = judgement.scores.float()
    scores = torch.where(scores.isfinite(), scores, float("nan"))
    return scores[:, :, None] - scores[:, None, :]


def mix_preferences(
    judgements: Mapping[str, Judgement],
    specs: Mapping[str, RewardSpec] | None = None,
    *,
    how: Mixing = "sum",
    units: Mapping[str, float] | None = None,
) -> Tensor:
    """M of several judges of the same groups.

    Args:
        judgements: By the judge's name.
        specs: How each takes part; those without one get `RewardSpec()`.
        how: "sum" adds weight times M; "normalise_first" divides each M by its unit before, so
            that no reward wins by its scale.
        units: Of "normalise_first", by name; None takes `preference_units` of these judgements.

    Returns:
        float32 [P, G, G].

    Raises:
        ValueError: No judgement that adds up, judgements of different groups, a spec without a
            judgement, or an unknown mixing.
    """
    specs = specs or {}
    unknown = set(specs) - set(judgements)
    if unknown:
        raise ValueError(f"no judgement for: {', '.join(sorted(unknown))}")
    if how not in ("sum", "normalise_first"):
        raise ValueError(f"how must be sum or normalise_first, got {how!r}")
    shapes = {name: judgement.group_shape for name, judgement in judgements.items()}
    if len(set(shapes.values())) > 1:
        raise ValueError(f"judgements must be of the same groups, got {shapes}")
    adding = [n for n in judgements if not specs.get(n, RewardSpec()).veto]
    if not adding:
        raise ValueError("at least one reward must not be a veto")
    if how == "normalise_first" and units is None:
        units = preference_units(pair_squares([judgements]))
    total: Tensor | None = None
    missing: Tensor | None = None
    known_any: Tensor | None = None
    for name in adding:
        spec, matrix = specs.get(name, RewardSpec()), preferences(judgements[name])
        unknown_pairs = matrix.isnan()
        values = matrix.nan_to_num(0.0)
        if units is not None and how == "normalise_first":
            values = values / units[name]
        part = spec.weight * values
        total = part if total is None else total + part
        known_any = ~unknown_pairs if known_any is None else known_any | ~unknown_pairs
        if spec.required:
            missing = unknown_pairs if missing is None else missing | unknown_pairs
    assert total is not None and known_any is not None
    unusable = ~known_any if missing is None else missing | ~known_any
    for name, judgement in judgements.items():
        spec = specs.get(name, RewardSpec())
        if spec.veto:
            total, unusable = _apply_veto(total, unusable, judgement, spec)
    return torch.where(unusable, float("nan"), total)


def pair_squares(chunks: Sequence[Mapping[str, Judgement]]) -> dict[str, float]:
    """What `preference_units` needs of some chunks' judgements; may be added up over processes."""
    sums: dict[str, float] = defaultdict(float)
    for judgements in chunks:
        for name, judgement in judgements.items():
            values = preferences(judgement).nan_to_num(0.0)
            sums[f"{name}/squares"] += float(values.double().square().sum())
            sums[f"{name}/decided"] += float((values != 0).sum())
    return dict(sums)


def preference_units(squares: Mapping[str, float]) -> dict[str, float]:
    """The root mean square of each reward's M over its decided pairs; 1 where none is decided."""
    units = {}
    for key in squares:
        name, _, what = key.rpartition("/")
        if what == "squares":
            mean = squares[key] / max(1.0, squares[f"{name}/decided"])
            units[name] = math.sqrt(mean) if mean > 0 else 1.0
    return units


def advantages(
    matrix: Tensor,
    *,
    lam: float = 1.0,
    gamma: float = 0.1,
    centred: bool = True,
    scale: Scale = "none",
    limit: float = 5.0,
) -> Advantages:
    """Advantages of P groups.

    Args:
        matrix: M, float32 [P, G, G]; see the module's text.
        lam: Reward of a winner.
        gamma: Penalty of a loser, a positive number.
        centred: A pair's advantages are +-(lam + gamma) / 2 instead of +lam and -gamma.
        scale: "group" or "batch" divides by the standard deviation of that (+ 1e-4).
        limit: Advantages are clamped to +-limit.

    Raises:
        ValueError: A matrix that is not [P, G, G], or lam, gamma or scale out of range.
    """
    if matrix.ndim != 3 or matrix.shape[1] != matrix.shape[2] or matrix.shape[1] < 2:
        raise ValueError(f"matrix must be [P, G, G] with G >= 2, got {tuple(matrix.shape)}")
    if lam < 0 or gamma < 0 or lam + gamma == 0:
        raise ValueError(f"lam and gamma must be at least 0 and not both 0, got {lam}, {gamma}")
    known = ~matrix.isnan()
    values = matrix.nan_to_num(0.0)
    decided = known & (values != 0)
    if centred:
        rewards = values * ((lam + gamma) / 2)
    else:
        rewards = torch.where(values > 0, lam * values, gamma * values)
    opponents = decided.sum(2)
    value = (rewards * decided).sum(2) / opponents.clamp(min=1)
    has_opponent = opponents > 0
    if scale == "group":
        value = value / (_masked_std(value, has_opponent, 1) + 1e-4)
    elif scale == "batch":
        value = value / (_masked_std(value, has_opponent, None) + 1e-4)
    elif scale != "none":
        raise ValueError(f"scale must be none, group or batch, got {scale!r}")
    value = (value.clamp(-limit, limit) * has_opponent).float()
    upper = torch.ones(matrix.shape[1:], dtype=torch.bool, device=matrix.device).triu(1)
    return Advantages(
        value,
        has_opponent.float(),
        int((decided & upper).sum()),
        int((known & ~decided & upper).sum()),
        int((~known & upper).sum()),
        (~known & upper).flatten(1).any(1),
    )


def _apply_veto(
    total: Tensor, unusable: Tensor, judgement: Judgement, spec: RewardSpec
) -> tuple[Tensor, Tensor]:
    """Overrides the pairs that a veto decides; unit advantages, the losers are ruled out."""
    if judgement.scores is not None:
        scores = judgement.scores
        unknown = scores.isnan()
        out = (scores < spec.threshold).float()
        verdict = out[:, None, :] - out[:, :, None]
        both_out = (out[:, None, :] * out[:, :, None]).bool()
        total = torch.where(both_out, 0.0, total)
        pair_unknown = unknown[:, None, :] | unknown[:, :, None]
    else:
        matrix = preferences(judgement)
        pair_unknown = matrix.isnan()
        verdict = matrix.nan_to_num(0.0).sign()
    size = total.abs().clamp(min=1.0)
    decides = (verdict != 0) & ~pair_unknown
    total = torch.where(decides, verdict * size, total)
    if spec.required:
        unusable = unusable | pair_unknown
    return total, unusable


def _masked_std(value: Tensor, mask: Tensor, dim: int | None) -> Tensor:
    """Population standard deviation of the masked entries, per group or over everything."""
    if dim is None:
        return value[mask].std(correction=0) if bool(mask.any()) else value.new_zeros(())
    count = mask.sum(dim, keepdim=True).clamp(min=1)
    mean = (value * mask).sum(dim, keepdim=True) / count
    return (((value - mean).square() * mask).sum(dim, keepdim=True) / count).sqrt()
