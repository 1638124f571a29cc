"""Writing criteria: the prompts that the bundled judge is trained to answer, and the answers.

Two kinds of criteria, as everywhere in this project: general ones name nothing of one caption
("The colours match the caption."), specific ones do ("There is a red circle."). What is written is
true of the preferred picture, and what decides the pair comes first.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

import numpy as np

from arr_fast.prompts import Part, Task, pair_parts
from arr_fast.shapes.captions import Caption
from arr_fast.shapes.claims import Claim
from arr_fast.shapes.grammar import wording
from arr_fast.shapes.pairs import Example, candidate_claims
from arr_fast.shapes.scene import Split

GENERAL_KINDS = (
    "caption_objects",
    "caption_colours",
    "caption_relation",
    "caption_count",
    "caption_background",
    "caption_extra",
    "faithful",
    "edit_done",
    "edit_kept",
    "sharpness",
    "noise",
    "occlusion",
    "cut_off",
)
# What a writer is told to look at, a word for each general kind of a task. The bundled judge finds
# out at these words what holds on which picture, before it writes.
ASPECTS: dict[Task, dict[str, str]] = {
    "t2i": {
        "caption_objects": "objects",
        "caption_colours": "colours",
        "caption_relation": "relation",
        "caption_count": "number",
        "caption_background": "background",
        "caption_extra": "extra",
        "faithful": "faithful",
        "sharpness": "sharp",
        "noise": "grain",
        "occlusion": "covered",
        "cut_off": "cut",
    },
    "edit": {
        "edit_done": "done",
        "edit_kept": "unchanged",
        "sharpness": "sharp",
        "noise": "grain",
        "occlusion": "covered",
        "cut_off": "cut",
    },
}
SPECIFIC_KINDS = ("presence", "colour", "size", "relation", "position", "count", "background")
MOST = 4


def caption_prompt(caption: str) -> list[Part]:
    """Asks for criteria of a caption before any picture exists."""
    return [f"Write criteria for this caption.\nCaption: {caption}"]


def pair_prompt(
    task: Task, caption: str, preferred: int, *, general: bool, rejected: Sequence[str] = ()
) -> list[Part]:
    """Asks for criteria that a preferred picture meets and the other does not.

    Args:
        task: "t2i" or "edit".
        caption: Caption or instruction.
        preferred: 1 or 2, the number of the preferred picture.
        general: Whether the criteria shall name nothing of this caption.
        rejected: Criteria that were tried and failed, to be avoided.
    """
    avoided = "".join(f"\n{i}. {text}" for i, text in enumerate(rejected, 1))
    before = f"\nNot these:{avoided}" if rejected else ""
    kind = "general" if general else "specific"
    aspects = ", ".join(ASPECTS[task].values())
    tail = f"\nCheck {aspects}.\nPreferred: Image {preferred}{before}\nWrite {kind} criteria."
    return [*pair_parts(task, caption), tail]


def answer(texts: Sequence[str]) -> str:
    """Criteria as the JSON text that is asked for."""
    return json.dumps({"criteria": list(texts)})


def caption_criteria(rng: np.random.Generator, caption: Caption, split: Split) -> tuple[str, ...]:
    """What a caption asks for, as criteria: objects, sizes, relation, background."""
    claims = [Claim("presence", kind) for kind in dict.fromkeys(caption.kinds)]
    if caption.relation is not None:
        i, relation, j = caption.relation
        claims.append(Claim("relation", caption.kinds[i], caption.kinds[j], relation))
    if caption.background is not None:
        claims.append(Claim("background", value=caption.background))
    if caption.sizes is not None:
        sized = zip(caption.kinds, caption.sizes, strict=True)
        counts = caption.counts()
        claims += [Claim("size", k, value=size) for k, size in sized if counts[k] == 1]
    if len(caption.kinds) > 1:
        claims.append(Claim("count", value=str(len(caption.kinds))))
    return tuple(wording(claim, rng, split) for claim in claims[:MOST])


def aspect_truths(example: Example) -> np.ndarray:
    """What is to be known before criteria are written about a pair.

    Returns:
        float32 [aspects of its task, 2]: whether each holds on Image 1 and on Image 2; nan where
        that is ambiguous.
    """
    task: Task = "t2i" if example.source is None else "edit"
    truths = np.full((len(ASPECTS[task]), 2), np.nan, np.float32)
    for row, kind in enumerate(ASPECTS[task]):
        for column, scene in enumerate(example.scenes):
            truth = Claim(kind).truth(scene, example.context)
            if truth is not None:
                truths[row, column] = truth
    return truths


def pair_criteria(
    rng: np.random.Generator, example: Example, preferred: int, general: bool, split: Split
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Criteria for a preferred picture, and others that fail on the pair.

    Args:
        rng: Source of chance.
        example: A pair.
        preferred: 0 or 1, the index of the preferred picture.
        general: Which kind of criteria.
        split: Which phrasings to use.

    Returns:
        (written, failing): up to MOST criteria that hold on the preferred picture, those first
        that do not hold on the other; and up to two that do not hold on it, or hold on both.
    """
    kinds = GENERAL_KINDS if general else SPECIFIC_KINDS
    wins: list[tuple[int, Claim]] = []
    ties: list[tuple[int, Claim]] = []
    fails: list[Claim] = []
    for claim in dict.fromkeys(candidate_claims(rng, example.scenes, example.context, split)):
        if claim.kind not in kinds:
            continue
        met = claim.truth(example.scenes[preferred], example.context)
        other = claim.truth(example.scenes[1 - preferred], example.context)
        if met:
            (wins if other is False else ties).append((kinds.index(claim.kind), claim))
        if met is False or (met and other):
            fails.append(claim)
    wins.sort(key=lambda item: item[0])
    ties.sort(key=lambda item: item[0])
    chosen = wins[:MOST] or ties[:2]
    written = [claim for _, claim in chosen]
    order = rng.permutation(len(fails))[:2]
    failing = [fails[int(k)] for k in order if fails[int(k)] not in written]
    texts = tuple(wording(claim, rng, split) for claim in written)
    return tuple(dict.fromkeys(texts)), tuple(wording(claim, rng, split) for claim in failing)
