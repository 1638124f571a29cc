"""How well a judge writes criteria of its own domain: `python -m arr_fast.shapes.evaluate_writing`.

A written criterion is valid if the answer parses, the criterion is a sentence of the domain's
grammar, it is true of the preferred image by the renderer (from a caption: of the scene that the
caption describes), it is of the kind that was asked for, and it repeats none before it, in other
words either. Scenes and captions are held out.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arr_fast.autorubric.answers import AnswerError, parse_criteria
from arr_fast.autorubric.text_backend import TextReply, TextRequest, TextResult
from arr_fast.images import CanonicalImage, to_image
from arr_fast.shapes.captions import describe
from arr_fast.shapes.claims import EDIT_KINDS, Claim, Context
from arr_fast.shapes.criterion_parser import parse_criterion
from arr_fast.shapes.hidden_preference import HiddenPreference, sample_pairs
from arr_fast.shapes.pairs import Example, sample_edit_pair
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import Scene, sample_scene
from arr_fast.shapes.writing import GENERAL_KINDS, caption_prompt, pair_prompt

if TYPE_CHECKING:
    from arr_fast.autorubric.text_backend import TextBackend

BAR = 0.9


@dataclass(frozen=True, slots=True)
class WritingTask:
    """One request, and what its answer must be true of.

    Attributes:
        form: "caption", "general" or "specific".
        request: What is asked.
        scene: The preferred picture, or the scene of the caption.
        other: The other picture, or None.
        context: Caption, or source and edit.
    """

    form: str
    request: TextRequest
    scene: Scene
    other: Scene | None
    context: Context


@dataclass(slots=True)
class WritingScore:
    """Counts of one form.

    Attributes:
        answers: Requests; `unusable` of them had no answer that parses.
        verdicts: Criteria by what became of them: valid, false, ambiguous, duplicate, wrong kind,
            not in the grammar.
        distinguishing: Valid criteria that are false of the other picture.
        kinds: Valid criteria by kind.
        examples: Some that are not valid: (text, why).
    """

    answers: int = 0
    unusable: int = 0
    verdicts: Counter[str] = field(default_factory=Counter)
    distinguishing: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    examples: list[tuple[str, str]] = field(default_factory=list)

    @property
    def valid_share(self) -> float:
        """Valid criteria over all; an unusable answer counts as one that is not valid."""
        total = sum(self.verdicts.values()) + self.unusable
        return self.verdicts["valid"] / total if total else float("nan")

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object."""
        return {
            "answers": self.answers,
            "unusable": self.unusable,
            "valid_share": self.valid_share,
            "verdicts": dict(self.verdicts),
            "distinguishing": self.distinguishing,
            "kinds": dict(self.kinds),
            "examples": [list(each) for each in self.examples],
        }


def writing_tasks(count: int, *, seed: int, limit: int = 5) -> list[WritingTask]:
    """Held-out requests: `count` captions, and `count` pairs under either kind of criteria.

    A fifth of the pairs are edits.
    """
    rng = np.random.default_rng([seed, 4])
    tasks = []
    for _ in range(count):
        scene = sample_scene(rng, "held_out")
        caption = describe(rng, scene)
        parts = caption_prompt(caption.text(rng))
        request = TextRequest(tuple(parts), limit=limit)
        tasks.append(WritingTask("caption", request, scene, None, Context(caption=caption)))
    edits = count // 5
    pairs = sample_pairs(HiddenPreference.draw(seed), count - edits, seed=seed)
    labelled = [(pair.example, pair.preferred) for pair in pairs]
    for _ in range(edits):
        labelled.append((sample_edit_pair(rng, "held_out", 0), int(rng.integers(1, 3))))
    for example, preferred in labelled:
        for general in (True, False):
            tasks.append(_pair_task(example, preferred, general, limit))
    return tasks


def _pair_task(example: Example, preferred: int, general: bool, limit: int) -> WritingTask:
    task = example.task
    parts = pair_prompt(task, example.caption, preferred, general=general)
    scenes = example.scenes if example.source is None else (example.source, *example.scenes)
    images = tuple(_image(scene) for scene in scenes)
    winner, other = example.scenes[preferred - 1], example.scenes[2 - preferred]
    form = "general" if general else "specific"
    request = TextRequest(tuple(parts), images, limit=limit)
    return WritingTask(form, request, winner, other, example.context)


def score_writing(
    tasks: Sequence[WritingTask], results: Sequence[TextResult]
) -> dict[str, WritingScore]:
    """Checks every written criterion against the renderer; by form."""
    scores: dict[str, WritingScore] = {}
    for task, result in zip(tasks, results, strict=True):
        score = scores.setdefault(task.form, WritingScore())
        score.answers += 1
        try:
            if not isinstance(result, TextReply):
                raise AnswerError(str(result), "")
            parsed = parse_criteria(result, task.request.limit)
        except AnswerError as error:
            score.unusable += 1
            score.examples.append((error.raw[:200], str(error)))
            continue
        score.verdicts["duplicate"] += parsed.repeated
        seen: set[Claim] = set()
        for text in parsed.texts:
            verdict, claim = _verdict(task, text, seen)
            score.verdicts[verdict] += 1
            if claim is not None:
                seen.add(claim)
            if verdict == "valid" and claim is not None:
                score.kinds[claim.kind] += 1
                if task.other is not None:
                    score.distinguishing += claim.truth(task.other, task.context) is False
            elif len(score.examples) < 40:
                score.examples.append((text, verdict))
    return scores


def _verdict(task: WritingTask, text: str, seen: set[Claim]) -> tuple[str, Claim | None]:
    claim = parse_criterion(text)
    if claim is None:
        return "not in the grammar", None
    if claim in seen:
        return "duplicate", claim
    needs_edit = claim.kind in EDIT_KINDS
    if needs_edit != (task.context.edit is not None) and (
        needs_edit or claim.kind.startswith("caption_") or claim.kind in ("faithful", "overall")
    ):
        return "wrong kind", claim
    if task.form == "general" and claim.kind not in GENERAL_KINDS:
        return "wrong kind", claim
    truth = claim.truth(task.scene, task.context)
    return {True: "valid", False: "false", None: "ambiguous"}[truth], claim


def ask(backend: TextBackend, tasks: Sequence[WritingTask]) -> list[TextResult]:
    """Answers of a backend, in order."""
    found: dict[int, TextResult] = {}
    backend.generate([task.request for task in tasks], found.__setitem__)
    return [found[place] for place in range(len(tasks))]


def _image(scene: Scene) -> CanonicalImage:
    return to_image(render(scene), name="scene")


def main() -> None:
    """Command line; exits 1 where fewer than 90 % are valid in any form."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:shapes")
    parser.add_argument("--count", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--criteria", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--free", action="store_true", help="without constrained decoding")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    from arr_fast.autorubric.local_backend import LocalBackend
    from arr_fast.judge import Judge

    judge = Judge.from_pretrained(args.model)
    backend = LocalBackend(judge, batch_size=args.batch_size, constrained=not args.free)
    tasks = writing_tasks(args.count, seed=args.seed, limit=args.criteria)
    scores = score_writing(tasks, ask(backend, tasks))
    for form, score in scores.items():
        parts = ", ".join(f"{name} {number}" for name, number in score.verdicts.most_common())
        print(f"{form}: {100 * score.valid_share:.1f} % valid; unusable {score.unusable}; {parts}")
        for text, why in score.examples[:5]:
            print(f"    {why}: {text}")
    if args.json is not None:
        document = {form: score.to_json() for form, score in scores.items()}
        args.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    if any(not score.valid_share >= BAR for score in scores.values()):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
