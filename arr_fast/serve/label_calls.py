"""Label reads for any question: the log-probabilities of chosen next tokens, many in one forward.

Shapes: L labels of a question.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from arr_fast.errors import ArrFastError, PromptTooLongError
from arr_fast.images import CanonicalImage
from arr_fast.serve.calls import CHARACTERS_PER_TOKEN, PIXELS_PER_TOKEN
from arr_fast.serve.failures import BadRequestError

if TYPE_CHECKING:
    from arr_fast.engine.engine import Engine
    from arr_fast.engine.planner import ImageTable, Path
    from arr_fast.judge import Judge
    from arr_fast.prompts import Part


@dataclass(frozen=True, slots=True)
class LabelReading:
    """What one question read.

    Attributes:
        log_probs: float64 [L], log-probability of each label over the whole vocabulary.
        tokens: Length of the conversation that was read.
    """

    log_probs: np.ndarray
    tokens: int

    @property
    def probabilities(self) -> np.ndarray:
        """float64 [L], normalised over the labels."""
        weights = np.exp(self.log_probs - self.log_probs.max())
        return np.asarray(weights / weights.sum())

    @property
    def mass(self) -> float:
        """Probability of any label over the whole vocabulary, in [0, 1]."""
        return float(min(1.0, np.exp(np.logaddexp.reduce(self.log_probs))))


@dataclass(frozen=True, slots=True)
class ChatQuestion:
    """A question at the end of a shared user turn, answered by one of some labels.

    Attributes:
        name: What to call it in errors.
        text: What it adds to the user turn.
        labels: Texts that are one token each after the prompt.
    """

    name: str
    text: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class LabelCall:
    """Questions of one request: over a shared user turn, or token sequences as they are.

    Attributes:
        parts: The shared user turn: texts, with the images at its end.
        images: Its images, in order.
        questions: Questions over the turn.
        sequences: Token ids to read after, in place of questions.
        label_ids: For each sequence its label tokens.
    """

    kind: ClassVar[str] = "labels"
    parts: tuple[Part, ...] = ()
    images: tuple[CanonicalImage, ...] = ()
    questions: tuple[ChatQuestion, ...] = ()
    sequences: tuple[tuple[int, ...], ...] = ()
    label_ids: tuple[tuple[int, ...], ...] = field(default=())

    @property
    def merge_key(self) -> Hashable:
        """All label reads may share a call."""
        return self.kind

    @property
    def items(self) -> int:
        """Questions."""
        return len(self.questions) + len(self.sequences)

    @property
    def tokens(self) -> int:
        """The shared turn once, then the questions."""
        pixels = sum(image.width * image.height for image in self.images)
        characters = sum(len(part) for part in self.parts if isinstance(part, str))
        characters += sum(len(question.text) for question in self.questions)
        raw = sum(len(ids) for ids in self.sequences)
        return pixels // PIXELS_PER_TOKEN + characters // CHARACTERS_PER_TOKEN + raw + 1

    def run(self, judge: Judge, calls: Sequence[LabelCall]) -> list[Any]:
        """One scoring pass for all calls; per call a list of LabelReading, or its error."""
        from arr_fast.engine.planner import ImageTable

        engine = judge.engine
        with engine.lock:
            if judge.stats()["asleep"]:
                raise ArrFastError("the judge sleeps; call wake() first")
            failed: dict[str, BaseException] = {}
            features = engine.image_features([i for call in calls for i in call.images], failed)
            table = ImageTable()
            paths: list[list[Path]] = []
            wanted: list[list[tuple[int, ...]]] = []
            errors: dict[int, BaseException] = {}
            for number, call in enumerate(calls):
                try:
                    for image in call.images:
                        if image.content_hash in failed:
                            raise ArrFastError(
                                f"an image was not encoded: {failed[image.content_hash]}"
                            )
                    found, labels = call._prepare(engine, features, table)
                except ArrFastError as error:
                    is_long = isinstance(error, PromptTooLongError)
                    errors[number] = BadRequestError(str(error)) if is_long else error
                    found, labels = [], []
                paths.append(found)
                wanted.append(labels)
            union = sorted({token for labels in wanted for ids in labels for token in ids})
            column = {token: place for place, token in enumerate(union)}
            heads = tuple((token,) for token in union)
            # The vocabulary's normaliser is part of every answer: label_mass=True.
            scored = engine.score(paths, heads, table, features, True) if union else []
        results: list[Any] = []
        for number in range(len(calls)):
            result: Any = errors.get(number) or scored[number]
            if not isinstance(result, BaseException):
                result = [
                    LabelReading(
                        reading.labels[[column[token] for token in ids]].astype(np.float64)
                        - reading.vocab_lse,
                        len(path.sequence),
                    )
                    for reading, ids, path in zip(
                        result, wanted[number], paths[number], strict=True
                    )
                ]
            results.append(result)
        return results

    def _prepare(
        self, engine: Engine, features: dict[str, Any], table: ImageTable
    ) -> tuple[list[Path], list[tuple[int, ...]]]:
        """The call's paths and, for each, its label tokens."""
        if self.sequences:
            return _raw_paths(engine, self.sequences, self.label_ids, table)
        labels = [self._label_ids(engine, question) for question in self.questions]
        leaves = [question.text for question in self.questions]
        if self.images:
            paths = engine.paths(
                list(self.parts), leaves, list(self.images), features, table, "the request"
            )
            return paths, labels
        encoded = [engine.prompts.encode([*self.parts, leaf], []) for leaf in leaves]
        sequences = [np.concatenate([run.ids for run in runs]) for runs in encoded]
        names = [question.name for question in self.questions]
        return _text_paths(engine, sequences, table, names), labels

    def _label_ids(self, engine: Engine, question: ChatQuestion) -> tuple[int, ...]:
        try:
            found = engine.prompts.label_ids(
                [(label,) for label in question.labels], parts=[*self.parts, question.text]
            )
        except ArrFastError as error:
            raise BadRequestError(f"{question.name}: {error}") from None
        return tuple(ids[0] for ids in found)


def _raw_paths(
    engine: Engine,
    sequences: Sequence[Sequence[int]],
    label_ids: Sequence[tuple[int, ...]],
    table: ImageTable,
) -> tuple[list[Path], list[tuple[int, ...]]]:
    """Paths of token sequences that the client wrote itself."""
    vocabulary = len(engine.adapter.output_weight())
    image = int(getattr(engine.adapter, "image_token_id", -1))
    for name, lists in (("items", sequences), ("label_token_ids", label_ids)):
        for number, ids in enumerate(lists):
            bad = [t for t in ids if not 0 <= t < vocabulary or (name == "items" and t == image)]
            if bad:
                raise BadRequestError(
                    f"{name}[{number}]: token {bad[0]} is not one of {vocabulary} text tokens"
                )
    arrays = [np.asarray(ids, dtype=np.int64) for ids in sequences]
    names = [f"items[{number}]" for number in range(len(arrays))]
    return _text_paths(engine, arrays, table, names), list(label_ids)


def _text_paths(
    engine: Engine, sequences: Sequence[np.ndarray], table: ImageTable, names: Sequence[str]
) -> list[Path]:
    """Paths without images; what all sequences open with becomes their shared part."""
    limit = int(engine.adapter.text_config.max_position_embeddings)
    for name, ids in zip(names, sequences, strict=True):
        if len(ids) > limit:
            raise PromptTooLongError(
                f"{name}: the prompt has {len(ids)} tokens, the model's context holds {limit}"
            )
    shared = min(len(ids) for ids in sequences)
    first = sequences[0]
    for ids in sequences[1:]:
        differs = np.flatnonzero(ids[:shared] != first[:shared])
        shared = int(differs[0]) if len(differs) else shared
    # Every path keeps a tail of its own to be read at, so the shared part stops before it.
    shared = min(shared, min(len(ids) for ids in sequences) - 1)
    if shared < 1:
        return [
            path for ids in sequences for path in _shared_paths(engine, ids[:1], [ids[1:]], table)
        ]
    return _shared_paths(engine, first[:shared], [ids[shared:] for ids in sequences], table)


def _shared_paths(
    engine: Engine, head: np.ndarray, tails: Sequence[np.ndarray], table: ImageTable
) -> list[Path]:
    from arr_fast.engine.planner import build_paths
    from arr_fast.prompts import TokenRun

    runs = [TokenRun(head)]
    return build_paths(runs, tails, engine.adapter.positions(runs, []), (), table)
