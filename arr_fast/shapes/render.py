"""Draws a scene: anti-aliased, seeded, and the same picture at every size."""

from __future__ import annotations

import math

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from arr_fast.shapes.scene import BACKGROUNDS, COLOURS, Scene, SceneObject

NOISE_GRID = 64


def _polygon(obj: SceneObject, side: int) -> list[tuple[float, float]]:
    cx, cy, r = obj.x * side, obj.y * side, obj.radius * side
    if obj.shape == "square":
        h = 0.86 * r
        return [(cx - h, cy - h), (cx + h, cy - h), (cx + h, cy + h), (cx - h, cy + h)]
    if obj.shape == "triangle":
        return [(cx, cy - r), (cx + r, cy + 0.85 * r), (cx - r, cy + 0.85 * r)]
    if obj.shape == "star":
        return [
            (
                cx + (r * 1.08 if i % 2 == 0 else 0.42 * r) * math.sin(math.pi * i / 5),
                cy - (r * 1.08 if i % 2 == 0 else 0.42 * r) * math.cos(math.pi * i / 5),
            )
            for i in range(10)
        ]
    arm = 0.33 * r
    steps = [(-arm, -r), (arm, -r), (arm, -arm), (r, -arm), (r, arm), (arm, arm)]
    steps += [(arm, r), (-arm, r), (-arm, arm), (-r, arm), (-r, -arm), (-arm, -arm)]
    return [(cx + dx, cy + dy) for dx, dy in steps]


def draw_object(draw: ImageDraw.ImageDraw, obj: SceneObject, side: int, fill: object) -> None:
    """Draws one object on a canvas of `side` pixels."""
    cx, cy, r = obj.x * side, obj.y * side, obj.radius * side
    box = (cx - r, cy - r, cx + r, cy + r)
    if obj.shape == "circle":
        draw.ellipse(box, fill=fill)  # type: ignore[arg-type]
    elif obj.shape == "ring":
        draw.ellipse(box, outline=fill, width=max(1, round(0.38 * r)))  # type: ignore[arg-type]
    else:
        draw.polygon(_polygon(obj, side), fill=fill)  # type: ignore[arg-type]


def _draw_bar(draw: ImageDraw.ImageDraw, obj: SceneObject, side: int, seed: int) -> None:
    """A bar with black and white stripes over less than half of the object."""
    upright = seed % 2 == 0
    shift = (0.4 if (seed // 2) % 2 == 0 else -0.4) * obj.radius
    half, reach = 0.4 * obj.radius, obj.radius + 0.05
    stripes = 2 * max(3, round(reach / 0.045))
    for i in range(stripes):
        a = -reach + 2 * reach * i / stripes
        b = -reach + 2 * reach * (i + 1) / stripes
        fill = (0, 0, 0) if i % 2 == 0 else (255, 255, 255)
        if upright:
            xs, ys = (obj.x + shift - half, obj.x + shift + half), (obj.y + a, obj.y + b)
        else:
            xs, ys = (obj.x + a, obj.x + b), (obj.y + shift - half, obj.y + shift + half)
        draw.rectangle((xs[0] * side, ys[0] * side, xs[1] * side - 1, ys[1] * side - 1), fill=fill)


def render(scene: Scene, side: int = 64) -> Image.Image:
    """Draws a scene.

    Args:
        scene: What to draw.
        side: Width and height in pixels. Noise lives on a 64 x 64 grid at every size, so that a
            large picture shows the same grains and keeps them when it is scaled down.

    Returns:
        An RGB picture of side x side pixels; a function of the arguments alone.
    """
    scale = 3 if side <= 128 else 2
    big = side * scale
    image = Image.new("RGB", (big, big), BACKGROUNDS[scene.background])
    draw = ImageDraw.Draw(image)
    for obj in scene.objects:
        draw_object(draw, obj, big, COLOURS[obj.colour])
    if scene.hidden is not None:
        _draw_bar(draw, scene.objects[scene.hidden], big, scene.seed)
    image = image.reduce(scale)
    if scene.blur > 0:
        image = image.filter(ImageFilter.GaussianBlur(scene.blur * side))
    if scene.noise > 0:
        image = _with_noise(image, scene.noise, scene.seed, side)
    return image


def _with_noise(image: Image.Image, noise: float, seed: int, side: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    grains = rng.standard_normal((NOISE_GRID, NOISE_GRID, 3), dtype=np.float32) * (noise * 255)
    if side != NOISE_GRID:
        cells = np.minimum(np.arange(side) * NOISE_GRID // side, NOISE_GRID - 1)
        grains = grains[cells][:, cells]
    pixels = np.asarray(image, dtype=np.float32) + grains
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


def coverage(scene: Scene, side: int = 64) -> np.ndarray:
    """Which object shows at each pixel, before blur and noise.

    Returns:
        int8 [side, side]: index of the object, -1 for background, -2 for the bar.
    """
    ids = Image.new("L", (side, side), 0)
    draw = ImageDraw.Draw(ids)
    for index, obj in enumerate(scene.objects):
        draw_object(draw, obj, side, index + 1)
    plain = np.asarray(ids).astype(np.int16) - 1
    if scene.hidden is not None:
        mask = Image.new("RGB", (side, side), (9, 9, 9))
        _draw_bar(ImageDraw.Draw(mask), scene.objects[scene.hidden], side, scene.seed)
        plain = np.where((np.asarray(mask) == 9).all(-1), plain, -2)
    return plain.astype(np.int8)
