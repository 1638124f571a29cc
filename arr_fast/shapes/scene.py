"""A scene as frozen data: objects on a background, and what was done to the picture afterwards."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

Split = Literal["train", "held_out"]
Size = Literal["small", "large"]

SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 40, 40),
    "green": (40, 170, 60),
    "blue": (45, 80, 230),
    "yellow": (245, 215, 40),
    "purple": (150, 50, 190),
    "orange": (250, 140, 20),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (250, 250, 250),
    "black": (12, 12, 12),
    "gray": (128, 128, 128),
    "beige": (225, 200, 165),
    "navy": (20, 30, 95),
}
RADII: dict[str, float] = {"small": 0.12, "large": 0.2}

# One colour and one shape per row and column of the colour-shape table: the model meets every
# colour and every shape in training, but none of these six together. easy-VQA has none of them.
HELD_OUT_COMBINATIONS = frozenset(
    {
        ("red", "star"),
        ("green", "ring"),
        ("blue", "square"),
        ("yellow", "cross"),
        ("purple", "circle"),
        ("orange", "triangle"),
    }
)

MAX_OBJECTS = 4
CUT_DEPTH = 0.35


@dataclass(frozen=True, slots=True)
class SceneObject:
    """One object; x, y and radius are fractions of the picture's side, y grows downwards."""

    shape: str
    colour: str
    size: Size
    x: float
    y: float
    radius: float

    @property
    def kind(self) -> tuple[str, str]:
        """(colour, shape)."""
        return self.colour, self.shape

    @property
    def is_cut(self) -> bool:
        """Whether the frame cuts a clear part of the object off."""
        return self._overhang() >= 0.5 * CUT_DEPTH * self.radius

    @property
    def is_inside(self) -> bool:
        """Whether the whole object lies inside the frame."""
        return self._overhang() <= 0.0

    def _overhang(self) -> float:
        low = min(self.x, self.y) - self.radius
        high = max(self.x, self.y) + self.radius - 1.0
        return max(-low, high)


@dataclass(frozen=True, slots=True)
class Scene:
    """A picture as data.

    Attributes:
        objects: The objects, in no particular order.
        background: A key of BACKGROUNDS.
        blur: Standard deviation of a Gaussian blur, as a fraction of the picture's side.
        noise: Standard deviation of pixel noise on a scale of [0, 1]; 1 or more hides everything.
        hidden: Index of the object that a striped bar partly covers, or None.
        seed: Seeds the noise and the bar's place.
    """

    objects: tuple[SceneObject, ...]
    background: str
    blur: float = 0.0
    noise: float = 0.0
    hidden: int | None = None
    seed: int = 0

    @property
    def is_static(self) -> bool:
        """Whether noise hides the whole scene."""
        return self.noise >= 0.8

    @property
    def is_legible(self) -> bool:
        """Whether shapes can be told: no static, and no small object under blur."""
        return not self.is_static and not (
            self.blur > 0 and any(o.size == "small" for o in self.objects)
        )

    def in_reading_order(self) -> list[SceneObject]:
        """Objects by thirds from top to bottom, from left to right within each."""
        return sorted(self.objects, key=lambda o: (int(o.y * 3), o.x))

    def kinds(self) -> Counter[tuple[str, str]]:
        """How often each (colour, shape) occurs."""
        return Counter(o.kind for o in self.objects)


def allowed_kinds(split: Split) -> list[tuple[str, str]]:
    """The (colour, shape) combinations of a split, in a fixed order."""
    every = [(c, s) for c in COLOURS for s in SHAPES]
    if split == "train":
        return [k for k in every if k not in HELD_OUT_COMBINATIONS]
    return every


def sample_kind(rng: np.random.Generator, split: Split) -> tuple[str, str]:
    """Draws a (colour, shape); the held-out split favours the held-out combinations."""
    if split == "held_out" and rng.random() < 0.5:
        held = sorted(HELD_OUT_COMBINATIONS)
        return held[int(rng.integers(len(held)))]
    kinds = allowed_kinds(split)
    return kinds[int(rng.integers(len(kinds)))]


def place(
    rng: np.random.Generator, radius: float, others: tuple[SceneObject, ...]
) -> tuple[float, float] | None:
    """A free place for an object inside the frame, or None when there is none."""
    for _ in range(40):
        x, y = rng.uniform(radius + 0.01, 0.99 - radius, 2)
        if all(np.hypot(x - o.x, y - o.y) > radius + o.radius + 0.02 for o in others):
            return float(x), float(y)
    return None


def make_object(
    rng: np.random.Generator,
    kind: tuple[str, str],
    others: tuple[SceneObject, ...],
    size: Size | None = None,
) -> SceneObject | None:
    """An object of a (colour, shape) at a free place, or None when there is no room."""
    chosen: Size = size or ("large" if rng.random() < 0.5 else "small")
    radius = RADII[chosen] * float(rng.uniform(0.94, 1.06))
    spot = place(rng, radius, others)
    if spot is None:
        return None
    return SceneObject(kind[1], kind[0], chosen, spot[0], spot[1], radius)


def sample_scene(rng: np.random.Generator, split: Split, count: int | None = None) -> Scene:
    """A clean scene of 1 to 4 objects; a held-out scene has a held-out combination."""
    wanted = count or int(rng.choice([1, 2, 3, 4], p=[0.2, 0.4, 0.28, 0.12]))
    while True:
        objects: tuple[SceneObject, ...] = ()
        while len(objects) < wanted:
            kind = sample_kind(rng, split)
            if objects and rng.random() < 0.15:
                kind = objects[int(rng.integers(len(objects)))].kind
            made = make_object(rng, kind, objects)
            if made is None:
                break
            objects = (*objects, made)
        held = any(o.kind in HELD_OUT_COMBINATIONS for o in objects)
        if len(objects) == wanted and (split == "train" or held):
            background = sample_background(rng)
            return Scene(objects, background, seed=int(rng.integers(2**31)))


def sample_background(rng: np.random.Generator, other_than: str | None = None) -> str:
    """Draws a background word."""
    names = [b for b in BACKGROUNDS if b != other_than]
    return names[int(rng.integers(len(names)))]


def with_object(scene: Scene, index: int, **changes: object) -> Scene:
    """The scene with one object's fields replaced."""
    objects = list(scene.objects)
    objects[index] = replace(objects[index], **changes)  # type: ignore[arg-type]
    return replace(scene, objects=tuple(objects))
