"""What the words of a criterion give away: comparisons, things of one caption, nothing checkable.

A general criterion names nothing of one caption: no content word of the caption occurs in it. Words
that any criterion may use (image, background, colour, ...) are no content words.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache

from arr_fast.rubric import Rubric

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)?")
_COMPARISON = re.compile(
    r"\b(?:image|picture|photo|edit|option|candidate|output|version)s?\s*(?:[12ab]\b|one\b|two\b)"
    r"|\b(?:first|second|other|former|latter|preferred|dispreferred|rejected|winning|losing)\s+"
    r"(?:image|picture|photo|edit|one|option|version|output)\b"
    r"|\bboth\s+(?:images|pictures|photos|edits)\b"
    r"|\b(?:better|worse|more|less|fewer|\w{3,}er)\b(?:\s+\w+){0,4}?\s+than\s+"
    r"(?:in\s+)?(?:the\s+)?(?:other|image|picture|alternative|competing)"
    r"|\bcompared\s+(?:to|with)\s+the\s+other\b",
    re.IGNORECASE,
)


def _word_set(text: str) -> frozenset[str]:
    return frozenset(text.split())


_STOP = _word_set(
    "a an and any are as at be been being but by can could do does each either every few for from "
    "had has have he her his i if in into is it its just many may might most much must neither no "
    "none nor not of off on only onto or our out over own per same she should so some such than "
    "that the their them then there these they this those through to too under up upon very was we "
    "were what when where whether which while who whom whose why will with within without would "
    "you your all also both other others another between among about above below near next beside "
    "behind front left right top bottom side using use used make makes made put add change remove "
    "replace turn take"
)
# What criteria of any caption talk about.
_GENERAL = _word_set(
    "image images picture pictures photo photos photograph scene scenes frame caption captions "
    "prompt prompts instruction instructions source edit edits edited object objects thing things "
    "element elements subject subjects item items detail details colour colours color colors "
    "coloured colored background foreground shape shapes size sizes number numbers count counts "
    "position positions place placed placement arrangement layout composition relation relations "
    "style light lighting shadow shadows texture edge edges sharp clear clean blur blurry noise "
    "quality realistic natural image's caption's described shown shows show visible present named "
    "mentioned stated requested asked view area part parts text"
)
# A criterion that names a colour is about one picture, whatever its caption says.
_COLOURS = _word_set(
    "red green blue yellow purple orange white black gray grey beige navy brown pink teal cyan "
    "magenta violet turquoise golden silver scarlet crimson maroon olive"
)
_EMPTY_PRAISE = _word_set(
    "good great nice best better beautiful pretty appealing pleasing attractive excellent amazing "
    "perfect fine well looks look looking overall high level general generally quality image "
    "picture photo edit output result overall preferred prefer like likeable impressive wonderful "
    "aesthetic aesthetically interesting feels feel more it one is"
)


def compares(text: str) -> bool:
    """Whether a criterion compares images, where it should be checkable on one."""
    return _COMPARISON.search(text) is not None


def named_words(text: str, caption: str) -> set[str]:
    """Content words of a caption that occur in a criterion; "{caption}" is no word of it."""
    return set(_content(text.replace("{caption}", " ")) & _content(caption))


def is_general(text: str, caption: str) -> bool:
    """Whether a criterion names nothing of a caption, and no colour."""
    return not (named_words(text, caption) or _COLOURS & _words(text))


def is_checkable(text: str) -> bool:
    """Whether a criterion names any property, beyond praise and words that mean anything."""
    return bool(_words(text) - _STOP - _EMPTY_PRAISE)


@dataclass(slots=True)
class Sorted:
    """Criteria of one answer by kind.

    Attributes:
        general: They fit any caption.
        specific: They name something of this one.
        refused: (text, why) of what can be no criterion.
    """

    general: list[str] = field(default_factory=list)
    specific: list[str] = field(default_factory=list)
    refused: list[tuple[str, str]] = field(default_factory=list)


def sort_criteria(texts: Iterable[str], caption: str) -> Sorted:
    """Parts general from prompt-specific criteria, and refuses what is neither."""
    found = Sorted()
    for text in texts:
        if compares(text):
            found.refused.append((text, "compares images"))
        elif not is_checkable(text):
            found.refused.append((text, "names no checkable property"))
        elif is_general(text, caption):
            found.general.append(text)
        else:
            found.specific.append(text)
    return found


def rubric_warnings(rubric: Rubric) -> list[str]:
    """What a reader of a rubric should know: criteria that compare, or name nothing checkable."""
    warnings = []
    vague = []
    for criterion in rubric.criteria:
        whole = " ".join([criterion.text, *criterion.tips])
        if compares(whole):
            warnings.append(f"{criterion.id}: compares images; one image must be enough to check")
        if not is_checkable(whole):
            vague.append(criterion.id)
    if len(vague) == len(rubric):
        warnings.append("no criterion names a checkable property")
    else:
        warnings += [f"{name}: names no checkable property" for name in vague]
    return warnings


@lru_cache(maxsize=65536)
def _content(text: str) -> frozenset[str]:
    words = _words(text) - _STOP - _GENERAL
    return frozenset(_stem(word) for word in words if len(word) > 1)


def _words(text: str) -> set[str]:
    return {word.casefold() for word in _WORD.findall(text)}


def _stem(word: str) -> str:
    """Plural and singular as one; English alone, others stay as they are."""
    if word.endswith(("sses", "shes", "ches", "xes")):
        return word[:-2]
    if word.endswith("s") and not word.endswith("ss") and len(word) > 3:
        return word[:-1]
    return word
