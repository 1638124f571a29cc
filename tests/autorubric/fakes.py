"""A writer that follows a script, and a judge that knows the shapes domain by its renderer."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np

from arr_fast.autorubric.text_backend import (
    OnResult,
    TextBackendError,
    TextReply,
    TextRequest,
)
from arr_fast.images import to_image
from arr_fast.provenance import Provenance
from arr_fast.shapes.claims import Claim
from arr_fast.shapes.criterion_parser import parse_criterion
from arr_fast.shapes.grammar import wording
from arr_fast.shapes.hidden_preference import QUALITIES, HiddenPair
from arr_fast.shapes.render import render
from arr_fast.verdicts import pair_verdicts


class ScriptedBackend:
    """Answers by a function; counts calls, and can be killed after some."""

    identity = "scripted"

    def __init__(self, answer: Callable[[TextRequest], Any], kill_after: int | None = None) -> None:
        self.answer = answer
        self.asked: list[TextRequest] = []
        self.kill_after = kill_after

    def generate(self, requests: Sequence[TextRequest], on_result: OnResult) -> None:
        for place, request in enumerate(requests):
            if self.kill_after is not None and len(self.asked) == self.kill_after:
                raise KeyboardInterrupt
            self.asked.append(request)
            result = self.answer(request)
            if isinstance(result, str):
                result = TextReply(result, prompt_tokens=10, completion_tokens=5, seconds=0.01)
            on_result(place, result)


EDIT_QUALITIES = ("edit_done", "edit_kept", "sharpness", "noise", "occlusion", "cut_off")


class World:
    """Labelled pairs of the shapes domain with everything that a fake needs to know of them."""

    def __init__(self, pairs: Sequence[HiddenPair]) -> None:
        self.known: dict[str, Any] = {}
        self.context: dict[str, Any] = {}
        for pair in pairs:
            assert pair.example.caption not in self.context, "texts name their pair"
            self.context[pair.example.caption] = pair.example.context
            for scene in pair.example.scenes:
                image = to_image(render(scene), name="scene")
                self.known[image.content_hash] = scene

    def truth(self, claim: Claim, image: Any, caption: str) -> float:
        truth = claim.truth(self.known[image.content_hash], self.context[caption])
        return 0.5 if truth is None else float(truth)


class OracleJudge:
    """Says of every criterion what the renderer says, with noise and position bias.

    Args:
        world: The pairs.
        noise: Standard deviation of log-odds, fixed per pair and criterion.
        bias: Log-odds that the first place gains.
        kill_after: Calls of compare before it raises KeyboardInterrupt.
    """

    def __init__(
        self, world: World, noise: float = 1.0, bias: float = 0.3, kill_after: int | None = None
    ) -> None:
        self.world, self.noise, self.bias = world, noise, bias
        self.kill_after = kill_after
        self.calls: list[list[tuple[str, tuple[str, ...]]]] = []
        loaded = SimpleNamespace(name="oracle", revision="r1", dtype="float64", quantization=None)
        self.engine = SimpleNamespace(loaded=loaded, epoch=0, impl="none")

    def compare(
        self, prompts: Any, images_a: Any, images_b: Any, rubrics: Any, *, sources: Any = None
    ) -> Any:
        if self.kill_after is not None and len(self.calls) == self.kill_after:
            raise KeyboardInterrupt
        texts = [tuple(c.text for c in rubric.criteria) for rubric in rubrics]
        self.calls.append(list(zip(prompts, texts, strict=True)))
        width = max(len(each) for each in texts)
        odds = np.zeros((len(prompts), width))
        for row, (prompt, a, b, each) in enumerate(
            zip(prompts, images_a, images_b, texts, strict=True)
        ):
            for k, text in enumerate(each):
                odds[row, k] = self._odds(prompt, a, b, text)
        mask = np.array([[k < len(each) for k in range(width)] for each in texts])
        return pair_verdicts(
            np.where(mask, odds + self.bias, np.nan),
            np.where(mask, -odds + self.bias, np.nan),
            provenance=Provenance("oracle", "r1", (rubrics[0].content_hash,), 1),
            criteria=[rubric.ids for rubric in rubrics],
        )

    def _odds(self, prompt: str, a: Any, b: Any, text: str) -> float:
        seed = hashlib.sha256(f"{a.content_hash}{b.content_hash}{text}".encode()).digest()
        noise = self.noise * np.random.default_rng(int.from_bytes(seed[:8])).standard_normal()
        claim = parse_criterion(text)
        if claim is None:
            return noise
        difference = self.world.truth(claim, a, prompt) - self.world.truth(claim, b, prompt)
        return 4.0 * difference + noise


def general_writer(world: World, seed: int = 0) -> Callable[[TextRequest], str]:
    """Writes general criteria that are true of the preferred image, those that decide first."""

    def answer(request: TextRequest) -> str:
        text = "".join(part for part in request.parts if isinstance(part, str))
        is_edit = len(request.images) == 3
        head = "Instruction: " if is_edit else "Caption: "
        caption = text.split(head)[1].split("\nPreferred: ")[0]
        winner = int(text.split("Preferred: Image ")[1][0]) - 1
        shown = request.images[-2:]
        a, b = shown[winner], shown[1 - winner]
        digest = hashlib.sha256(f"{seed}{text}{a.content_hash}".encode()).digest()
        rng = np.random.default_rng(int.from_bytes(digest[:8]))
        kinds = EDIT_QUALITIES if is_edit else QUALITIES
        claims = [Claim(kinds[int(i)]) for i in rng.permutation(len(kinds))]
        true = [c for c in claims if world.truth(c, a, caption) == 1.0]
        true.sort(key=lambda c: world.truth(c, b, caption))
        written = [wording(c, rng, "train") for c in true[: request.limit]]
        kept = [t for t in written if t not in request.banned] or ["The image is sharp."]
        return json.dumps({"criteria": kept})

    return answer


def failing(message: str = "no route") -> TextBackendError:
    return TextBackendError(message)
