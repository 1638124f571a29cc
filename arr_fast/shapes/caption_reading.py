"""Reads captions and edit instructions of the domain back into data."""

from __future__ import annotations

import re

from arr_fast.shapes.captions import (
    NUMBERS,
    PLURALS,
    RELATION_WORDS,
    Caption,
    Edit,
    EditKind,
    Relation,
)
from arr_fast.shapes.scene import BACKGROUNDS, COLOURS, RADII, SHAPES, Scene, SceneObject

_LEAD = r"(?:(?:an image of|a picture of|a scene with) )?"
_BACKGROUND = re.compile(rf" (?:on|against) a ({'|'.join(BACKGROUNDS)}) background$")
_COUNT = rf"(a|an|{'|'.join(NUMBERS[1:])})"
_NOUNS = {word: shape for shape in SHAPES for word in (shape, PLURALS[shape])}
_OBJECT = re.compile(
    rf"{_COUNT} (?:({'|'.join(RADII)}) )?({'|'.join(COLOURS)}) ({'|'.join(_NOUNS)})$"
)
_RELATIONS: dict[str, Relation] = {
    words: relation  # type: ignore[misc]
    for relation, ways in RELATION_WORDS.items()
    for words in ways
}
# "to the left of" before "left of": the longer phrase holds the shorter one.
_RELATION = re.compile(rf"^(.*?) ({'|'.join(sorted(_RELATIONS, key=len, reverse=True))}) (.*)$")
_KIND = rf"({'|'.join(COLOURS)}) ({'|'.join(SHAPES)})"
_VALUE = r"([a-z]+)"
_INSTRUCTIONS: tuple[tuple[EditKind, re.Pattern[str]], ...] = (
    ("background", re.compile(rf"^Make the background {_VALUE}\.$")),
    ("background", re.compile(rf"^Change the background to {_VALUE}\.$")),
    ("add", re.compile(rf"^Add an? {_KIND}\.$")),
    ("add", re.compile(rf"^Put an? {_KIND} into the image\.$")),
    ("remove", re.compile(rf"^Remove the {_KIND}\.$")),
    ("remove", re.compile(rf"^Take the {_KIND} away\.$")),
    ("recolour", re.compile(rf"^Change the colour of the {_KIND} to {_VALUE}\.$")),
    ("resize", re.compile(rf"^Change the size of the {_KIND} to {_VALUE}\.$")),
    ("reshape", re.compile(rf"^Turn the {_KIND} into an? [a-z]+ {_VALUE}\.$")),
    ("reshape", re.compile(rf"^Replace the {_KIND} with an? [a-z]+ {_VALUE}\.$")),
    ("recolour", re.compile(rf"^Make the {_KIND} ({'|'.join(COLOURS)})\.$")),
    ("resize", re.compile(rf"^Make the {_KIND} ({'|'.join(RADII)})\.$")),
)


def read_caption(text: str) -> Caption:
    """The inverse of `Caption.text`; objects come in the order of the text.

    Raises:
        ValueError: The text is no caption of the domain.
    """
    rest = re.sub(rf"^{_LEAD}", "", text.strip().removesuffix("."))
    found = _BACKGROUND.search(rest)
    background = found.group(1) if found else None
    if found:
        rest = rest[: found.start()]
    kinds: list[tuple[str, str]] = []
    sizes: list[str] = []
    relation: tuple[int, Relation, int] | None = None
    for phrase in re.split(r", | and ", rest):
        related = _RELATION.match(phrase)
        parts = [related.group(1), related.group(3)] if related else [phrase]
        if related:
            relation = (len(kinds), _RELATIONS[related.group(2)], len(kinds) + 1)
        for part in parts:
            match = _OBJECT.match(part)
            if match is None:
                raise ValueError(f"{text!r} is no caption of the domain: {part!r} is no object")
            count = NUMBERS.index(match.group(1)) if match.group(1) in NUMBERS else 1
            kinds += [(match.group(3), _NOUNS[match.group(4)])] * count
            sizes += [match.group(2)] * count if match.group(2) else []
    if sizes and len(sizes) != len(kinds):
        raise ValueError(f"{text!r} names the size of some objects only")
    return Caption(tuple(kinds), tuple(sizes) or None, relation, background)


def read_instruction(text: str, source: Scene) -> Edit:
    """The inverse of `Edit.text` on a source scene.

    An object to add has the kind that the text names and the centre of the picture as its place,
    since instructions do not say where.

    Raises:
        ValueError: The text is no instruction of the domain, or names no single object of the
            source.
    """
    for kind, pattern in _INSTRUCTIONS:
        match = pattern.match(text.strip())
        if match is None:
            continue
        words = match.groups()
        if kind == "background":
            return Edit(kind, -1, words[0])
        if kind == "add":
            added = SceneObject(words[1], words[0], "large", 0.5, 0.5, RADII["large"])
            return Edit(kind, -1, added=added)
        targets = [i for i, o in enumerate(source.objects) if o.kind == (words[0], words[1])]
        if len(targets) != 1:
            raise ValueError(f"{text!r}: the source shows {len(targets)} {words[0]} {words[1]}s")
        return Edit(kind, targets[0], words[2] if len(words) > 2 else "")
    raise ValueError(f"{text!r} is no instruction of the domain")
