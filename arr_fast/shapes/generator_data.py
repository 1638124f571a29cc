"""What the bundled generator learns from, and the prompts that it is asked for.

Text-to-image: a caption of two objects and a background. Editing: a source picture and an
instruction that recolours one of its objects or the background. About a quarter of the pictures do
NOT show what their text says, so that there is something left to learn from a reward.

Wrong pictures of captions show another "scene" altogether, as if the caption were that of another
picture, or differ from it in one "thing". A wrong edit is another edit of the same source.

Layouts: on "columns", the domain of the prompts, the first object of a caption stands left and the
second right; on "grid" they stand anywhere. A generator that began on the grid converges on
columns.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import Image

from arr_fast.shapes.captions import NUMBERS, PLURALS, Caption, Edit, article, name
from arr_fast.shapes.latents import GRID
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import (
    COLOURS,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    allowed_kinds,
    sample_background,
    with_object,
)

GeneratorTask = Literal["t2i", "edit"]
Layout = Literal["columns", "grid"]
Wrong = Literal["scene", "thing"]
Kind = tuple[str, str]
OBJECTS = 2
# Free space around an object on the grid, as a fraction of the side.
MARGIN = 0.01
# On columns: where the centres are, as corners of the latents' grid.
COLUMNS = (2, 6)
ROWS = (1, 3, 5, 7)
WRONG_SHARE = 0.25
# One pair of kinds in so many is held out: no training caption names it.
HELD_OUT_EVERY = 8


@dataclass(frozen=True, slots=True)
class GeneratorItem:
    """One training item.

    Attributes:
        text: Caption or instruction.
        target: The picture that goes with it.
        source: The picture before the edit, or None.
        is_right: Whether the target shows what the text says.
    """

    text: str
    target: Scene
    source: Scene | None
    is_right: bool


def pair_split(kinds: tuple[Kind, ...]) -> Split:
    """The split that a caption's objects belong to, whatever their order."""
    key = "|".join(sorted(name(kind) for kind in kinds))
    held = zlib.crc32(key.encode()) % HELD_OUT_EVERY == 0
    return "held_out" if held else "train"


def _kinds(rng: np.random.Generator, split: Split) -> tuple[Kind, ...]:
    """Two different kinds; the combinations that the judge never learned are left out."""
    kinds = allowed_kinds("train")
    while True:
        chosen = tuple(kinds[int(i)] for i in rng.choice(len(kinds), OBJECTS, replace=False))
        if pair_split(chosen) == split:
            return chosen


def scene_of(
    rng: np.random.Generator, kinds: tuple[Kind, ...], background: str, layout: Layout = "columns"
) -> Scene:
    """A scene of these objects, all small and around corners of the latents' grid.

    There a shape is one pattern of four tokens: what a generator of this size has to learn is which
    objects to draw, and not to draw them at any fraction of a pixel.

    Raises:
        ValueError: More objects than columns.
    """
    if layout == "grid":
        return _on_grid(rng, kinds, background)
    if len(kinds) > len(COLUMNS):
        raise ValueError(f"{len(kinds)} objects, expected at most {len(COLUMNS)} on columns")
    rows = rng.choice(ROWS, len(kinds))
    objects = tuple(
        _object(kind, column, int(row))
        for kind, column, row in zip(kinds, COLUMNS, rows, strict=False)
    )
    return Scene(objects, background)


def _on_grid(rng: np.random.Generator, kinds: tuple[Kind, ...], background: str) -> Scene:
    while True:
        objects: tuple[SceneObject, ...] = ()
        for kind in kinds:
            new = _object(kind, *(int(rng.integers(1, GRID)) for _ in range(2)))
            if any(
                math.hypot(new.x - o.x, new.y - o.y) <= 2 * (o.radius + MARGIN) for o in objects
            ):
                break
            objects = (*objects, new)
        if len(objects) == len(kinds):
            return Scene(objects, background)


def _object(kind: Kind, column: int, row: int) -> SceneObject:
    colour, shape = kind
    return SceneObject(shape, colour, "small", column / GRID, row / GRID, RADII["small"])


def sample_item(
    rng: np.random.Generator,
    task: GeneratorTask,
    layout: Layout = "columns",
    wrong: Wrong = "scene",
) -> GeneratorItem:
    """One training item; a wrong edit is another edit of the same source."""
    is_right = bool(rng.random() >= WRONG_SHARE)
    kinds = _kinds(rng, "train")
    scene = scene_of(rng, kinds, sample_background(rng), layout)
    if task == "t2i":
        text = Caption(kinds, background=scene.background).text(rng)
        if not is_right:
            scene = _other_scene(rng, scene, layout) if wrong == "scene" else _spoiled(rng, scene)
        return GeneratorItem(text, scene, None, is_right)
    edit = _edit(rng, scene)
    right = edit.apply(scene)
    target = right
    while not is_right and target == right:
        target = _edit(rng, scene).apply(scene)
    return GeneratorItem(edit.text(rng, scene), target, scene, is_right)


def _other_scene(rng: np.random.Generator, scene: Scene, layout: Layout) -> Scene:
    """A scene of the same distribution that shows something else."""
    while True:
        other = scene_of(rng, _kinds(rng, "train"), sample_background(rng), layout)
        if (other.kinds(), other.background) != (scene.kinds(), scene.background):
            return other


def _spoiled(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with another colour or shape of one object, or another background."""
    draw = rng.random()
    if draw < 0.15:
        return Scene(scene.objects, sample_background(rng, scene.background))
    index = int(rng.integers(len(scene.objects)))
    old = scene.objects[index]
    if draw < 0.6:
        return with_object(scene, index, colour=_other(rng, tuple(COLOURS), old.colour))
    return with_object(scene, index, shape=_other(rng, SHAPES, old.shape))


def _edit(rng: np.random.Generator, scene: Scene) -> Edit:
    if rng.random() < 0.25:
        return Edit("background", -1, sample_background(rng, scene.background))
    target = int(rng.integers(len(scene.objects)))
    return Edit("recolour", target, _other(rng, tuple(COLOURS), scene.objects[target].colour))


def _other(rng: np.random.Generator, values: tuple[str, ...], old: str) -> str:
    rest = [value for value in values if value != old]
    return rest[int(rng.integers(len(rest)))]


@dataclass(frozen=True, slots=True)
class GeneratorPrompt:
    """A prompt of the domain.

    Attributes:
        text: Caption or instruction.
        source: The picture to edit, or None.
        rubric: The criteria of this prompt, as `Rubric` takes them.
    """

    text: str
    source: Image.Image | None
    rubric: dict[str, Any]


def sample_prompts(
    count: int, *, seed: int, split: Split, task: GeneratorTask
) -> Iterator[GeneratorPrompt]:
    """Prompts of a split, all different, a function of the arguments alone."""
    seen: set[str] = set()
    rng = np.random.default_rng([seed, 0 if split == "train" else 1, 0 if task == "t2i" else 1])
    while len(seen) < count:
        kinds = _kinds(rng, split)
        scene = scene_of(rng, kinds, sample_background(rng))
        if task == "t2i":
            caption = Caption(kinds, background=scene.background)
            text = caption.text(rng)
            if text not in seen:
                seen.add(text)
                yield GeneratorPrompt(text, None, caption_rubric(caption))
        else:
            edit = _edit(rng, scene)
            seen.add(str(len(seen)))
            yield GeneratorPrompt(edit.text(rng, scene), render(scene), edit_rubric(edit, scene))


def caption_rubric(caption: Caption) -> dict[str, Any]:
    """A rubric written for one caption: each object is there, in its number, and nothing else, on
    its background.

    Criteria that make the judge read the caption itself are left out: the bundled judge is less
    sure of them, and they turn pairs that it can decide into ties.
    """
    criteria: list[tuple[str, str, float]] = []
    for number, (kind, count) in enumerate(caption.counts().items()):
        words = name(kind)
        criteria.append((f"object_{number}", f"The image shows {article(words)}.", 1.0))
        amount = "There is one" if count == 1 else f"There are {count}"
        noun = words if count == 1 else f"{kind[0]} {PLURALS[kind[1]]}"
        criteria.append((f"count_{number}", f"{amount} {noun}.", 0.5))
    number_word = NUMBERS[len(caption.kinds)]
    criteria.append(("number", f"There are {number_word} objects.", 1.0))
    if caption.background is not None:
        criteria.append(("background", f"The background is {caption.background}.", 1.0))
    return _rubric("caption", "t2i", criteria)


def edit_rubric(edit: Edit, source: Scene) -> dict[str, Any]:
    """A rubric written for one edit: what must have changed, and what must not."""
    after = edit.apply(source)
    criteria = [
        ("done", "The instruction was carried out.", 1.0),
        ("kept", "Everything else is unchanged.", 1.0),
        ("background", f"The background is {after.background}.", 1.0),
    ]
    criteria += [
        (f"object_{number}", f"The image shows {article(name(obj.kind))}.", 1.0)
        for number, obj in enumerate(after.objects)
    ]
    return _rubric("edit", "edit", criteria)


def _rubric(title: str, task: str, criteria: list[tuple[str, str, float]]) -> dict[str, Any]:
    rows = [{"id": i, "text": text, "weight": weight} for i, text, weight in criteria]
    return {"name": title, "task": task, "criteria": rows}
