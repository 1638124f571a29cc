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
from arr_fast.shapes.grammar import plain_wording
from arr_fast.shapes.pairs import Example
from arr_fast.shapes.scene import Scene

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
# What a writer of general criteria is told to look at, a word for each kind of a task. The bundled
# judge finds out at these words what holds on the preferred picture and on the other.
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
    look = f"\n{aspects_line(task)}" if general else ""
    tail = f"\nPreferred: Image {preferred}{look}{before}\nWrite {kind} criteria."
    return [*pair_parts(task, caption), tail]


def aspects_line(task: Task) -> str:
    """What general criteria of a task can be about, as a writer is told."""
    return f"Check {', '.join(ASPECTS[task].values())}."


def answer(texts: Sequence[str]) -> str:
    """Criteria as the JSON text that is asked for."""
    return json.dumps({"criteria": list(texts)})


def caption_criteria(caption: Caption) -> tuple[str, ...]:
    """What a caption asks for, as criteria: objects, relation, background, sizes, number."""
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
    return tuple(plain_wording(claim) for claim in claims[:MOST])


def aspect_truths(example: Example, preferred: int) -> np.ndarray:
    """What is to be known before general criteria are written about a pair.

    Args:
        example: A pair.
        preferred: 0 or 1, the index of the preferred picture.

    Returns:
        float32 [aspects of its task, 2]: whether each holds on the preferred picture and on the
        other; nan where that is ambiguous.
    """
    task = example.task
    truths = np.full((len(ASPECTS[task]), 2), np.nan, np.float32)
    for row, kind in enumerate(ASPECTS[task]):
        scenes = example.scenes[preferred], example.scenes[1 - preferred]
        for column, scene in enumerate(scenes):
            truth = Claim(kind).truth(scene, example.context)
            if truth is not None:
                truths[row, column] = truth
    return truths


def pair_criteria(
    rng: np.random.Generator, example: Example, preferred: int, general: bool
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Criteria for a preferred picture, and others that fail on the pair.

    What is written follows from the pair: in a fixed order, in the same words each time.

    Args:
        rng: Source of chance, for what fails.
        example: A pair.
        preferred: 0 or 1, the index of the preferred picture.
        general: Which kind of criteria.

    Returns:
        (written, failing): up to MOST criteria that hold on the preferred picture and not on the
        other, or up to two that hold on both where there are none; and up to two that do not hold
        on it, or hold on both.
    """
    context = example.context
    scene, rival = example.scenes[preferred], example.scenes[1 - preferred]
    if general:
        claims = [Claim(kind) for kind in GENERAL_KINDS if kind in ASPECTS[example.task]]
        others = claims
    else:
        claims = _shown(scene)
        others = [*claims, *_shown(rival)]
    met = [claim for claim in claims if claim.truth(scene, context)]
    wins = [claim for claim in met if claim.truth(rival, context) is False]
    written = wins[:MOST] or met[:2]
    fails = [
        claim
        for claim in dict.fromkeys(others)
        if claim not in written
        and (claim.truth(scene, context) is False or (claim in met and claim.truth(rival, context)))
    ]
    failing = [fails[int(k)] for k in rng.permutation(len(fails))[:2]]
    return (
        tuple(plain_wording(claim) for claim in written),
        tuple(plain_wording(claim) for claim in failing),
    )


def _shown(scene: Scene) -> list[Claim]:
    """What a picture shows: objects from top to bottom, their number, the background, sizes."""
    objects = scene.in_reading_order()
    claims = [Claim("presence", kind) for kind in dict.fromkeys(o.kind for o in objects)]
    if objects:
        claims.append(Claim("count", value=str(len(objects))))
    claims.append(Claim("background", value=scene.background))
    counts = scene.kinds()
    claims += [Claim("size", o.kind, value=o.size) for o in objects if counts[o.kind] == 1]
    return claims
