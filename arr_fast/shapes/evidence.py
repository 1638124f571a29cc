"""What a verdict rests on, in single words: what a picture shows where a criterion looks, what the
criterion or the caption wants there, and which cells of an edited picture are as in the source.

Training aims at these beside the verdicts; nothing at inference reads them.
"""

from __future__ import annotations

import numpy as np

from arr_fast.shapes.captions import NUMBERS, Caption, Edit
from arr_fast.shapes.claims import Claim, Context, matching, near
from arr_fast.shapes.render import coverage
from arr_fast.shapes.scene import Scene

AXES = {"left": ("left", "right"), "right": ("left", "right"), "top": ("top", "bottom")}
AXES |= {"bottom": ("top", "bottom"), "above": ("above", "below"), "below": ("above", "below")}
STATES = {
    "sharpness": ("sharp", "blurry"),
    "noise": ("clean", "noisy"),
    "occlusion": ("free", "covered"),
    "cut_off": ("whole", "cut"),
}

# The words of a cell of an edited picture: as in the source, or not.
CELL_WORDS = ("kept", "changed")
GRID = 4
UNKNOWN = -100
# An object that covers fewer of a cell's 256 pixels is not what the cell shows.
LEAST_COVER = 24


def evidence(claim: Claim, scene: Scene, context: Context) -> str:
    """One word for what a picture shows where a claim looks.

    The colour of the object that a claim about a colour names, the number of the objects that are
    counted, the side on which something lies; for claims about a whole caption or edit the first
    thing that is amiss, or "correct".

    Args:
        claim: A claim whose truth on the scene is known.
        scene: The picture.
        context: Caption or edit.
    """
    truth = claim.truth(scene, context)
    assert truth is not None, "an ambiguous claim has no evidence"
    kind = claim.kind
    if scene.is_static:
        return "noisy" if kind == "noise" else "wrong"
    if kind in ("presence", "absence", "count"):
        return NUMBERS[len(matching(scene, claim.first))]
    if kind == "colour":
        return matching(scene, ("", claim.first[1]))[0].colour
    if kind == "size":
        return matching(scene, claim.first)[0].size
    if kind in ("position", "relation"):
        return _side(claim.value, truth)
    if kind in ("background", "caption_background"):
        return scene.background
    if kind == "caption_count":
        return NUMBERS[len(scene.objects)]
    if kind in STATES:
        return STATES[kind][0 if truth else 1]
    if context.edit is not None:
        return _edit_evidence(kind, scene, context.source, context.edit)
    assert context.caption is not None, "this kind of claim needs a caption"
    return _caption_evidence(kind, truth, scene, context.caption)


def _caption_evidence(kind: str, truth: bool, scene: Scene, caption: Caption) -> str:
    if kind == "caption_relation":
        assert caption.relation is not None, "known only where the caption has a relation"
        return _side(caption.relation[1], truth)
    if truth:
        return "correct"
    wanted, shown = caption.counts(), scene.kinds()
    if kind in ("caption_colours", "caption_extra") or shown - wanted:
        return "wrong"
    if wanted - shown:
        return NUMBERS[len(scene.objects)]
    if caption.background not in (None, scene.background):
        return scene.background
    placed = Claim("caption_relation").truth(scene, Context(caption=caption))
    if caption.relation is not None and placed is False:
        return _side(caption.relation[1], placed)
    return "size"


def _edit_evidence(kind: str, scene: Scene, source: Scene | None, edit: Edit) -> str:
    assert source is not None, "an edit has a source"
    context = Context(source=source, edit=edit)
    if kind == "edit_done":
        return _edited(scene, source, edit)
    if Claim("edit_kept").truth(scene, context):
        done = kind == "edit_kept" or Claim("edit_done").truth(scene, context)
        return "correct" if done else "missing"
    if edit.kind != "background" and scene.background != source.background:
        return scene.background
    return "wrong"


def _edited(scene: Scene, source: Scene, edit: Edit) -> str:
    """What the picture shows where the edit was asked for."""
    if edit.kind == "background":
        return scene.background
    if edit.kind == "add":
        assert edit.added is not None
        return NUMBERS[scene.kinds()[edit.added.kind]]
    target = source.objects[edit.target]
    found = near(scene, target)
    if edit.kind == "remove" or found is None:
        return NUMBERS[int(found is not None)]
    return {"recolour": found.colour, "reshape": found.shape, "resize": found.size}[edit.kind]


def _side(value: str, truth: bool) -> str:
    return value if truth else next(word for word in AXES[value] if word != value)


def wanted(claim: Claim, context: Context) -> tuple[str, ...]:
    """Up to two words for what a claim asks for, "" where a word does not apply.

    Args:
        claim: Any claim.
        context: Caption or edit, from which claims about a caption or edit take their words.
    """
    kind, caption = claim.kind, context.caption
    if kind == "count":
        return (NUMBERS[int(claim.value)],)
    if claim.value:
        return (claim.value,)
    if kind in ("edit_done", "edit_overall"):
        assert context.edit is not None and context.source is not None, "an edit has a source"
        return (_asked(context.source, context.edit),)
    if caption is None:
        return ()
    number, background = NUMBERS[len(caption.kinds)], caption.background or ""
    relation = "" if caption.relation is None else caption.relation[1]
    return {
        "caption_objects": (number,),
        "caption_count": (number,),
        "caption_extra": (number,),
        "caption_relation": (relation,),
        "caption_background": (background,),
        "faithful": (number, background),
        "overall": (number, background),
    }.get(kind, ())


def _asked(source: Scene, edit: Edit) -> str:
    if edit.kind == "remove":
        return NUMBERS[0]
    if edit.kind == "add":
        assert edit.added is not None
        return NUMBERS[source.kinds()[edit.added.kind] + 1]
    return edit.value


def cell_coverage(scene: Scene) -> np.ndarray:
    """`coverage` by cells: int8 [16, 256]."""
    blocks = coverage(scene).reshape(GRID, 16, GRID, 16).transpose(0, 2, 1, 3)
    return blocks.reshape(GRID * GRID, -1)


def _cell_contents(scene: Scene) -> list[tuple[str, ...]]:
    """For every cell its main object's (colour, shape, size), (background,), or () if hidden."""
    contents: list[tuple[str, ...]] = []
    for cell in cell_coverage(scene):
        areas = np.bincount(cell[cell >= 0], minlength=1)
        if areas.max() >= LEAST_COVER:
            obj = scene.objects[int(areas.argmax())]
            contents.append((*obj.kind, obj.size))
        elif (cell == -1).mean() >= 0.5 and areas.sum() == 0:
            contents.append((scene.background,))
        else:
            contents.append(())
    return contents


def cell_words(scene: Scene, context: Context) -> np.ndarray:
    """Which of an edited picture's 16 cells are as in its source.

    Args:
        scene: A judged picture.
        context: Caption, or source and edit.

    Returns:
        int64 [16]: index into CELL_WORDS, UNKNOWN where nothing can be said: thin borders, pictures
        that are not legible, pictures without a source.
    """
    out = np.full(GRID * GRID, UNKNOWN, np.int64)
    if context.source is None or not scene.is_legible:
        return out
    pairs = zip(_cell_contents(scene), _cell_contents(context.source), strict=True)
    for cell, (now, before) in enumerate(pairs):
        if now and before:
            out[cell] = int(now != before)
    return out
