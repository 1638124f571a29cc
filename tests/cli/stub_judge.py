"""A judge that looks at brightness: the brighter image satisfies every criterion better.

Its verdicts are arithmetic on pixels, so the command line can be tested to the digit.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from arr_fast.provenance import Provenance
from arr_fast.verdicts import group_verdicts, pair_verdicts, point_verdicts


class StubJudge:
    """Stands in for `arr_fast.judge.Judge` where no model is needed."""

    def __init__(self, fail_on: str | None = None, stop_after: int | None = None) -> None:
        self.calls: list[tuple[str, list[str]]] = []
        self.fail_on = fail_on
        self.stop_after = stop_after
        loaded = SimpleNamespace(
            name="stub", revision="r1", dtype="torch.float32", device="cpu", quantization=None
        )
        self.engine = SimpleNamespace(loaded=loaded, impl="stub")

    def compare(
        self,
        prompts: Any,
        images_a: Any,
        images_b: Any,
        rubrics: Any,
        *,
        sources: Any = None,
        orders: str = "both",
        mode: str = "criteria",
        label_mass: bool = False,
        aggregation: Any = None,
    ) -> Any:
        if self.stop_after is not None and len(self.calls) == self.stop_after:
            raise KeyboardInterrupt
        self.calls.append(("edit" if sources else "t2i", list(prompts)))
        z = np.array(
            [brightness(a) - brightness(b) for a, b in zip(images_a, images_b, strict=True)]
        )
        k = len(rubrics[0].criteria)
        matrix = np.repeat(z[:, None], k, axis=1)
        return pair_verdicts(
            matrix + 0.25 if orders != "BA" else None,
            -matrix + 0.25 if orders != "AB" else None,
            provenance=self.provenance(rubrics),
            criteria=[r.ids for r in rubrics],
            aggregation=aggregation or "log_odds_mean",
            errors=["refused" if p == self.fail_on else None for p in prompts],
        )

    def score(self, prompts: Any, images: Any, rubrics: Any, **options: Any) -> Any:
        self.calls.append(("point", list(prompts)))
        z = np.array([[brightness(i)] * len(rubrics[0]) for i in images])
        return point_verdicts(
            z, provenance=self.provenance(rubrics), criteria=[r.ids for r in rubrics]
        )

    def rank(self, prompts: Any, groups: Any, rubrics: Any, **options: Any) -> Any:
        index, rows = [], []
        for g, group in enumerate(groups):
            for i in range(len(group)):
                for j in range(i + 1, len(group)):
                    index.append((g, i, j))
                    rows.append([brightness(group[i]) - brightness(group[j])])
        pairs = pair_verdicts(rows, provenance=self.provenance(rubrics))
        return group_verdicts(pairs, index, [len(g) for g in groups])

    def provenance(self, rubrics: Any) -> Provenance:
        return Provenance("stub", "r1", (rubrics[0].content_hash,), 1)


def brightness(image: Any) -> float:
    """Mean pixel value, 0 to 1."""
    return float(image.pixels.mean()) / 255.0
