"""Labelled examples: two pictures of one caption (or edit) with criteria and their truth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from arr_fast.prompts import Task
from arr_fast.shapes.captions import RELATIONS, Edit, describe, sample_edit
from arr_fast.shapes.claims import Claim, Context
from arr_fast.shapes.evidence import evidence, wanted
from arr_fast.shapes.grammar import wording
from arr_fast.shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    CUT_DEPTH,
    HELD_OUT_COMBINATIONS,
    MAX_OBJECTS,
    RADII,
    Scene,
    Split,
    allowed_kinds,
    make_object,
    sample_background,
    sample_kind,
    sample_scene,
    with_object,
)

Change = Callable[[np.random.Generator, Scene, Split], Scene | None]


# Relative frequency of the kinds of claim among the candidates of a pair.
KIND_WEIGHTS = {
    "presence": 0.6,
    "absence": 0.6,
    "colour": 2.0,
    "size": 3.0,
    "relation": 5.0,
    "position": 1.5,
    "caption_relation": 8.0,
    "caption_colours": 5.0,
    "caption_background": 3.0,
    "caption_extra": 4.0,
    "caption_objects": 3.0,
    "caption_count": 1.5,
    "faithful": 2.5,
    "overall": 2.5,
}


@dataclass(frozen=True, slots=True)
class LabelledCriterion:
    """A criterion's text and its truth on each picture; words for what is shown and wanted."""

    claim: Claim
    text: str
    truths: tuple[bool, ...]
    evidence: tuple[str, ...]
    wanted: tuple[str, ...]

    @property
    def kind(self) -> str:
        """The kind of the claim."""
        return self.claim.kind


@dataclass(frozen=True, slots=True)
class Example:
    """One item: its pictures in order, its caption or instruction, and labelled criteria."""

    caption: str
    context: Context
    scenes: tuple[Scene, ...]
    criteria: tuple[LabelledCriterion, ...]

    @property
    def source(self) -> Scene | None:
        """The source picture of an edit."""
        return self.context.source

    @property
    def task(self) -> Task:
        """Whether a caption or an instruction asks for its pictures."""
        return "t2i" if self.source is None else "edit"


def _pick(rng: np.random.Generator, scene: Scene) -> int | None:
    return int(rng.integers(len(scene.objects))) if scene.objects else None


def _repaint(rng: np.random.Generator, scene: Scene, split: Split, axis: int) -> Scene | None:
    i = _pick(rng, scene)
    if i is None:
        return None
    old = scene.objects[i].kind
    options = [k for k in allowed_kinds(split) if k[1 - axis] == old[1 - axis] and k != old]
    new = options[int(rng.integers(len(options)))]
    return with_object(scene, i, colour=new[0], shape=new[1])


def _recolour(rng: np.random.Generator, scene: Scene, split: Split) -> Scene | None:
    return _repaint(rng, scene, split, 0)


def _reshape(rng: np.random.Generator, scene: Scene, split: Split) -> Scene | None:
    return _repaint(rng, scene, split, 1)


def _resize(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    large = [i for i, o in enumerate(scene.objects) if o.size == "large"]
    if not large:
        return None
    i = large[int(rng.integers(len(large)))]
    return with_object(
        scene, i, size="small", radius=RADII["small"] * float(rng.uniform(0.94, 1.06))
    )


def _remove(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    i = _pick(rng, scene)
    if i is None or len(scene.objects) < 2:
        return None
    return replace(scene, objects=scene.objects[:i] + scene.objects[i + 1 :])


def _add(rng: np.random.Generator, scene: Scene, split: Split) -> Scene | None:
    if len(scene.objects) >= MAX_OBJECTS:
        return None
    kind = sample_kind(rng, split)
    if scene.objects and rng.random() < 0.3:
        kind = scene.objects[int(rng.integers(len(scene.objects)))].kind
    made = make_object(rng, kind, scene.objects)
    return None if made is None else replace(scene, objects=(*scene.objects, made))


def _swap_places(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    if len(scene.objects) < 2:
        return None
    i, j = (int(v) for v in rng.permutation(len(scene.objects))[:2])
    a, b = scene.objects[i], scene.objects[j]
    swapped = with_object(scene, i, x=b.x, y=b.y, size=b.size, radius=b.radius)
    return with_object(swapped, j, x=a.x, y=a.y, size=a.size, radius=a.radius)


def _swap_colours(rng: np.random.Generator, scene: Scene, split: Split) -> Scene | None:
    if len(scene.objects) < 2:
        return None
    i, j = (int(v) for v in rng.permutation(len(scene.objects))[:2])
    a, b = scene.objects[i], scene.objects[j]
    new = {(b.colour, a.shape), (a.colour, b.shape)}
    if a.kind == b.kind or (split == "train" and new & HELD_OUT_COMBINATIONS):
        return None
    return with_object(with_object(scene, i, colour=b.colour), j, colour=a.colour)


def _relocate(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    """The same objects at new places."""
    placed = replace(scene, objects=())
    for obj in scene.objects:
        made = make_object(rng, obj.kind, placed.objects, obj.size)
        if made is None:
            return None
        placed = replace(placed, objects=(*placed.objects, made))
    return placed


def _repaint_background(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    return replace(scene, background=sample_background(rng, scene.background))


def _blur(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    return replace(scene, blur=float(rng.uniform(0.018, 0.028)))


def _grain(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    return replace(scene, noise=float(rng.uniform(0.1, 0.16)), seed=int(rng.integers(2**31)))


def _hide(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    large = [i for i, o in enumerate(scene.objects) if o.size == "large"]
    if not large:
        return None
    return replace(scene, hidden=large[int(rng.integers(len(large)))])


def _cut(rng: np.random.Generator, scene: Scene, _: Split) -> Scene | None:
    i = _pick(rng, scene)
    if i is None:
        return None
    obj = scene.objects[i]
    out = obj.radius * (1 - CUT_DEPTH * float(rng.uniform(1.0, 1.8)))
    spot = {
        0: {"x": out},
        1: {"x": 1 - out},
        2: {"y": out},
        3: {"y": 1 - out},
    }[int(rng.integers(4))]
    moved = with_object(scene, i, **spot)
    m = moved.objects[i]
    others = [o for k, o in enumerate(moved.objects) if k != i]
    free = all(np.hypot(m.x - o.x, m.y - o.y) > m.radius + o.radius for o in others)
    return moved if free else None


CONTENT_CHANGES: tuple[Change, ...] = (
    _recolour,
    _reshape,
    _resize,
    _remove,
    _add,
    _swap_places,
    _swap_colours,
    _repaint_background,
)
# What is amiss in a contrast: above all what a caption says of two objects at once.
CONTRASTS = (0.1, 0.1, 0.05, 0.1, 0.05, 0.25, 0.2, 0.15)
QUALITY_CHANGES: tuple[Change, ...] = (_blur, _grain, _hide, _cut)


def _changed(rng: np.random.Generator, scene: Scene, split: Split, degraded: float = 0.4) -> Scene:
    """A picture of the caption: as it says, or with content and quality changes."""
    out = scene
    if rng.random() < 0.3:
        out = _relocate(rng, out, split) or out
    for _ in range(int(rng.choice([0, 1, 2], p=[0.35, 0.45, 0.2]))):
        change = CONTENT_CHANGES[int(rng.integers(len(CONTENT_CHANGES)))]
        out = change(rng, out, split) or out
    if rng.random() < degraded:
        change = QUALITY_CHANGES[int(rng.integers(len(QUALITY_CHANGES)))]
        out = change(rng, out, split) or out
    return out


def _picture(rng: np.random.Generator, scene: Scene, split: Split) -> Scene:
    draw = rng.random()
    if draw < 0.02:
        return replace(scene, objects=())
    if draw < 0.03:
        return replace(scene, noise=1.0, seed=int(rng.integers(2**31)))
    if draw < 0.13:
        return sample_scene(rng, split)
    return _changed(rng, scene, split)


def sample_picture(rng: np.random.Generator, split: Split) -> Scene:
    """A picture of some scene, often degraded."""
    if rng.random() < 0.03:
        return replace(sample_scene(rng, split), objects=())
    return _changed(rng, sample_scene(rng, split), split, degraded=0.7)


def _any(values: list[str], rng: np.random.Generator) -> str:
    return values[int(rng.integers(len(values)))]


def candidate_claims(
    rng: np.random.Generator, scenes: tuple[Scene, ...], context: Context, split: Split
) -> list[Claim]:
    """Claims worth asking about these pictures, several of each kind, none yet checked."""
    objects = [o for s in scenes for o in s.objects]
    kinds = sorted({o.kind for o in objects})
    if not kinds:
        kinds = [sample_kind(rng, split)]
    claims: list[Claim] = [Claim(k) for k in ("sharpness", "noise", "occlusion", "cut_off")]
    if context.caption is not None:
        claims += [Claim(k) for k in ("caption_objects", "caption_colours", "caption_count")]
        claims += [Claim(k) for k in ("caption_relation", "caption_background", "caption_extra")]
        claims += [Claim("faithful"), Claim("overall")]
    if context.edit is not None:
        claims += [Claim("edit_done"), Claim("edit_kept"), Claim("edit_overall")]
    named = [*kinds, sample_kind(rng, split)]
    for kind in named:
        subject = [kind, kind, ("", kind[1]), (kind[0], "")][int(rng.integers(4))]
        claims.append(Claim("presence", subject))
        subject = [kind, kind, ("", kind[1]), (kind[0], "")][int(rng.integers(4))]
        claims.append(Claim("absence", subject))
    for kind in kinds:
        claims.append(Claim("colour", ("", kind[1]), value=kind[0]))
        claims.append(Claim("colour", ("", kind[1]), value=_any(list(COLOURS), rng)))
        subject = kind if rng.random() < 0.6 else ("", kind[1])
        claims.append(Claim("size", subject, value=_any(["small", "large"], rng)))
        claims.append(Claim("position", subject, value=_any(["left", "right"], rng)))
        claims.append(Claim("position", subject, value=_any(["top", "bottom"], rng)))
    for counted in (("", ""), ("", _any([k[1] for k in kinds], rng))):
        for scene in scenes:
            found = [o for o in scene.objects if counted[1] in ("", o.shape)]
            number = len(found) if rng.random() < 0.8 else int(rng.integers(1, 5))
            if number:
                claims.append(Claim("count", counted, value=str(number)))
    for _ in range(6):
        first, second = kinds[int(rng.integers(len(kinds)))], kinds[int(rng.integers(len(kinds)))]
        if first != second:
            a, b = first, second
            if first[1] != second[1] and rng.random() < 0.4:
                a, b = ("", first[1]), ("", second[1])
            claims.append(Claim("relation", a, b, RELATIONS[int(rng.integers(4))]))
    for scene in scenes:
        claims.append(Claim("background", value=scene.background))
    claims.append(Claim("background", value=_any(list(BACKGROUNDS), rng)))
    return claims


def choose_criteria(
    rng: np.random.Generator,
    scenes: tuple[Scene, ...],
    context: Context,
    split: Split,
    limit: int,
    weights: dict[str, float],
    ties: float = 0.3,
) -> tuple[LabelledCriterion, ...]:
    """Picks unambiguous criteria, spread over the kinds, mostly ones that decide the pair.

    Args:
        rng: Source of chance.
        scenes: The judged pictures (one or two).
        context: Caption or edit.
        split: Which phrasings to use.
        limit: How many criteria at most.
        weights: Relative frequency of each kind; 1 where none is given.
        ties: Chance that a criterion on which two pictures agree is kept.
    """
    pool: list[tuple[float, Claim, tuple[bool, ...]]] = []
    for claim in dict.fromkeys(candidate_claims(rng, scenes, context, split)):
        truths = [claim.truth(scene, context) for scene in scenes]
        known = tuple(t for t in truths if t is not None)
        if len(known) < len(truths):
            continue
        decided = len(known) == 1 or len(set(known)) == 2
        if decided or rng.random() < ties:
            weight = weights.get(claim.kind, 1.0)
            pool.append((float(rng.random()) ** (1 / max(weight, 1e-6)), claim, known))
    pool.sort(key=lambda item: -item[0])
    chosen: list[LabelledCriterion] = []
    seen: dict[str, int] = {}
    for allowance in (1, 2, 3, 99):
        for _, claim, known in pool:
            if len(chosen) == limit:
                break
            if seen.get(claim.kind, 0) < allowance and all(c.claim != claim for c in chosen):
                seen[claim.kind] = seen.get(claim.kind, 0) + 1
                words = tuple(evidence(claim, scene, context) for scene in scenes)
                asked = wanted(claim, context)
                text = wording(claim, rng, split)
                chosen.append(LabelledCriterion(claim, text, known, words, asked))
    return tuple(chosen)


def _contrast(rng: np.random.Generator, base: Scene, split: Split) -> tuple[Scene, Scene]:
    """The picture of a caption and the same one with a single thing amiss, in random order."""
    other = None
    while other is None:
        change = CONTENT_CHANGES[int(rng.choice(len(CONTENT_CHANGES), p=CONTRASTS))]
        other = change(rng, base, split)
    return (base, other) if rng.random() < 0.5 else (other, base)


def sample_pair(
    rng: np.random.Generator,
    split: Split,
    limit: int,
    weights: dict[str, float] | None = None,
    contrasts: float = 0.0,
) -> Example:
    """Two pictures for one caption, in random order.

    Args:
        rng: Source of chance.
        split: Of scenes and phrasings.
        limit: How many criteria at most.
        weights: Relative frequency of the kinds of criteria.
        contrasts: Share of pairs that are the captioned scene and the same with one change.
    """
    base = sample_scene(rng, split)
    is_contrast = contrasts > 0 and rng.random() < contrasts
    caption = describe(rng, base, full=0.5 if is_contrast else 0.0)
    if is_contrast:
        scenes = _contrast(rng, base, split)
    else:
        scenes = (_picture(rng, base, split), _picture(rng, base, split))
    context = Context(caption=caption)
    criteria = choose_criteria(rng, scenes, context, split, limit, weights or {})
    return Example(caption.text(rng), context, scenes, criteria)


def sample_faulty_pair(rng: np.random.Generator, split: Split) -> Example:
    """Two pictures of one caption, each with faults of its own, so that qualities conflict."""
    base = sample_scene(rng, split)
    caption = describe(rng, base)
    scenes = (_with_faults(rng, base, split), _with_faults(rng, base, split))
    return Example(caption.text(rng), Context(caption=caption), scenes, ())


def _with_faults(rng: np.random.Generator, scene: Scene, split: Split) -> Scene:
    """The scene after 0 to 2 changes of content and 0 to 2 of quality."""
    out = scene
    for changes, odds in ((CONTENT_CHANGES, (0.3, 0.4, 0.3)), (QUALITY_CHANGES, (0.3, 0.5, 0.2))):
        for _ in range(int(rng.choice(3, p=odds))):
            out = changes[int(rng.integers(len(changes)))](rng, out, split) or out
    return out


def _attempt(rng: np.random.Generator, source: Scene, edit: Edit, split: Split) -> Scene:
    """What an editor might return: the edit, the edit and more, something else, or nothing."""
    out = edit.apply(source) if rng.random() < 0.6 else source
    if rng.random() < 0.45:
        side = (_recolour, _reshape, _remove, _add, _repaint_background)
        change = side[int(rng.integers(len(side)))]
        out = change(rng, out, split) or out
    if rng.random() < 0.2:
        quality = (_blur, _grain)[int(rng.integers(2))]
        out = quality(rng, out, split) or out
    return out


def sample_edit_pair(
    rng: np.random.Generator, split: Split, limit: int, weights: dict[str, float] | None = None
) -> Example:
    """Two edits of one source picture by one instruction, in random order."""
    edit = None
    while edit is None:
        source = sample_scene(rng, split)
        edit = sample_edit(rng, source, split)
    scenes = (_attempt(rng, source, edit, split), _attempt(rng, source, edit, split))
    context = Context(source=source, edit=edit)
    boost = {"edit_done": 50.0, "edit_kept": 50.0, "edit_overall": 3.0}
    criteria = choose_criteria(rng, scenes, context, split, limit, {**(weights or {}), **boost})
    return Example(edit.text(rng, source), context, scenes, criteria)


def single_picture(example: Example, which: int) -> Example:
    """The pointwise example of one picture of a pair, with the pair's criteria."""
    criteria = tuple(
        replace(c, truths=(c.truths[which],), evidence=c.evidence[which : which + 1])
        for c in example.criteria
    )
    return replace(example, scenes=(example.scenes[which],), criteria=criteria)
