"""What requests ask of the judge, and how several requests become one call of it.

Calls with equal `merge_key` may run together. What a judge says of its call as a whole (common
temperature and margin, rubric hashes of the provenance) and the numbers in errors are told per
request here, so company never changes an answer.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from arr_fast.aggregation import AggregationName, Mode
from arr_fast.images import CanonicalImage
from arr_fast.pairwise import common
from arr_fast.provenance import Provenance
from arr_fast.rubric import Rubric

if TYPE_CHECKING:
    from arr_fast.judge import Judge

CHARACTERS_PER_TOKEN = 3
PIXELS_PER_TOKEN = 28 * 28


class Call(Protocol):
    """One request as the batcher sees it."""

    @property
    def kind(self) -> str:
        """Name for metrics and logs."""

    @property
    def merge_key(self) -> Hashable:
        """Calls with equal keys may share one run."""

    @property
    def items(self) -> int:
        """How many pairs, images, groups or questions."""

    @property
    def tokens(self) -> int:
        """Estimated tokens; sizes batches and bounds the queue."""

    def run(self, judge: Judge, calls: Sequence[Any]) -> list[Any]:
        """Runs calls of one key together; one result or exception for each."""


@dataclass(frozen=True, slots=True)
class PairOptions:
    """Options of `Judge.compare` and `Judge.rank` that a request may set."""

    orders: Literal["both", "AB", "BA"] = "both"
    mode: Mode = "criteria"
    label_mass: bool = False
    label_mass_threshold: float = 0.5
    aggregation: AggregationName | None = None
    temperature: float | None = None
    margin: float | None = None
    inconsistent: Literal["tie", "keep"] = "tie"
    learned_weights: tuple[float, ...] | None = None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the judge."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class CompareCall:
    """Pairs to compare: B prompts, images and rubrics; sources of edits or None."""

    kind: ClassVar[str] = "compare"
    prompts: tuple[str, ...]
    images_a: tuple[CanonicalImage, ...]
    images_b: tuple[CanonicalImage, ...]
    sources: tuple[CanonicalImage, ...] | None
    rubrics: tuple[Rubric, ...]
    options: PairOptions

    @property
    def merge_key(self) -> Hashable:
        """Options and task; learned weights depend on K, so those calls run alone."""
        return _pair_key(self.kind, self.options, self.sources, self)

    @property
    def items(self) -> int:
        """Pairs."""
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Both images, the text and the criteria, for each order."""
        shown = [*zip(self.images_a, self.images_b, strict=True)]
        one = estimate_tokens(self.prompts, self.rubrics, shown, self.sources)
        return one * (2 if self.options.orders == "both" else 1)

    def run(self, judge: Judge, calls: Sequence[CompareCall]) -> list[Any]:
        """One `Judge.compare` for all calls."""
        verdicts = judge.compare(
            _joined(calls, "prompts"),
            _joined(calls, "images_a"),
            _joined(calls, "images_b"),
            _joined(calls, "rubrics"),
            sources=_joined_sources(calls),
            **self.options.arguments(),
        )
        return _shares(verdicts, calls, "pair")


@dataclass(frozen=True, slots=True)
class ScoreCall:
    """Single images to score."""

    kind: ClassVar[str] = "score"
    prompts: tuple[str, ...]
    images: tuple[CanonicalImage, ...]
    sources: tuple[CanonicalImage, ...] | None
    rubrics: tuple[Rubric, ...]
    label_mass: bool = False
    label_mass_threshold: float = 0.5

    @property
    def merge_key(self) -> Hashable:
        """Options and task."""
        edit = self.sources is not None
        return (self.kind, self.label_mass, self.label_mass_threshold, edit)

    @property
    def items(self) -> int:
        """Images."""
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """Image, text and criteria."""
        shown = [(image,) for image in self.images]
        return estimate_tokens(self.prompts, self.rubrics, shown, self.sources)

    def run(self, judge: Judge, calls: Sequence[ScoreCall]) -> list[Any]:
        """One `Judge.score` for all calls."""
        verdicts = judge.score(
            _joined(calls, "prompts"),
            _joined(calls, "images"),
            _joined(calls, "rubrics"),
            sources=_joined_sources(calls),
            label_mass=self.label_mass,
            label_mass_threshold=self.label_mass_threshold,
        )
        return _shares(verdicts, calls, "image")


@dataclass(frozen=True, slots=True)
class RankCall:
    """Groups of candidates to rank."""

    kind: ClassVar[str] = "rank"
    prompts: tuple[str, ...]
    groups: tuple[tuple[CanonicalImage, ...], ...]
    sources: tuple[CanonicalImage, ...] | None
    rubrics: tuple[Rubric, ...]
    options: PairOptions

    @property
    def merge_key(self) -> Hashable:
        """As for pairs."""
        return _pair_key(self.kind, self.options, self.sources, self)

    @property
    def items(self) -> int:
        """Groups."""
        return len(self.prompts)

    @property
    def tokens(self) -> int:
        """All pairs, both orders where asked; the engine shares much of it."""
        total = 0
        for number, group in enumerate(self.groups):
            source = None if self.sources is None else (self.sources[number],)
            around = estimate_tokens(
                self.prompts[number : number + 1], self.rubrics[number : number + 1], (), source
            )
            # Each image meets every other one once.
            meetings = len(group) - 1
            pixels = sum(image.width * image.height for image in group)
            total += around * len(group) * meetings // 2 + meetings * pixels // PIXELS_PER_TOKEN
        return total * (2 if self.options.orders == "both" else 1)

    def run(self, judge: Judge, calls: Sequence[RankCall]) -> list[Any]:
        """One `Judge.rank` for all calls."""
        verdicts = judge.rank(
            _joined(calls, "prompts"),
            _joined(calls, "groups"),
            _joined(calls, "rubrics"),
            sources=_joined_sources(calls),
            **self.options.arguments(),
        )
        return _shares(verdicts, calls, "group")


def estimate_tokens(
    prompts: Sequence[str],
    rubrics: Sequence[Rubric],
    shown: Sequence[Sequence[CanonicalImage]],
    sources: Sequence[CanonicalImage] | None,
) -> int:
    """Tokens of one order, roughly: image areas, captions and criteria."""
    pixels = sum(image.width * image.height for images in shown for image in images)
    pixels += sum(image.width * image.height for image in sources or ())
    characters = sum(len(prompt) + 300 for prompt in prompts)
    for rubric in rubrics:
        characters += sum(len(c.text) + sum(map(len, c.tips)) + 40 for c in rubric.criteria)
    return pixels // PIXELS_PER_TOKEN + characters // CHARACTERS_PER_TOKEN + 1


def _pair_key(kind: str, options: PairOptions, sources: object, call: object) -> Hashable:
    alone = id(call) if options.learned_weights is not None else None
    return (kind, options, sources is not None, alone)


def _joined(calls: Sequence[Any], name: str) -> list[Any]:
    return [value for call in calls for value in getattr(call, name)]


def _joined_sources(calls: Sequence[Any]) -> list[Any] | None:
    return None if calls[0].sources is None else _joined(calls, "sources")


def _shares(verdicts: Any, calls: Sequence[Any], noun: str) -> list[Any]:
    """Each call's own part of shared verdicts, as the answer that it would have got alone.

    Args:
        verdicts: Of all calls, in their order.
        calls: The calls.
        noun: What errors call an item: "pair", "image" or "group"; the list in the answer has its
            plural.
    """
    whole = verdicts.to_json()
    answers, begin = [], 0
    for call in calls:
        own = whole[f"{noun}s"][begin : begin + call.items]
        for number, item in enumerate(own):
            # The errors of a group are those of its pairs.
            for verdict in item.get("pairs", [item]):
                verdict["error"] = _renumbered(verdict["error"], noun, begin + number, number)
        about: dict[str, Any] = {"provenance": _provenance(verdicts.provenance, call.rubrics)}
        for name in ("temperature", "margin"):
            if name in whole:
                about[name] = common([item[name] for item in own])
        answers.append({**whole, **about, f"{noun}s": own})
        begin += call.items
    return answers


def _renumbered(error: str | None, noun: str, shared: int, own: int) -> str | None:
    """An error that names an item by its place in a shared call, with its place in its own."""
    name = f"{noun} {shared}: "
    if error is None or not error.startswith(name):
        return error
    return f"{noun} {own}: {error.removeprefix(name)}"


def _provenance(shared: Provenance, rubrics: Sequence[Rubric]) -> dict[str, Any]:
    hashes = tuple(dict.fromkeys(rubric.content_hash for rubric in rubrics))
    return replace(shared, rubric_hashes=hashes).to_json()
