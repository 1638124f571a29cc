"""Stage 1: the vision tower learns to emit sums of the decoder's own word embeddings.

Every image token is asked what its 16 x 16 pixels show. The class weights are not free parameters
but sums of word embeddings (colour + shape + size; background colour + "background"), so that the
decoder later finds the words that it reads in captions and criteria inside the image tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from arr_fast.shapes import easy_vqa
from arr_fast.shapes.evidence import GRID, LEAST_COVER, cell_coverage
from arr_fast.shapes.forward import VisionForward, patchify
from arr_fast.shapes.model import IMAGE_TOKENS
from arr_fast.shapes.pairs import sample_picture
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    HELD_OUT_COMBINATIONS,
    RADII,
    SHAPES,
    Scene,
    Split,
)

LOGIT_SCALE = 12.0
# A smaller scale makes for a larger share of the image token, so that the decoder can find it.
WORD_SCALE = 4.0
OBJECT_WEIGHT = 4.0
IGNORED = -100

ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
WORD_HEADS: dict[str, tuple[str, ...]] = {
    "count": ("zero", "one", "two", "three", "four"),
    "blur": ("sharp", "blurry"),
    "noise": ("clean", "noisy"),
    "cut": ("whole", "cut"),
    "row": ROWS,
    "column": COLUMNS,
}

HEAD_WEIGHTS = {"count": 1.0, "blur": 1.0, "noise": 1.0, "cut": 1.0, "row": 0.6, "column": 0.6}


@dataclass(frozen=True, slots=True)
class CellClass:
    """One thing that a cell may show, with the words whose embeddings add up to its weight."""

    words: tuple[str, ...]
    held_out: bool = False


def cell_classes() -> list[CellClass]:
    """Every class of a cell; held-out combinations are there for evaluation only."""
    classes = []
    colours = [*COLOURS, *(c for c in easy_vqa.COLOURS if c not in COLOURS)]
    for colour in colours:
        for shape in (*SHAPES, "rectangle"):
            held = (colour, shape) in HELD_OUT_COMBINATIONS
            classes += [CellClass((colour, shape, size), held) for size in RADII]
    classes += [CellClass((word, "background")) for word in (*BACKGROUNDS, "pale")]
    classes.append(CellClass(("covered", "bar")))
    return classes


@dataclass(frozen=True, slots=True)
class CellTargets:
    """What the cells of a batch show.

    Attributes:
        classes: [N, 16, C] share of each class.
        main: [N, 16] class of the object that covers most, IGNORED on empty cells.
        words: For each word head [N, 16] the index of its word, IGNORED where it has none.
        place: [N, 16, 3] x, y and radius of the main object.
        anchors: [N, 16] 1 where an object's centre lies in the cell.
    """

    classes: Tensor
    main: Tensor
    words: dict[str, Tensor]
    place: Tensor
    anchors: Tensor


def third(value: float) -> int:
    """0, 1 or 2: which third of the side a coordinate falls in."""
    return int(np.clip(value * 3, 0, 2))


def scene_cells(scene: Scene, index: dict[tuple[str, ...], int], count: int) -> dict[str, Any]:
    """The targets of one rendered scene as numpy arrays; see CellTargets."""
    shown = cell_coverage(scene)
    classes = np.zeros((IMAGE_TOKENS, count), np.float32)
    areas = np.stack([(shown == i).sum(1) for i in range(len(scene.objects))] or [np.zeros(16)], 1)
    for number, obj in enumerate(scene.objects):
        key = index[(obj.colour, obj.shape, obj.size)]
        classes[:, key] += OBJECT_WEIGHT * areas[:, number]
    classes[:, index[(scene.background, "background")]] += (shown == -1).sum(1)
    classes[:, index[("covered", "bar")]] += OBJECT_WEIGHT * (shown == -2).sum(1)
    main = np.where(areas.max(1) >= LEAST_COVER, areas.argmax(1), IGNORED)
    out: dict[str, Any] = {"main": np.full(IMAGE_TOKENS, IGNORED), "place": np.zeros((16, 3))}
    out["anchors"] = np.zeros(IMAGE_TOKENS)
    words = {h: np.full(IMAGE_TOKENS, IGNORED) for h in WORD_HEADS}
    for cell in np.flatnonzero(main != IGNORED):
        obj = scene.objects[main[cell]]
        out["main"][cell] = index[(obj.colour, obj.shape, obj.size)]
        out["place"][cell] = (obj.x, obj.y, obj.radius * 4)
        words["row"][cell], words["column"][cell] = third(obj.y), third(obj.x)
    for obj in scene.objects:
        row, column = (int(np.clip(v * GRID, 0, GRID - 1)) for v in (obj.y, obj.x))
        out["anchors"][row * GRID + column] = 1
    words["count"][:] = len(scene.objects)
    words["noise"][:] = scene.noise > 0
    if scene.objects:
        words["blur"][:] = scene.blur > 0
        words["cut"][:] = any(o.is_cut for o in scene.objects)
    return {**out, "classes": classes / classes.sum(1, keepdims=True), "words": words}


def easy_vqa_cells(
    picture: easy_vqa.Picture, image: Image.Image, index: dict[tuple[str, ...], int], count: int
) -> dict[str, Any]:
    """The targets of one easy-VQA picture."""
    mask = easy_vqa.object_mask(image)
    area = mask.reshape(GRID, 16, GRID, 16).sum((1, 3)).reshape(-1)
    classes = np.zeros((IMAGE_TOKENS, count), np.float32)
    size = "large" if mask.sum() > 250 else "small"
    key = index[(str(picture.colour), str(picture.shape), size)]
    classes[:, key] = OBJECT_WEIGHT * area
    classes[:, index[("pale", "background")]] = 256 - area
    words = {h: np.full(IMAGE_TOKENS, IGNORED) for h in WORD_HEADS}
    words["count"][:] = 1
    ys, xs = np.nonzero(mask)
    centre = (float(xs.mean()) / 64, float(ys.mean()) / 64, float(np.sqrt(mask.sum())) / 32)
    anchors = np.zeros(IMAGE_TOKENS)
    anchors[int(centre[1] * GRID) * GRID + int(centre[0] * GRID)] = 1
    main = np.where(area >= LEAST_COVER, key, IGNORED)
    words["row"][area >= LEAST_COVER] = third(centre[1])
    words["column"][area >= LEAST_COVER] = third(centre[0])
    return {
        "main": main,
        "place": np.tile(centre, (IMAGE_TOKENS, 1)),
        "anchors": anchors,
        "classes": classes / classes.sum(1, keepdims=True),
        "words": words,
    }


class CellHeads(nn.Module):
    """The losses of stage 1. Only `place` and `anchor` have weights of their own, thrown away."""

    def __init__(self, embeddings: Tensor, word_ids: dict[str, int]) -> None:
        super().__init__()
        classes = cell_classes()
        self.index = {c.words: i for i, c in enumerate(classes)}
        weights = [sum(embeddings[word_ids[w]] for w in c.words) for c in classes]
        self.register_buffer("class_weights", torch.stack(weights))  # type: ignore[arg-type]
        self.register_buffer("trained", torch.tensor([not c.held_out for c in classes]))
        for head, words in WORD_HEADS.items():
            rows = torch.stack([embeddings[word_ids[w]] for w in words])
            self.register_buffer(f"words_{head}", rows)
        shapes = [*SHAPES, "rectangle"]
        rows = torch.stack([embeddings[word_ids[s]] for s in shapes])
        self.register_buffer("shape_words", rows, persistent=False)
        owners = [shapes.index(c.words[1]) if c.words[1] in shapes else -1 for c in classes]
        self.register_buffer("shape_of", torch.tensor(owners), persistent=False)
        self.place = nn.Linear(embeddings.shape[1], 3)
        self.anchor = nn.Linear(embeddings.shape[1], 1)

    def loss(self, merged: Tensor, targets: CellTargets) -> Tensor:
        """Mean loss over the cells of image tokens [N, 16, hidden]."""
        logits = LOGIT_SCALE * merged @ self.class_weights.T  # type: ignore[operator]
        logits = logits.masked_fill(~self.trained, -1e4)  # type: ignore[operator]
        total = -2 * (targets.classes * logits.log_softmax(-1)).sum(-1).mean()
        occupied = targets.main != IGNORED
        shapes = LOGIT_SCALE * merged[occupied] @ self.shape_words.T  # type: ignore[operator]
        total = total + 2 * F.cross_entropy(shapes, self.shape_of[targets.main[occupied]])  # type: ignore[index]
        for head, wanted in targets.words.items():
            scores = WORD_SCALE * merged @ getattr(self, f"words_{head}").T
            total = total + HEAD_WEIGHTS[head] * F.cross_entropy(
                scores.flatten(0, 1), wanted.flatten()
            )
        error = (self.place(merged) - targets.place)[occupied].square().mean()
        anchors = F.binary_cross_entropy_with_logits(
            self.anchor(merged)[..., 0], targets.anchors, pos_weight=torch.tensor(4.0)
        )
        result: Tensor = total + 3 * error + 0.3 * anchors
        return result

    @torch.no_grad()
    def scores(self, merged: Tensor, targets: CellTargets) -> dict[str, float]:
        """Accuracy of the main object's class over occupied cells, and of every word head."""
        occupied = targets.main != IGNORED
        shapes = (merged[occupied] @ self.shape_words.T).argmax(-1)  # type: ignore[operator]
        objects = merged[occupied] @ self.class_weights[: -len(BACKGROUNDS) - 2].T  # type: ignore[index]
        found = {"object": (objects.argmax(-1) == targets.main[occupied]).float().mean().item()}
        wanted_shapes = self.shape_of[targets.main[occupied]]  # type: ignore[index]
        found["shape"] = (shapes == wanted_shapes).float().mean().item()
        for head, wanted in targets.words.items():
            known = wanted != IGNORED
            guess = (merged[known] @ getattr(self, f"words_{head}").T).argmax(-1)
            found[head] = (guess == wanted[known]).float().mean().item()
        off = (self.place(merged) - targets.place)[occupied][:, :2].abs().mean().item()
        return {**found, "place_error": off}


def batch(
    rng: np.random.Generator, heads: CellHeads, size: int, split: Split, vqa_share: float = 0.15
) -> tuple[Tensor, CellTargets]:
    """Pictures with their targets; easy-VQA's train split is mixed in."""
    images: list[Image.Image] = []
    cells: list[dict[str, Any]] = []
    count = len(heads.index)
    pool = easy_vqa.pictures("train") if vqa_share else ()
    while len(images) < size:
        if pool and rng.random() < vqa_share:
            picture = pool[int(rng.integers(len(pool)))]
            if picture.colour and picture.shape:
                images.append(picture.load("train"))
                cells.append(easy_vqa_cells(picture, images[-1], heads.index, count))
            continue
        scene = sample_picture(rng, split)
        if scene.is_static:
            continue
        images.append(render(scene, 64 if rng.random() < 0.8 else int(rng.choice([96, 128, 256]))))
        cells.append(scene_cells(scene, heads.index, count))
    return patchify(images), stack_cells(cells)


def stack_cells(cells: Sequence[dict[str, Any]]) -> CellTargets:
    """Targets of pictures as one batch."""

    def stacked(values: list[Any], kind: torch.dtype) -> Tensor:
        return torch.from_numpy(np.stack(values)).to(kind)

    return CellTargets(
        classes=stacked([c["classes"] for c in cells], torch.float32),
        main=stacked([c["main"] for c in cells], torch.int64),
        words={h: stacked([c["words"][h] for c in cells], torch.int64) for h in WORD_HEADS},
        place=stacked([c["place"] for c in cells], torch.float32),
        anchors=stacked([c["anchors"] for c in cells], torch.float32),
    )


def evaluate(vision: VisionForward, heads: CellHeads, seed: int, pictures: int) -> dict[str, float]:
    """Scores on held-out scenes."""
    rng = np.random.default_rng([seed, 77])
    patches, targets = batch(rng, heads, pictures, "held_out", vqa_share=0.0)
    with torch.no_grad():
        merged = vision(patches, deepstack=False).merged
    return heads.scores(merged, targets)
