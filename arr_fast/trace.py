"""The evidence behind one verdict: everything that plain transformers needs to recompute it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from arr_fast.images import CanonicalImage

Order = Literal["AB", "BA", "point"]


@dataclass(frozen=True, slots=True)
class VerdictTrace:
    """One root-to-leaf path of the prefix tree and the log-odds that the engine read at its end.

    Attributes:
        item: Index of the pair (or image) in the call.
        criterion: Criterion id, or "holistic" for the whole-rubric leaf.
        order: "AB" shows the first image first, "BA" the second; "point" is a single image.
        input_ids: int64 [T], image placeholders expanded to one id per image feature.
        position_ids: int64 [P, T]; P = 3 for M-RoPE families (time, height, width), else 1.
        images: The images in their order of appearance.
        label_ids: Token variants of the first and of the second label.
        log_odds: logsumexp(first label logits) - logsumexp(second label logits), in nats.
    """

    item: int
    criterion: str
    order: Order
    input_ids: np.ndarray
    position_ids: np.ndarray
    images: tuple[CanonicalImage, ...]
    label_ids: tuple[tuple[int, ...], tuple[int, ...]]
    log_odds: float
