"""Pairs labelled by a preference that no judge knows: what a rubric should find out.

The utility of a picture is a weighted sum of qualities that the renderer can check; a few weights
are large, most are small, some are 0. A pair is labelled by chance: P(A is preferred) =
sigmoid(u_A - u_B), the Bradley-Terry model. No one can be right more often than who knows u.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from arr_fast.data.record import Record
from arr_fast.data.registry import write_records
from arr_fast.shapes.claims import Claim, Context
from arr_fast.shapes.pairs import Example, sample_faulty_pair
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import Scene, Split

QUALITIES = (
    "caption_objects",
    "caption_colours",
    "caption_count",
    "caption_relation",
    "caption_background",
    "caption_extra",
    "sharpness",
    "noise",
    "occlusion",
    "cut_off",
)
IRRELEVANT = 4
# |u_A - u_B| under this is a near tie: nobody prefers either with more than 62 %.
NEAR_TIE = 0.5
NEAR_TIES = 0.3


@dataclass(frozen=True, slots=True)
class HiddenPreference:
    """Weights over qualities.

    Attributes:
        weights: Quality -> weight; 0 for irrelevant ones.
    """

    weights: dict[str, float]

    @staticmethod
    def draw(seed: int) -> HiddenPreference:
        """Heavy-tailed weights: the relevant qualities' are 6 / rank^1.1, in random order."""
        rng = np.random.default_rng([seed, 1])
        order = [QUALITIES[int(i)] for i in rng.permutation(len(QUALITIES))]
        relevant = len(QUALITIES) - IRRELEVANT
        weights = {name: 6.0 / (rank + 1) ** 1.1 for rank, name in enumerate(order[:relevant])}
        return HiddenPreference({name: weights.get(name, 0.0) for name in QUALITIES})

    def utility(self, scene: Scene, context: Context) -> float:
        """Sum of the weights of the qualities that a picture has; an ambiguous one counts half."""
        total = 0.0
        for name, weight in self.weights.items():
            truth = Claim(name).truth(scene, context)
            total += weight * (0.5 if truth is None else float(truth))
        return total


@dataclass(frozen=True, slots=True)
class HiddenPair:
    """A labelled pair.

    Attributes:
        example: Caption and scenes; its criteria are not used.
        utilities: (u_A, u_B).
        preferred: 1 or 2, drawn.
    """

    example: Example
    utilities: tuple[float, float]
    preferred: int

    @property
    def gap(self) -> float:
        """u_A - u_B."""
        return self.utilities[0] - self.utilities[1]


def sample_pairs(
    preference: HiddenPreference,
    count: int,
    *,
    seed: int,
    split: Split = "held_out",
    taken: frozenset[Any] = frozenset(),
) -> list[HiddenPair]:
    """Draws labelled pairs, 30 % of them near ties.

    Args:
        preference: The hidden weights.
        count: How many.
        seed: Of scenes and labels.
        split: Which scenes: "held_out" ones hold combinations that the judge was not trained on.
        taken: `scene_keys` of other splits: none of their prompts or scenes comes again.
    """
    rng = np.random.default_rng([seed, 2])
    wanted = {True: round(NEAR_TIES * count)}
    wanted[False] = count - wanted[True]
    found: list[HiddenPair] = []
    seen = set(taken)
    while len(found) < count:
        example = sample_faulty_pair(rng, split)
        if example.scenes[0] == example.scenes[1] or scene_keys(example) & seen:
            continue
        a, b = (preference.utility(scene, example.context) for scene in example.scenes)
        near = abs(a - b) < NEAR_TIE
        if not wanted[near]:
            continue
        wanted[near] -= 1
        seen |= scene_keys(example)
        likely = 1.0 / (1.0 + np.exp(b - a))
        found.append(HiddenPair(example, (a, b), 1 if rng.random() < likely else 2))
    return [found[int(i)] for i in rng.permutation(count)]


def scene_keys(example: Example) -> frozenset[Any]:
    """What two splits may not share: the prompt's text, what it asks for, and the scenes."""
    return frozenset([example.caption, example.context.caption, *example.scenes])


def oracle_credit(pairs: list[HiddenPair]) -> np.ndarray:
    """Per pair 1 where the greater utility was preferred, 1/2 where there is none; float64 [N]."""
    sign = np.array([1 if pair.preferred == 1 else -1 for pair in pairs])
    gaps = np.array([pair.gap for pair in pairs])
    return np.asarray(0.5 * (np.sign(gaps * sign) + 1.0))


def write_pairs(
    pairs: list[HiddenPair],
    folder: Path,
    *,
    side: int = 64,
    done: Callable[[int], None] | None = None,
) -> Path:
    """Renders pairs and writes `pairs.jsonl` with labels beside them.

    Args:
        pairs: What to write.
        folder: Created where missing.
        side: Of the pictures, in pixels.
        done: Told how many pairs are rendered.
    """
    folder.mkdir(parents=True, exist_ok=True)
    records = []
    for number, pair in enumerate(pairs):
        files = [folder / f"{number:04d}{letter}.png" for letter in "ab"]
        for file, scene in zip(files, pair.example.scenes, strict=True):
            render(scene, side).save(file)
        records.append(
            Record(
                name=f"pair {number}",
                prompt=pair.example.caption,
                images=tuple(str(file) for file in files),
                label_rank=(1.0, 2.0) if pair.preferred == 1 else (2.0, 1.0),
                metadata={"utility_a": pair.utilities[0], "utility_b": pair.utilities[1]},
            )
        )
        if done is not None:
            done(number + 1)
    path = folder / "pairs.jsonl"
    write_records(records, path, "arr")
    return path
