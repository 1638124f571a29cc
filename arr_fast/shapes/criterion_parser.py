"""From a criterion's text back to its claim: the inverse of grammar.py, for checking what a writer
wrote. A text that is in no phrasing of the grammar has no claim."""

from __future__ import annotations

import re
from functools import lru_cache

from arr_fast.shapes.captions import NUMBERS, PLURALS, RELATION_WORDS
from arr_fast.shapes.claims import Claim
from arr_fast.shapes.grammar import CLAIM_WORDS, PHRASINGS, PICTURE_WORDS
from arr_fast.shapes.scene import BACKGROUNDS, COLOURS, RADII, SHAPES

_OBJECT = rf"(?:({'|'.join(COLOURS)}) )?({'|'.join((*SHAPES, 'object'))})"
_PLURAL = rf"(?:({'|'.join(COLOURS)}) )?({'|'.join(PLURALS.values())}|{'|'.join(PLURALS)})"
_SINGULAR = {plural: shape for shape, plural in PLURALS.items()}
_RELATIONS = {words: name for name, ways in RELATION_WORDS.items() for words in ways}
_VALUES = {
    "colour": tuple(COLOURS),
    "size": tuple(RADII),
    "position": tuple(CLAIM_WORDS.values()),
    "background": tuple(BACKGROUNDS),
}


@lru_cache(maxsize=65536)
def parse_criterion(text: str) -> Claim | None:
    """Returns the claim of a text, or None if the grammar does not write it."""
    for kind, slots, pattern in _patterns():
        match = pattern.fullmatch(text.strip())
        if match is not None:
            return _claim(kind, slots, match)
    return None


@lru_cache(maxsize=1)
def _patterns() -> list[tuple[str, tuple[str, ...], re.Pattern[str]]]:
    found = []
    for kind, forms in PHRASINGS.items():
        for form in forms:
            for variant in _variants(kind, form):
                slots, expression = _expression(kind, variant)
                found.append((kind, slots, re.compile(expression, re.IGNORECASE)))
    return found


def _variants(kind: str, form: str) -> list[str]:
    if kind != "count":
        return [form]
    single = form.replace("There are", "There is").replace("are visible", "is visible")
    return list(dict.fromkeys([form, single]))


def _expression(kind: str, form: str) -> tuple[tuple[str, ...], str]:
    """(names of the slots in order, a regular expression)."""
    slots: list[str] = []
    expression = ""
    for piece in re.split(r"(\{\w\})", form):
        slot = piece[1] if re.fullmatch(r"\{\w\}", piece) else ""
        if not slot:
            expression += re.escape(piece)
        elif slot == "i":
            expression += f"(?:{'|'.join(PICTURE_WORDS)})"
        else:
            slots.append(slot.lower())
            expression += _slot(kind, slot.lower())
    return tuple(slots), expression


def _slot(kind: str, slot: str) -> str:
    if slot in "oaq":
        return ("an? " if slot == "a" else "") + _OBJECT
    if slot == "p":
        return _PLURAL
    if slot == "n":
        return f"({'|'.join(NUMBERS)})"
    if slot == "r":
        return f"({'|'.join(sorted(_RELATIONS, key=len, reverse=True))})"
    return f"({'|'.join(_VALUES[kind])})"


def _claim(kind: str, slots: tuple[str, ...], match: re.Match[str]) -> Claim:
    groups = [(group or "").lower() for group in match.groups()]
    first = second = ("", "")
    value = ""
    at = 0
    for slot in slots:
        if slot in "oaqp":
            shape = _SINGULAR.get(groups[at + 1], groups[at + 1])
            named = (groups[at], "" if shape == "object" else shape)
            if slot == "q":
                second = named
            else:
                first = named
            at += 2
        else:
            word = groups[at]
            at += 1
            value = {"n": lambda w: str(NUMBERS.index(w)), "r": _RELATIONS.__getitem__}.get(
                slot, str
            )(word)
    return Claim(kind, first, second, value)
