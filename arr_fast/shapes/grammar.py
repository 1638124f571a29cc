"""The wording of criteria: for every kind of claim the phrasings of training and the held-out ones.

Phrasings are absolute ("The image shows a red circle."), never comparative: two images are compared
by asking which of them meets the criterion.
"""

from __future__ import annotations

import numpy as np

from arr_fast.shapes.captions import NUMBERS, PLURALS, RELATION_WORDS, article
from arr_fast.shapes.claims import Claim
from arr_fast.shapes.scene import Split

PICTURE_WORDS = ("image", "picture", "scene")

# {o} the object, {a} the object with its article, {p} its plural, {v} the value, {i} image,
# {r} a relation phrase, {q} the second object, {n} a number word. The last two of every kind are
# held out: no training text uses them.
PHRASINGS: dict[str, tuple[str, ...]] = {
    "presence": (
        "The {i} shows {a}.",
        "There is {a} in the {i}.",
        "There is {a}.",
        "{A} is visible.",
        "{A} is present in the {i}.",
        "The {i} contains {a}.",
        "{A} appears in the {i}.",
        "{A} can be seen.",
        "The {i} has {a} in it.",
        "{A} can be seen in the {i}.",
        "{A} is visible in the {i}.",
    ),
    "absence": (
        "There is no {o}.",
        "There is no {o} in the {i}.",
        "The {i} shows no {o}.",
        "No {o} is visible.",
        "The {i} does not contain {a}.",
        "No {o} appears in the {i}.",
        "The {i} has no {o}.",
        "The {i} contains no {o}.",
        "No {o} is present in the {i}.",
    ),
    "colour": (
        "The {o} is {v}.",
        "The {o} in the {i} is {v}.",
        "The colour of the {o} is {v}.",
        "The {o} has the colour {v}.",
        "The {o} is {v} in colour.",
        "The {o} is shown in {v}.",
        "The color of the {o} is {v}.",
        "The {o} shown is {v}.",
        "The colour of the {o} in the {i} is {v}.",
    ),
    "size": (
        "The {o} is {v}.",
        "The {o} in the {i} is {v}.",
        "The size of the {o} is {v}.",
        "The {o} is {v} in size.",
        "The {o} has a {v} size.",
        "The {o} is shown {v}.",
        "The {o} shown is {v}.",
        "The size of the {o} in the {i} is {v}.",
    ),
    "count": (
        "There are {n} {p}.",
        "The {i} shows {n} {p}.",
        "There are {n} {p} in the {i}.",
        "The {i} contains {n} {p}.",
        "The number of {p} is {n}.",
        "Exactly {n} {p} are visible.",
        "The {i} has {n} {p}.",
        "There are exactly {n} {p}.",
        "Exactly {n} {p} can be seen.",
        "The {i} contains exactly {n} {p}.",
    ),
    "relation": (
        "The {o} is {r} the {q}.",
        "The {o} lies {r} the {q}.",
        "In the {i}, the {o} is {r} the {q}.",
        "The {o} is placed {r} the {q}.",
        "The {o} appears {r} the {q}.",
        "The {o} stands {r} the {q}.",
        "In the {i}, the {o} lies {r} the {q}.",
        "The {o} can be seen {r} the {q}.",
    ),
    "position": (
        "The {o} is in the {v} half of the {i}.",
        "The {o} lies in the {v} half.",
        "The {o} is on the {v} side of the {i}.",
        "The {o} is placed in the {v} half of the {i}.",
        "The {o} appears in the {v} half.",
        "The {o} is in the {v} half.",
        "The {o} is placed on the {v} side.",
        "The {o} lies on the {v} side of the {i}.",
    ),
    "background": (
        "The background is {v}.",
        "The {i} has a {v} background.",
        "The background of the {i} is {v}.",
        "The background colour is {v}.",
        "The colour of the background is {v}.",
        "The objects are on a {v} background.",
        "There is a {v} background.",
        "The {i} shows a {v} background.",
        "The background shown is {v}.",
    ),
    "sharpness": (
        "The {i} is sharp.",
        "The {i} is not blurry.",
        "The objects have sharp edges.",
        "The edges are sharp.",
        "There is no blur.",
        "The {i} is in focus.",
        "The {i} has no blur.",
        "All edges are sharp.",
        "There is no blur in the {i}.",
    ),
    "noise": (
        "The {i} is free of noise.",
        "The {i} is clean.",
        "There is no noise.",
        "The {i} is not noisy.",
        "The {i} has no noise.",
        "There is no grain in the {i}.",
        "The {i} has no grain.",
        "There is no noise in the {i}.",
        "The {i} is free of grain.",
    ),
    "occlusion": (
        "No object is covered.",
        "No object is hidden behind a bar.",
        "There is no bar in the {i}.",
        "No bar covers an object.",
        "The objects are not covered.",
        "The {i} shows no bar.",
        "Nothing covers the objects.",
        "No object is covered by a bar.",
        "The objects are not hidden behind a bar.",
    ),
    "cut_off": (
        "No object is cut off.",
        "Every object is fully inside the frame.",
        "All objects are inside the frame.",
        "No object is cut off by the edge of the {i}.",
        "The objects are not cut off.",
        "All objects are fully inside the {i}.",
        "No object touches or crosses the frame.",
        "Every object is inside the frame.",
        "No object is cut off by the frame.",
    ),
    "caption_objects": (
        "Every object in the caption is present.",
        "The {i} shows every object in the caption.",
        "All objects of the caption are present.",
        "All objects named in the caption are visible.",
        "No object of the caption is missing.",
        "Every object of the caption is in the {i}.",
        "The {i} shows all objects named in the caption.",
        "The {i} has all objects of the caption in it.",
        "The {i} contains every object in the caption.",
        "All objects in the caption can be seen.",
        "The {i} contains what the caption names.",
        "Every object named in the caption appears.",
        "The {i} contains all objects of the caption.",
        "No object named in the caption is missing.",
    ),
    "caption_colours": (
        "Colours match the caption.",
        "The colours match the caption.",
        "Every object has the colour that the caption says.",
        "The colours of the objects match the caption.",
        "All colours are as in the caption.",
        "The colors match the caption.",
        "Every object has the right colour.",
        "All colours match the caption.",
        "The colours of the objects are as in the caption.",
    ),
    "caption_count": (
        "The number of objects matches the caption.",
        "The {i} has as many objects as the caption.",
        "There are as many objects as the caption says.",
        "The count of objects matches the caption.",
        "The number of objects is as in the caption.",
        "The number of objects is right.",
        "The {i} shows as many objects as the caption says.",
        "The count of objects is as in the caption.",
    ),
    "caption_relation": (
        "The objects are placed as the caption says.",
        "The positions match the caption.",
        "The objects are arranged as in the caption.",
        "The arrangement of the objects matches the caption.",
        "The spatial relation matches the caption.",
        "The layout matches the caption.",
        "The positions of the objects match the caption.",
        "The arrangement of the objects is as in the caption.",
    ),
    "caption_background": (
        "The background matches the caption.",
        "The background is as the caption says.",
        "The background colour matches the caption.",
        "The {i} has the background of the caption.",
        "The background is as in the caption.",
        "The background has the right colour.",
        "The background colour is as in the caption.",
        "The colour of the background matches the caption.",
    ),
    "caption_extra": (
        "There are no extra objects.",
        "The {i} shows no extra objects.",
        "No object is added to the caption.",
        "There is no object that the caption does not name.",
        "The {i} shows nothing that the caption does not name.",
        "There are no objects beyond the caption.",
        "There is no extra object.",
        "No extra object is visible.",
        "The {i} shows no object beyond the caption.",
        "The {i} contains no objects that are not in the caption.",
        "The {i} contains nothing beyond the caption.",
        "The {i} has no extra objects.",
        "The {i} contains no extra object.",
        "The {i} shows no object that the caption does not name.",
    ),
    "faithful": (
        "The {i} matches the caption.",
        "The {i} shows what the caption says.",
        "The {i} follows the caption.",
        "The caption describes the {i}.",
        "The {i} is faithful to the caption.",
        "The {i} is as the caption says.",
        "The {i} fits the caption.",
        "Everything in the {i} matches the caption.",
        "The {i} follows what the caption says.",
    ),
    "overall": (
        "The image is overall the better one for the caption.",
        "The {i} is overall the better one for the caption.",
        "The {i} is the better one for the caption.",
        "The {i} is overall better for the caption.",
        "The {i} is better for the caption.",
        "The {i} is the better {i} for the caption.",
        "The {i} is better overall for the caption.",
        "The {i} follows the caption better.",
    ),
    "edit_done": (
        "The instruction was carried out.",
        "The edit was made as asked.",
        "The {i} shows the change that was asked for.",
        "The instruction was followed.",
        "The asked change was made.",
        "The {i} follows the instruction.",
        "The edit follows the instruction.",
        "The change was carried out as asked.",
        "The {i} shows the asked change.",
    ),
    "edit_kept": (
        "Everything else is unchanged.",
        "The rest of the {i} is unchanged.",
        "Nothing else was changed.",
        "All other objects stay as they were.",
        "Only what was asked for was changed.",
        "Nothing but the asked change was made.",
        "The other objects and the background are kept.",
        "The rest of the {i} is kept.",
        "Everything else stays as it was.",
    ),
    "edit_overall": (
        "The image is overall the better edit for the instruction.",
        "The {i} is overall the better edit for the instruction.",
        "The {i} is the better edit for the instruction.",
        "The {i} is overall better for the instruction.",
        "The {i} is the better edit.",
        "The {i} follows the instruction better.",
        "The {i} is overall the better edit.",
        "The {i} is the better one for the instruction.",
    ),
}
HELD_OUT_PHRASINGS = 2

CLAIM_WORDS = {"left": "left", "right": "right", "top": "top", "bottom": "bottom"}


def phrasings(kind: str, split: Split) -> tuple[str, ...]:
    """The phrasings of a kind that belong to a split; the two splits share none."""
    every = PHRASINGS[kind]
    return every[:-HELD_OUT_PHRASINGS] if split == "train" else every[-HELD_OUT_PHRASINGS:]


def object_words(kind: tuple[str, str]) -> str:
    """(colour, shape) as words; an empty shape is an "object"."""
    colour, shape = kind
    return f"{colour} {shape or 'object'}".strip()


def object_plural(kind: tuple[str, str]) -> str:
    """(colour, shape) as words in the plural."""
    colour, shape = kind
    return f"{colour} {PLURALS[shape or 'object']}".strip()


def wording(claim: Claim, rng: np.random.Generator, split: Split) -> str:
    """A claim as a criterion's text, in a phrasing of the split."""
    options = phrasings(claim.kind, split)
    form = options[int(rng.integers(len(options)))]
    picture = PICTURE_WORDS[int(rng.choice(3, p=[0.6, 0.25, 0.15]))]
    way = int(rng.integers(len(RELATION_WORDS[claim.value]))) if claim.kind == "relation" else 0
    return _filled(form, claim, picture, way)


def plain_wording(claim: Claim) -> str:
    """A claim as a criterion's text, always in the same words."""
    return _filled(PHRASINGS[claim.kind][0], claim, PICTURE_WORDS[0], 0)


def _filled(form: str, claim: Claim, picture: str, way: int) -> str:
    words = object_words(claim.first)
    values = {
        "o": words,
        "a": article(words),
        "A": article(words).capitalize(),
        "p": object_plural(claim.first),
        "v": claim.value,
        "i": picture,
    }
    if claim.kind == "relation":
        values["r"] = RELATION_WORDS[claim.value][way]
        values["q"] = object_words(claim.second)
    if claim.kind == "count":
        number = int(claim.value)
        values["n"] = NUMBERS[number]
        if number == 1:
            form = form.replace("There are", "There is").replace("are visible", "is visible")
            values["p"] = words
    for key, value in values.items():
        form = form.replace("{" + key + "}", value)
    return form
