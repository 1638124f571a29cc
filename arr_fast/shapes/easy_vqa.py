"""Yes/no questions of the PyPI package easy-vqa (MIT): 64 px pictures that nobody here made.

A question becomes a pointwise criterion as it stands, under a neutral caption. The test split is
for evaluation only.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from typing import Literal

import numpy as np
from PIL import Image

from arr_fast.errors import MissingDependencyError

NEUTRAL_CAPTION = "an image"
COLOURS = ("red", "green", "blue", "yellow", "black", "gray", "brown", "teal")
SHAPES = ("circle", "rectangle", "triangle")


@dataclass(frozen=True, slots=True)
class Question:
    """A yes/no question about one picture."""

    text: str
    answer: bool


@dataclass(frozen=True, slots=True)
class Picture:
    """A picture, its yes/no questions, and the colour and shape that its questions give away."""

    number: int
    questions: tuple[Question, ...]
    colour: str | None
    shape: str | None

    def load(self, split: Literal["train", "test"]) -> Image.Image:
        """The picture as RGB, 64 x 64."""
        path = _root() / split / "images" / f"{self.number}.png"
        with path.open("rb") as file:
            return Image.open(file).convert("RGB")


def _root() -> resources.abc.Traversable:
    try:
        return resources.files("easy_vqa") / "data"
    except ModuleNotFoundError:
        message = 'easy-vqa is not installed: pip install "arr-fast[dev]"'
        raise MissingDependencyError(message) from None


@lru_cache(maxsize=2)
def pictures(split: Literal["train", "test"]) -> tuple[Picture, ...]:
    """All pictures of a split that have yes/no questions, by number.

    Raises:
        MissingDependencyError: easy-vqa is not installed.
    """
    rows = json.loads((_root() / split / "questions.json").read_text(encoding="utf-8"))
    grouped: dict[int, list[tuple[str, str]]] = {}
    for text, answer, number in rows:
        grouped.setdefault(int(number), []).append((text, answer))
    found = []
    for number in sorted(grouped):
        asked = grouped[number]
        yes_no = tuple(Question(t, a == "yes") for t, a in asked if a in ("yes", "no"))
        if yes_no:
            colour, shape = _given_away(asked)
            found.append(Picture(number, yes_no, colour, shape))
    return tuple(found)


def _given_away(asked: Sequence[tuple[str, str]]) -> tuple[str | None, str | None]:
    """Colour and shape of the one object, as far as questions and answers tell."""
    colour = shape = None
    for text, answer in asked:
        words = re.findall("[a-z]+", text)
        negated = "not" in words or "no" in words
        told = {answer}
        if answer in ("yes", "no") and (answer == "yes") != negated:
            told = set(words)
        elif answer not in ("yes", "no"):
            told |= set(words)
        colour = next((c for c in COLOURS if c in told), colour)
        shape = next((s for s in SHAPES if s in told), shape)
    return colour, shape


def object_mask(image: Image.Image) -> np.ndarray:
    """Pixels that differ from the commonest colour, bool [64, 64]."""
    pixels = np.asarray(image).astype(np.int32)
    codes = pixels @ np.array([65536, 256, 1])
    values, counts = np.unique(codes, return_counts=True)
    background = int(values[counts.argmax()])
    reference = np.array([background >> 16, (background >> 8) & 255, background & 255])
    return np.asarray(np.abs(pixels - reference).sum(-1) > 60)
