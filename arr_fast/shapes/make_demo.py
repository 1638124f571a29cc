"""Writes the demonstration's pairs: `python -m arr_fast.shapes.make_demo [--out DIR]`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from arr_fast.shapes.captions import Caption, Edit, describe
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import RADII, Scene, SceneObject, Size, with_object

SIDE = 256
DEFAULT_OUT = Path(__file__).parent / "data" / "demo"


def _object(colour: str, shape: str, size: Size, x: float, y: float) -> SceneObject:
    return SceneObject(shape, colour, size, x, y, RADII[size])


def _scene(background: str, *objects: SceneObject) -> Scene:
    return Scene(objects, background, seed=5)


PARK = _scene(
    "beige",
    _object("red", "circle", "large", 0.28, 0.32),
    _object("blue", "star", "large", 0.72, 0.7),
)
NIGHT = _scene(
    "navy",
    _object("yellow", "star", "large", 0.7, 0.26),
    _object("orange", "ring", "large", 0.27, 0.68),
    _object("green", "square", "small", 0.75, 0.76),
)
TABLE = _scene(
    "white",
    _object("purple", "triangle", "large", 0.3, 0.3),
    _object("green", "cross", "large", 0.7, 0.68),
)
TRIO = _scene(
    "gray",
    _object("red", "square", "large", 0.26, 0.3),
    _object("yellow", "ring", "large", 0.72, 0.3),
    _object("blue", "circle", "large", 0.5, 0.74),
)


def _without(scene: Scene, index: int) -> Scene:
    return replace(scene, objects=scene.objects[:index] + scene.objects[index + 1 :])


def _swapped(scene: Scene) -> Scene:
    a, b = scene.objects[:2]
    return with_object(with_object(scene, 0, x=b.x, y=b.y), 1, x=a.x, y=a.y)


# name, scene of the caption, what the worse picture does, whether the better one comes first.
PAIRS: tuple[tuple[str, Scene, Callable[[Scene], Scene], bool], ...] = (
    ("wrong_colour", PARK, lambda s: with_object(s, 0, colour="green"), True),
    ("missing_object", NIGHT, lambda s: _without(s, 1), False),
    ("blurry", TABLE, lambda s: replace(s, blur=0.026), True),
    ("swapped_places", TRIO, _swapped, False),
    ("noisy_background", PARK, lambda s: replace(s, background="black", noise=0.14), True),
    ("covered", TRIO, lambda s: replace(s, hidden=2), False),
)
EDITS: tuple[tuple[str, Scene, Edit, Callable[[Scene, Scene], Scene], bool], ...] = (
    ("edit_not_done", PARK, Edit("recolour", 0, "purple"), lambda source, _: source, True),
    (
        "edit_too_much",
        NIGHT,
        Edit("remove", 2),
        lambda _, done: with_object(done, 0, colour="red"),
        False,
    ),
)


def write_demo(out: Path) -> int:
    """Renders the pairs and writes demo.jsonl beside them.

    Args:
        out: Directory; created where missing.

    Returns:
        How many pairs were written.
    """
    out.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, str]] = []

    def add(name: str, text: str, better: Scene, worse: Scene, first: bool) -> dict[str, str]:
        shown = (better, worse) if first else (worse, better)
        line = {"id": name, "caption": text}
        for letter, scene in zip("ab", shown, strict=True):
            file = f"{name}_{letter}.png"
            render(scene, SIDE).save(out / file, optimize=True)
            line[f"image_{letter}"] = file
        lines.append({**line, "better": "a" if first else "b"})
        return lines[-1]

    for name, scene, spoil, first in PAIRS:
        rng = np.random.default_rng(len(lines))
        caption: Caption = replace(describe(rng, scene), background=scene.background)
        add(name, caption.text(rng), scene, spoil(scene), first)
    for name, source, edit, fail, first in EDITS:
        text = edit.text(np.random.default_rng(len(lines)), source)
        done = edit.apply(source)
        line = add(name, text, done, fail(source, done), first)
        line["source"] = f"{name}_source.png"
        render(source, SIDE).save(out / line["source"], optimize=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "demo.jsonl").write_text(text, encoding="utf-8")
    return len(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    args = parser.parse_args()
    print(f"{write_demo(args.out)} pairs in {args.out}")


if __name__ == "__main__":
    main()
