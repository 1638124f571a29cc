"""One scene built by hand, and the caption that it satisfies."""

from __future__ import annotations

from arr_fast.shapes.captions import Caption
from arr_fast.shapes.scene import Scene, SceneObject

RED = SceneObject("circle", "red", "large", 0.25, 0.3, 0.19)
BLUE = SceneObject("star", "blue", "small", 0.75, 0.35, 0.105)
SCENE = Scene((RED, BLUE), "white")
CAPTION = Caption(
    (("red", "circle"), ("blue", "star")),
    sizes=("large", "small"),
    relation=(0, "left", 1),
    background="white",
)
