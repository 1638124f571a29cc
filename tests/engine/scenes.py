"""Inputs for engine tests: odd images, ragged criteria, awkward captions; all seeded."""

from __future__ import annotations

import numpy as np

from arr_fast.images import CanonicalImage, to_image
from arr_fast.rubric import Criterion, Rubric

WORDS = [
    *("the", "image", "shows", "every", "object", "named", "caption", "with", "correct", "colour"),
    *("size", "count", "position", "sharp", "clear", "natural", "light", "shadow", "background"),
    *("texture", "edges", "faces", "hands", "text", "style", "balance", "contrast"),
]


def image(height: int, width: int, seed: int) -> CanonicalImage:
    """A smooth random image: gradients and a few rectangles, no two seeds alike."""
    rng = np.random.default_rng([seed, height, width])
    y, x = np.mgrid[0:height, 0:width].astype(np.float64)
    base = np.stack([np.sin(x * f + y * g + p) for f, g, p in rng.uniform(0.02, 0.5, (3, 3))], -1)
    pixels = (127 + 100 * base).clip(0, 255)
    for _ in range(4):
        top, left = rng.integers(0, height), rng.integers(0, width)
        pixels[top : top + height // 3 + 1, left : left + width // 3 + 1] = rng.integers(0, 255, 3)
    return to_image(pixels.astype(np.uint8), name=f"image {seed}")


def criterion(number: int, words: int, seed: int = 0) -> Criterion:
    """A criterion of about `words` words."""
    rng = np.random.default_rng([seed, number, words])
    text = " ".join(rng.choice(WORDS, size=words)).capitalize() + "."
    return Criterion(id=f"c{number}", text=text)


def rubric(count: int, task: str = "t2i", longest: int = 24, seed: int = 0) -> Rubric:
    """`count` criteria of ragged length, from one word to `longest`."""
    lengths = np.random.default_rng([seed, count]).integers(1, longest + 1, size=count)
    criteria = tuple(criterion(i, int(n), seed) for i, n in enumerate(lengths))
    return Rubric(name=f"r{count}", task=task, criteria=criteria)
