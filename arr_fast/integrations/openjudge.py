"""Pairwise judges of the OpenJudge / TRL kind: `judge(prompts, pairs, shuffle_order) -> indices`.

The contract is that of TRL's BasePairwiseJudge (removed in #5485): for each prompt the index of the
better of two, or -1 where the judge failed. A tie is -1 as well: neither index would be true.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class ArrFastPairwiseJudge:
    """A pairwise judge.

    Args:
        judge: The judge.
        rubric: See `Judge.compare`.
        **options: Of `Judge.compare`.
    """

    def __init__(self, judge: Any, rubric: Any = None, **options: Any) -> None:
        self._judge = judge
        self._rubric = rubric
        self._options = options

    def judge(
        self, prompts: Sequence[str], pairs: Sequence[Sequence[Any]], shuffle_order: bool = True
    ) -> list[int]:
        """Judges pairs of images.

        Args:
            prompts: B captions.
            pairs: B pairs of images.
            shuffle_order: True reads both orders, which removes the bias that shuffling only
                spreads; False reads the given order alone.

        Returns:
            0, 1, or -1 for a tie or a failure.
        """
        for number, pair in enumerate(pairs):
            if len(pair) != 2:
                raise ValueError(f"pairs[{number}] has {len(pair)} images, expected 2")
        verdicts = self._judge.compare(
            prompts,
            [pair[0] for pair in pairs],
            [pair[1] for pair in pairs],
            self._rubric,
            orders="both" if shuffle_order else "AB",
            **self._options,
        )
        index = {"A": 0, "B": 1}
        return [
            index.get(winner or "", -1) if status == "ok" else -1
            for winner, status in zip(verdicts.winner, verdicts.status, strict=True)
        ]
