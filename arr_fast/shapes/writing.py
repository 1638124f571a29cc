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
from arr_fast.shapes.pairs import Example, candidate_claims, general_claims
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
    tail = f"\nPreferred: Image {preferred}{before}\nWrite {kind} criteria."
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


def general_truths(example: Example, preferred: int) -> np.ndarray:
    """What is to be known before general criteria are written.

    Args:
        example: A pair.
        preferred: 0 or 1, the index of the preferred picture.

    Returns:
        float32 [2 * kinds]: whether each of GENERAL_KINDS holds on the preferred picture, then
        whether it holds on the other; nan where that is ambiguous or makes no sense.
    """
    truths = np.full((2, len(GENERAL_KINDS)), np.nan, np.float32)
    for claim in general_claims(example.context):
        if claim.kind not in GENERAL_KINDS:
            continue
        for row, which in enumerate((preferred, 1 - preferred)):
            truth = claim.truth(example.scenes[which], example.context)
            if truth is not None:
                truths[row, GENERAL_KINDS.index(claim.kind)] = truth
    return truths.ravel()


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
