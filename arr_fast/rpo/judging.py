"""What crosses between RPO and a judge: a request, a judgement, and a callable with futures.

RPO imports no judge. Whatever has `submit(request) -> Future[Judgement]` will do: this package's
`Judge` behind a small adapter, a remote pool, or a Python function in a thread.
Shapes: P prompts, G candidates per prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One chunk of candidates.

    Attributes:
        prompt_ids: P stable prompt numbers.
        prompts: P prompts or edit instructions.
        images: P groups of G candidates.
        sources: P images that were edited, or None.
        metadata: P rows of whatever the prompt set knows (rubrics, expected objects).
    """

    prompt_ids: tuple[int, ...]
    prompts: tuple[str, ...]
    images: tuple[tuple[Image.Image, ...], ...]
    sources: tuple[Image.Image, ...] | None
    metadata: tuple[Mapping[str, Any], ...]


@dataclass(frozen=True, slots=True, eq=False)
class Judgement:
    """What one judge said about P groups.

    Attributes:
        wins: float32 [P, G, G] of a pairwise judge: 1 where i beats j, -1 where it loses, 0 for a
            tie, NaN without a verdict; antisymmetric, 0 on the diagonal. None for a scoring judge.
        scores: float32 [P, G] of a scoring judge, higher is better, NaN without a score; or None.
        errors: What failed, one message per failure that was judged away; logged and counted.
        metrics: Numbers to log beside the reward (bias, per-criterion preferences), each a sum.
        counts: How many items each metric sums over.
        details: Whatever a log of sample grids wants to show.
    """

    wins: Tensor | None = None
    scores: Tensor | None = None
    errors: tuple[str, ...] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    counts: Mapping[str, int] = field(default_factory=dict)
    details: Any = None

    def __post_init__(self) -> None:
        if (self.wins is None) == (self.scores is None):
            raise ValueError("a judgement has either wins or scores")
        if self.wins is not None:
            _check_wins(self.wins)
        if self.scores is not None and self.scores.ndim != 2:
            raise ValueError(f"scores must be [P, G], got {tuple(self.scores.shape)}")

    @property
    def group_shape(self) -> tuple[int, int]:
        """(P, G)."""
        values = self.scores if self.wins is None else self.wins
        assert values is not None
        return values.shape[0], values.shape[1]

    @staticmethod
    def from_pairs(winner: Sequence[float], **other: Any) -> Judgement:
        """A judgement on P pairs.

        Args:
            winner: P numbers: 1 the first candidate is better, -1 the second, 0 a tie, NaN no
                verdict.
            **other: Further fields.
        """
        first = torch.as_tensor(winner, dtype=torch.float32)
        wins = torch.zeros(len(first), 2, 2)
        wins[:, 0, 1], wins[:, 1, 0] = first, -first
        return Judgement(wins=wins, **other)


SubmitJudge = Callable[[JudgeRequest], Future[Judgement]]


def _check_wins(wins: Tensor) -> None:
    if wins.ndim != 3 or wins.shape[1] != wins.shape[2]:
        raise ValueError(f"wins must be [P, G, G], got {tuple(wins.shape)}")
    known = wins.nan_to_num(0.0)
    if bool((known.abs() > 1).any()) or not torch.equal(known, -known.transpose(1, 2)):
        raise ValueError("wins must be antisymmetric, with values in [-1, 1] or NaN")
