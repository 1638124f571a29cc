"""Judges whose answers are known beforehand, for the arithmetic around the judge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from arr_fast.images import to_image
from arr_fast.provenance import Provenance
from arr_fast.verdicts import GroupVerdicts, group_verdicts, pair_verdicts


def ranked(groups: Any, strength: Callable[[Any], float | None]) -> GroupVerdicts:
    """Group verdicts of candidates whose strength is known; None is one that cannot be judged."""
    odds, index, errors = [], [], []
    for number, group in enumerate(groups):
        strengths = [strength(candidate) for candidate in group]
        for i, first in enumerate(strengths):
            for j in range(i + 1, len(strengths)):
                second = strengths[j]
                failed = first is None or second is None
                odds.append(0.0 if first is None or second is None else first - second)
                errors.append("unreadable" if failed else None)
                index.append((number, i, j))
    table = np.array(odds)[:, None]
    verdicts = pair_verdicts(table, -table, provenance=Provenance("m", "r", (), 1), errors=errors)
    return group_verdicts(verdicts, index, [len(group) for group in groups])


class BrightnessRanker:
    """The brighter image wins; white (255) has no verdict.

    Args:
        fails_at: A brightness at which it raises, as a judge out of memory would.

    Attributes:
        seen: Brightness of every image that this judge was ever shown, group by group.
    """

    def __init__(self, fails_at: int | None = None) -> None:
        self.seen: list[list[int]] = []
        self._fails_at = fails_at

    def rank(self, prompts: Any, groups: Any, rubric: Any = None, **options: Any) -> GroupVerdicts:
        shown = [[int(to_image(v, name="x").pixels[0, 0, 0]) for v in group] for group in groups]
        self.seen += shown
        if any(self._fails_at in group for group in shown):
            raise RuntimeError("out of memory")
        return ranked(shown, lambda value: None if value == 255 else float(value))
