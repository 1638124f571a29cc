"""Captions and editing instructions as data, and what they ask of a scene."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from arr_fast.shapes.scene import (
    COLOURS,
    HELD_OUT_COMBINATIONS,
    RADII,
    SHAPES,
    Scene,
    SceneObject,
    Split,
    make_object,
    sample_background,
    sample_kind,
    with_object,
)

Relation = Literal["left", "right", "above", "below"]
RELATIONS: tuple[Relation, ...] = ("left", "right", "above", "below")
RELATION_WORDS: dict[str, tuple[str, ...]] = {
    "left": ("left of", "to the left of"),
    "right": ("right of", "to the right of"),
    "above": ("above",),
    "below": ("below",),
}
NUMBERS = ("zero", "one", "two", "three", "four", "five")
PLURALS = {s: s + ("es" if s == "cross" else "s") for s in (*SHAPES, "object")}

# A relation is true from this distance of the centres on, and false from CLEAR_FALSE on the other
# side; in between it is ambiguous and never asked about.
CLEAR_TRUE = 0.2
CLEAR_FALSE = 0.08


def article(phrase: str) -> str:
    """The phrase with "a" or "an" before it."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def name(kind: tuple[str, str]) -> str:
    """(colour, shape) as words."""
    return f"{kind[0]} {kind[1]}"


def relation_holds(first: SceneObject, relation: Relation, second: SceneObject) -> bool | None:
    """Whether one object stands in a relation to another; None where it is ambiguous."""
    dx, dy = second.x - first.x, second.y - first.y
    ahead = {"left": dx, "right": -dx, "above": dy, "below": -dy}[relation]
    if ahead >= CLEAR_TRUE:
        return True
    return False if ahead <= -CLEAR_FALSE else None


@dataclass(frozen=True, slots=True)
class Caption:
    """What a caption names.

    Attributes:
        kinds: (colour, shape) of every object that the scene shall have.
        sizes: The size word of each object, or None for all when sizes are not named.
        relation: (index, relation, index) over `kinds`, or None.
        background: The named background, or None.
    """

    kinds: tuple[tuple[str, str], ...]
    sizes: tuple[str, ...] | None = None
    relation: tuple[int, Relation, int] | None = None
    background: str | None = None

    def counts(self) -> Counter[tuple[str, str]]:
        """How often each (colour, shape) is asked for."""
        return Counter(self.kinds)

    def text(self, rng: np.random.Generator) -> str:
        """The caption in words, in one of several phrasings."""
        groups: dict[tuple[str, ...], int] = {}
        for i, kind in enumerate(self.kinds):
            key: tuple[str, ...] = (self.sizes[i], *kind) if self.sizes else kind
            groups[key] = groups.get(key, 0) + 1
        phrases = []
        for key, count in groups.items():
            words = " ".join(key)
            if count == 1:
                phrases.append(article(words))
            else:
                stem = " ".join(key[:-1])
                phrases.append(f"{NUMBERS[count]} {stem} {PLURALS[key[-1]]}")
        if self.relation is not None:
            i, rel, j = self.relation
            label = [
                " ".join((self.sizes[k], *self.kinds[k])) if self.sizes else name(self.kinds[k])
                for k in (i, j)
            ]
            words = RELATION_WORDS[rel][int(rng.integers(len(RELATION_WORDS[rel])))]
            rest = [p for p in phrases if p not in (article(label[0]), article(label[1]))]
            phrases = [f"{article(label[0])} {words} {article(label[1])}", *rest]
        text = phrases[0] if len(phrases) == 1 else ", ".join(phrases[:-1]) + " and " + phrases[-1]
        if self.background is not None:
            joint = (" on a {} background", " against a {} background")[int(rng.integers(2))]
            text += joint.format(self.background)
        lead = ("", "an image of ", "a picture of ", "a scene with ")[int(rng.integers(4))]
        text = lead + text
        return text + "." if rng.random() < 0.3 else text


def describe(rng: np.random.Generator, scene: Scene, full: float = 0.0) -> Caption:
    """A caption that a scene satisfies.

    Args:
        rng: Source of chance.
        scene: What it describes.
        full: Chance that relation and background are named for certain, where they can be.
    """
    certain = full > 0 and rng.random() < full
    order = rng.permutation(len(scene.objects))
    objects = [scene.objects[int(i)] for i in order]
    kinds = tuple(o.kind for o in objects)
    relation: tuple[int, Relation, int] | None = None
    counts = Counter(kinds)
    single = [i for i, k in enumerate(kinds) if counts[k] == 1]
    if len(single) >= 2 and (rng.random() < 0.6 or certain):
        i, j = single[0], single[1]
        true = [r for r in RELATIONS if relation_holds(objects[i], r, objects[j])]
        if true:
            relation = (i, true[int(rng.integers(len(true)))], j)
    sizes = tuple(o.size for o in objects) if rng.random() < 0.4 else None
    background = scene.background if rng.random() < 0.5 or certain else None
    return Caption(kinds, sizes, relation, background)


EditKind = Literal["recolour", "reshape", "resize", "remove", "add", "background"]


@dataclass(frozen=True, slots=True)
class Edit:
    """An instruction: change one thing of a source scene.

    Attributes:
        kind: What is done.
        target: Index of the object in the source, or -1 where none is named.
        value: The new colour, shape, size or background; for "add" unused.
        added: The object that "add" puts in.
    """

    kind: EditKind
    target: int
    value: str = ""
    added: SceneObject | None = None

    def apply(self, scene: Scene) -> Scene:
        """The source after exactly this edit."""
        if self.kind == "background":
            return replace(scene, background=self.value)
        if self.kind == "add":
            assert self.added is not None
            return replace(scene, objects=(*scene.objects, self.added))
        if self.kind == "remove":
            kept = tuple(o for i, o in enumerate(scene.objects) if i != self.target)
            return replace(scene, objects=kept)
        field = {"recolour": "colour", "reshape": "shape", "resize": "size"}[self.kind]
        changes: dict[str, object] = {field: self.value}
        if self.kind == "resize":
            old = scene.objects[self.target]
            changes["radius"] = old.radius * RADII[self.value] / RADII[old.size]
        return with_object(scene, self.target, **changes)

    def text(self, rng: np.random.Generator, source: Scene) -> str:
        """The instruction in words, in one of several phrasings."""
        if self.kind == "background":
            forms = ["Make the background {v}.", "Change the background to {v}."]
            return forms[int(rng.integers(2))].format(v=self.value)
        if self.kind == "add":
            assert self.added is not None
            forms = ["Add {o}.", "Put {o} into the image."]
            return forms[int(rng.integers(2))].format(o=article(name(self.added.kind)))
        words = name(source.objects[self.target].kind)
        forms = {
            "recolour": ["Make the {o} {v}.", "Change the colour of the {o} to {v}."],
            "reshape": ["Turn the {o} into {a}.", "Replace the {o} with {a}."],
            "resize": ["Make the {o} {v}.", "Change the size of the {o} to {v}."],
            "remove": ["Remove the {o}.", "Take the {o} away."],
        }[self.kind]
        new = article(f"{source.objects[self.target].colour} {self.value}")
        return forms[int(rng.integers(2))].format(o=words, v=self.value, a=new)


def _other(rng: np.random.Generator, values: list[str], old: str) -> str:
    rest = [v for v in values if v != old]
    return rest[int(rng.integers(len(rest)))]


def sample_edit(rng: np.random.Generator, source: Scene, split: Split) -> Edit | None:
    """An instruction that names its target without ambiguity, or None when the draw fails."""
    counts = source.kinds()
    targets = [i for i, o in enumerate(source.objects) if counts[o.kind] == 1]
    kinds: list[EditKind] = ["background", "add"]
    if targets:
        kinds = ["recolour", "reshape", "resize", "remove", "background", "add", "recolour"]
    kind = kinds[int(rng.integers(len(kinds)))]
    if kind == "background":
        return Edit(kind, -1, sample_background(rng, source.background))
    if kind == "add":
        made = make_object(rng, sample_kind(rng, split), source.objects)
        return None if made is None else Edit(kind, -1, added=made)
    target = targets[int(rng.integers(len(targets)))]
    obj = source.objects[target]
    if kind == "remove":
        return Edit(kind, target)
    if kind == "resize":
        return Edit(kind, target, "small") if obj.size == "large" else None
    value = (
        _other(rng, list(COLOURS), obj.colour)
        if kind == "recolour"
        else _other(rng, list(SHAPES), obj.shape)
    )
    new = (value, obj.shape) if kind == "recolour" else (obj.colour, value)
    if split == "train" and new in HELD_OUT_COMBINATIONS:
        return None
    return Edit(kind, target, value)
