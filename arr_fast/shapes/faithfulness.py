"""Pairs of which one picture shows what its caption says, and the other is changed in one thing.

Every judge of captions must tell them apart, with or without a rubric: it is the fair test of a
judge that is asked which picture is better overall, and nothing more.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from arr_fast.shapes.captions import describe
from arr_fast.shapes.claims import Claim, Context
from arr_fast.shapes.hidden_preference import HiddenPair, scene_keys
from arr_fast.shapes.pairs import CONTENT_CHANGES, Example
from arr_fast.shapes.scene import Split, sample_scene


def sample_faithfulness_pairs(
    count: int, *, seed: int, split: Split = "held_out", taken: frozenset[Any] = frozenset()
) -> list[HiddenPair]:
    """Draws pairs with exactly one faithful picture, which is the preferred one.

    Args:
        count: How many.
        seed: Of captions, scenes and sides.
        split: Which scenes.
        taken: `scene_keys` of other splits: none of their prompts or scenes comes again.
    """
    rng = np.random.default_rng([seed, 5])
    seen = set(taken)
    found: list[HiddenPair] = []
    while len(found) < count:
        base = sample_scene(rng, split)
        caption = describe(rng, base)
        context = Context(caption=caption)
        change = CONTENT_CHANGES[int(rng.integers(len(CONTENT_CHANGES)))]
        other = change(rng, base, split)
        # A change of something that the caption leaves open is no fault.
        if other is None or Claim("faithful").truth(other, context) is not False:
            continue
        preferred = int(rng.integers(1, 3))
        scenes = (base, other) if preferred == 1 else (other, base)
        example = Example(caption.text(rng), context, scenes, ())
        if scene_keys(example) & seen:
            continue
        seen |= scene_keys(example)
        utilities = (1.0, 0.0) if preferred == 1 else (0.0, 1.0)
        found.append(HiddenPair(example, utilities, preferred))
    return found
