"""Reads a picture of shapes back into a scene, by arithmetic on pixels: the ground truth of RPO.

No learning, and nothing of the judge: the background by a vote of the border, colours by the line
from the background's colour to each object colour, objects by connected components, shapes by the
overlap with each shape drawn at the component's own place and area. What cannot be read is a
failure, never a guess. Neither the judge nor the trainer imports this module; an evaluation names
it in its configuration.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageDraw
from scipy import ndimage

from arr_fast.shapes.caption_reading import read_caption, read_instruction
from arr_fast.shapes.captions import Caption, Edit, relation_holds
from arr_fast.shapes.render import draw_object
from arr_fast.shapes.scene import BACKGROUNDS, COLOURS, RADII, SHAPES, Scene, SceneObject, Size

COLOUR_NAMES = tuple(COLOURS)
# A border pixel further than this from every background colour (RGB, of 255) does not vote.
BACKGROUND_DISTANCE = 60.0
BORDER_SHARE = 0.6
# Specks below this share of the picture are not objects.
SPECK = 0.003
# A component whose pixels agree to this share is one object of that colour.
COLOUR_SHARE = 0.85
# Least overlap of an object with its shape, and its lead over the second-best shape.
LEAST_OVERLAP = 0.65
LEAST_LEAD = 0.02
TEMPLATE_SIDE = 192
SUPERSAMPLE = 4


class UnparsableError(ValueError):
    """The picture cannot be read as a scene; the message says why."""


@dataclass(frozen=True, slots=True)
class _Template:
    """One shape at radius 1: its area and the centre of its mass relative to the shape's centre."""

    shape: str
    area: float
    offset: tuple[float, float]
    mask: np.ndarray


def _template(shape: str) -> _Template:
    """Draws a shape with a radius of a third of the picture, as the renderer draws it."""
    radius = 1 / 3
    obj = SceneObject(shape, "red", "large", 0.5, 0.5, radius)
    image = Image.new("L", (TEMPLATE_SIDE, TEMPLATE_SIDE), 0)
    draw_object(ImageDraw.Draw(image), obj, TEMPLATE_SIDE, 1)
    mask = np.asarray(image).astype(bool)
    ys, xs = np.nonzero(mask)
    unit = radius * TEMPLATE_SIDE
    offset = (
        (float(xs.mean()) + 0.5 - TEMPLATE_SIDE / 2) / unit,
        (float(ys.mean()) + 0.5 - TEMPLATE_SIDE / 2) / unit,
    )
    return _Template(shape, mask.sum() / unit**2, offset, mask)


TEMPLATES = tuple(_template(shape) for shape in SHAPES)


def parse(image: Image.Image) -> Scene:
    """Reads a picture.

    Args:
        image: A square picture of clean shapes on a plain background.

    Returns:
        Its objects from left to right, and its background.

    Raises:
        UnparsableError: No background, a component of several colours or of no known shape.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    height, width = pixels.shape[:2]
    if height != width:
        raise UnparsableError(f"the picture is {width} x {height}, not square")
    background = _background(pixels)
    along, colour = _along_lines(pixels, np.array(BACKGROUNDS[background], dtype=np.float64))
    share = np.take_along_axis(along, colour[None], 0)[0]
    components, count = ndimage.label(share > 0.5, structure=np.ones((3, 3)))
    objects = []
    for number in range(1, count + 1):
        mask = components == number
        if mask.sum() < SPECK * width * width:
            continue
        others = (components > 0) & ~mask
        for which, piece in _pieces(mask, colour, SPECK * width * width):
            objects += _objects(piece, others | (mask & ~piece), along[which], which)
    objects.sort(key=lambda o: (o.x, o.y))
    return Scene(tuple(objects), background)


def _background(pixels: np.ndarray) -> str:
    border = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    names = list(BACKGROUNDS)
    palette = np.array([BACKGROUNDS[name] for name in names], dtype=np.float64)
    distance = np.linalg.norm(border[:, None] - palette, axis=-1)
    votes = distance.argmin(1)[distance.min(1) <= BACKGROUND_DISTANCE]
    counts = np.bincount(votes, minlength=len(names))
    if counts.max() < BORDER_SHARE * len(border):
        raise UnparsableError("the border shows no background colour")
    return names[int(counts.argmax())]


def _along_lines(pixels: np.ndarray, background: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How far each pixel lies on the way from the background to each colour.

    Returns:
        (share [C, H, W], 0 at the background and 1 at the colour; int [H, W] of the line that the
        pixel is nearest to).
    """
    palette = np.array([COLOURS[name] for name in COLOUR_NAMES], dtype=np.float64)
    lines = palette - background
    offset = pixels - background
    share = np.einsum("hwc,kc->khw", offset, lines) / (lines**2).sum(1)[:, None, None]
    nearest = np.clip(share, 0.0, 1.0)
    residual = np.linalg.norm(offset[None] - nearest[..., None] * lines[:, None, None], axis=-1)
    return nearest, residual.argmin(0)


def _pieces(mask: np.ndarray, colour: np.ndarray, least: float) -> list[tuple[int, np.ndarray]]:
    """A component as objects of one colour each; touching objects differ in colour."""
    counts = np.bincount(colour[mask], minlength=len(COLOUR_NAMES))
    best = int(counts.argmax())
    if counts[best] >= COLOUR_SHARE * mask.sum():
        return [(best, mask)]
    pieces = []
    for which in np.flatnonzero(counts >= least):
        labels, count = ndimage.label(mask & (colour == which), structure=np.ones((3, 3)))
        for number in range(1, count + 1):
            piece = labels == number
            if piece.sum() >= least:
                pieces.append((int(which), piece))
    return pieces


def _objects(
    mask: np.ndarray, blocked: np.ndarray, along: np.ndarray, which: int
) -> list[SceneObject]:
    """The object of a component, or the two that touch where it falls apart under erosion."""
    try:
        return [_object(mask, blocked, along, COLOUR_NAMES[which])]
    except UnparsableError as error:
        for thickness in (1, 2):
            core = ndimage.binary_erosion(mask, iterations=thickness)
            labels, count = ndimage.label(core)
            sizes = np.bincount(labels.ravel(), minlength=count + 1)[1:]
            if (sizes >= SPECK * mask.size / 2).sum() == count == 2:
                # Every pixel of the mask goes to the nearer of the two cores.
                nearest = ndimage.distance_transform_edt(
                    labels == 0, return_distances=False, return_indices=True
                )
                owner = np.where(mask, labels[tuple(nearest)], 0)
                parts = [owner == 1, owner == 2]
                return [
                    _object(part, blocked | other, along, COLOUR_NAMES[which])
                    for part, other in (parts, parts[::-1])
                ]
        raise error


def _object(mask: np.ndarray, blocked: np.ndarray, along: np.ndarray, colour: str) -> SceneObject:
    """The shape that covers a component best, at the component's own place and area."""
    side = mask.shape[0]
    window, left, top = _window(mask)
    mask, blocked, along = mask[window], blocked[window], along[window]
    around = ndimage.binary_dilation(mask, iterations=2) & ~blocked
    cover = np.where(around, along, 0.0)
    area = float(cover.sum())
    ys, xs = np.mgrid[0 : cover.shape[0], 0 : cover.shape[1]] + 0.5
    centre = (float((cover * xs).sum()) / area, float((cover * ys).sum()) / area)
    scored = []
    for template in TEMPLATES:
        radius = math.sqrt(area / template.area)
        cx = centre[0] - template.offset[0] * radius
        cy = centre[1] - template.offset[1] * radius
        drawn = _draw_template(template, cx, cy, radius, cover.shape)
        seen = np.where(blocked, 0.0, drawn)
        overlap = np.minimum(seen, cover).sum() / np.maximum(seen, cover).sum()
        scored.append((float(overlap), template.shape, cx + left, cy + top, radius))
    scored.sort(reverse=True)
    overlap, shape, cx, cy, radius = scored[0]
    if overlap < LEAST_OVERLAP or overlap - scored[1][0] < LEAST_LEAD:
        raise UnparsableError(
            f"a {colour} component at ({cx / side:.2f}, {cy / side:.2f}) is no known shape "
            f"(best {shape}, overlap {overlap:.2f})"
        )
    size: Size = "small" if radius / side < (RADII["small"] + RADII["large"]) / 2 else "large"
    return SceneObject(shape, colour, size, cx / side, cy / side, radius / side)


def _window(mask: np.ndarray) -> tuple[tuple[slice, slice], int, int]:
    """The part of the picture around a component, with room for any shape of its area; its left
    and top."""
    spans = []
    for axis, side in ((1, mask.shape[0]), (0, mask.shape[1])):
        places = np.flatnonzero(mask.any(axis))
        room = 4 + (places[-1] - places[0] + 1) // 2
        spans.append(slice(max(0, places[0] - room), min(side, places[-1] + 1 + room)))
    return (spans[0], spans[1]), spans[1].start, spans[0].start


def _draw_template(
    template: _Template, cx: float, cy: float, radius: float, shape: tuple[int, ...]
) -> np.ndarray:
    """Coverage [height, width] of a shape, SUPERSAMPLE x SUPERSAMPLE points a pixel."""
    low_x, high_x = max(0, int(cx - 1.4 * radius)), min(shape[1], int(cx + 1.4 * radius) + 2)
    low_y, high_y = max(0, int(cy - 1.4 * radius)), min(shape[0], int(cy + 1.4 * radius) + 2)
    out = np.zeros(shape)
    if low_x >= high_x or low_y >= high_y:
        return out
    scale = TEMPLATE_SIDE / 3 / radius
    columns = _sample_points(low_x, high_x, cx, scale)
    rows = _sample_points(low_y, high_y, cy, scale)
    inside_x = (columns >= 0) & (columns < TEMPLATE_SIDE)
    inside_y = (rows >= 0) & (rows < TEMPLATE_SIDE)
    picked = template.mask[
        np.ix_(rows.clip(0, TEMPLATE_SIDE - 1), columns.clip(0, TEMPLATE_SIDE - 1))
    ]
    picked = picked & inside_x & inside_y[:, None]
    points = picked.reshape(high_y - low_y, SUPERSAMPLE, high_x - low_x, SUPERSAMPLE)
    out[low_y:high_y, low_x:high_x] = points.mean((1, 3))
    return out


def _sample_points(low: int, high: int, centre: float, scale: float) -> np.ndarray:
    points = np.arange(low * SUPERSAMPLE, high * SUPERSAMPLE) / SUPERSAMPLE + 0.5 / SUPERSAMPLE
    return np.floor((points - centre) * scale + TEMPLATE_SIDE / 2).astype(np.int64)


def satisfies(scene: Scene, caption: Caption) -> bool:
    """Whether a scene shows exactly what a caption says; an ambiguous relation does not count."""
    if caption.counts() != scene.kinds():
        return False
    if caption.background is not None and caption.background != scene.background:
        return False
    if caption.sizes is not None:
        wanted = sorted((*k, s) for k, s in zip(caption.kinds, caption.sizes, strict=True))
        if wanted != sorted((*o.kind, o.size) for o in scene.objects):
            return False
    if caption.relation is None:
        return True
    i, relation, j = caption.relation
    first, second = (next(o for o in scene.objects if o.kind == caption.kinds[k]) for k in (i, j))
    return relation_holds(first, relation, second) is True


# How far (as a fraction of the side) an object that an edit leaves alone may seem to move.
PLACE = 0.06


def follows(scene: Scene, source: Scene, edit: Edit) -> bool:
    """Whether a scene is its source after exactly this edit."""
    if edit.kind == "add":
        assert edit.added is not None
        rest = list(scene.objects)
        for old in source.objects:
            twin = next((o for o in rest if _same(o, old)), None)
            if twin is None:
                return False
            rest.remove(twin)
        added = [o.kind for o in rest] == [edit.added.kind]
        return added and scene.background == source.background
    wanted = edit.apply(source)
    if wanted.background != scene.background or len(wanted.objects) != len(scene.objects):
        return False
    rest = list(scene.objects)
    for old in wanted.objects:
        twin = next((o for o in rest if _same(o, old)), None)
        if twin is None:
            return False
        rest.remove(twin)
    return True


def _same(a: SceneObject, b: SceneObject) -> bool:
    near = math.hypot(a.x - b.x, a.y - b.y) <= PLACE
    return near and a.kind == b.kind and a.size == b.size


def success(
    prompts: Sequence[str],
    images: Sequence[Image.Image],
    sources: Sequence[Image.Image] | None = None,
    metadata: Sequence[Any] | None = None,
) -> list[float]:
    """An evaluator: 1.0 where a picture is right, 0.0 where it is wrong or cannot be read.

    Args:
        prompts: B captions of the domain; instructions where `sources` is given.
        images: B pictures.
        sources: B pictures that were edited.
        metadata: Not used; evaluators are called with it.

    Raises:
        ValueError: A caption or instruction that is not of the domain, or lists of different
            lengths.
    """
    del metadata
    if sources is None:
        return [
            float(_shows(read_caption(prompt), image))
            for prompt, image in zip(prompts, images, strict=True)
        ]
    return [
        float(_edited(prompt, image, source))
        for prompt, image, source in zip(prompts, images, sources, strict=True)
    ]


def _shows(caption: Caption, image: Image.Image) -> bool:
    try:
        return satisfies(parse(image), caption)
    except UnparsableError:
        return False


def _edited(prompt: str, image: Image.Image, source: Image.Image) -> bool:
    try:
        before = parse(source)
        return follows(parse(image), before, read_instruction(prompt, before))
    except UnparsableError:
        return False
