"""Requests of our own routes, and how they become calls.

Images are base64 strings, data URLs, or {"url": ...} (see images_in.py). A rubric is the name of a
packaged one, an object with `name`, `task` and `criteria`, or a list with one of these per item;
without any, the server's default is used.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from arr_fast.aggregation import AggregationName, Mode, rule_of
from arr_fast.errors import RubricError, VerdictError
from arr_fast.images import CanonicalImage
from arr_fast.rubric import Rubric, Task
from arr_fast.serve.calls import CompareCall, PairOptions, RankCall, ScoreCall
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.images_in import ImageReader
from arr_fast.serve.settings import ServeSettings

WireImage = str | dict[str, Any]
RubricSpec = str | dict[str, Any]
Finite = Annotated[float, Field(allow_inf_nan=False)]


class _Request(BaseModel):
    """What all judge requests share."""

    model_config = ConfigDict(extra="forbid")

    prompts: list[str] = Field(min_length=1, description="Captions, or edit instructions.")
    sources: list[WireImage] | None = Field(None, description="Source images of edits.")
    rubric: RubricSpec | list[RubricSpec] | None = Field(
        None, description="A packaged rubric's name, a rubric object, or one of these per item."
    )
    label_mass: bool = Field(False, description="Also read P(any label).")
    label_mass_threshold: float = Field(0.5, ge=0.0, le=1.0)
    timeout_s: float | None = Field(None, gt=0.0, description="Deadline of this request.")


class _PairRequest(_Request):
    """Options of pairwise judging; see `Judge.compare`."""

    orders: Literal["both", "AB", "BA"] = "both"
    mode: Mode = "criteria"
    aggregation: AggregationName | None = None
    temperature: Annotated[Finite, Field(gt=0.0)] | None = None
    margin: Annotated[Finite, Field(ge=0.0)] | None = None
    inconsistent: Literal["tie", "keep"] = "tie"
    learned_weights: list[Finite] | None = Field(
        None, min_length=1, description='One per criterion, for aggregation "learned".'
    )


class CompareRequest(_PairRequest):
    """Pairs of images: which is better, criterion by criterion."""

    images_a: list[WireImage]
    images_b: list[WireImage]


class ScoreRequest(_Request):
    """Single images: P(yes) for every criterion."""

    images: list[WireImage]


class RankRequest(_PairRequest):
    """Groups of candidates: all pairs, win rates and a ranking."""

    groups: list[list[WireImage]]


class JudgeAnswer(BaseModel):
    """The object that `PairVerdicts`, `PointVerdicts` and `GroupVerdicts.to_json` return."""

    model_config = ConfigDict(extra="allow")

    schema_: str = Field(alias="schema")
    provenance: dict[str, Any]


class CallBuilder:
    """Turns requests into calls; decodes images, so it runs in a worker thread.

    Args:
        settings: Limits and the default rubric.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self.settings = settings

    def compare(self, request: CompareRequest) -> CompareCall:
        """A compare call.

        Raises:
            BadRequestError: Lists of different lengths, over a limit, a bad image or rubric.
        """
        count = self._check_prompts(request.prompts)
        reader = ImageReader(self.settings)
        first = self._list(reader, request.images_a, count, "images_a")
        second = self._list(reader, request.images_b, count, "images_b")
        sources = self._sources(reader, request.sources, count)
        rubrics = self.rubrics(request.rubric, count, request.sources is not None)
        return CompareCall(
            tuple(request.prompts), first, second, sources, rubrics, self._pair(request, rubrics)
        )

    def score(self, request: ScoreRequest) -> ScoreCall:
        """A score call; raises as `compare`."""
        count = self._check_prompts(request.prompts)
        reader = ImageReader(self.settings)
        images = self._list(reader, request.images, count, "images")
        sources = self._sources(reader, request.sources, count)
        rubrics = self.rubrics(request.rubric, count, request.sources is not None)
        return ScoreCall(
            tuple(request.prompts),
            images,
            sources,
            rubrics,
            request.label_mass,
            request.label_mass_threshold,
        )

    def rank(self, request: RankRequest) -> RankCall:
        """A rank call; raises as `compare`, and for a group of one."""
        count = self._check_prompts(request.prompts)
        if len(request.groups) != count:
            raise BadRequestError(f"groups has {len(request.groups)} items, prompts has {count}")
        for number, group in enumerate(request.groups):
            if not 2 <= len(group) <= self.settings.max_group:
                raise BadRequestError(
                    f"groups[{number}] has {len(group)} images, expected 2 to "
                    f"{self.settings.max_group}"
                )
        self._check_count(sum(map(len, request.groups)))
        reader = ImageReader(self.settings)
        groups = tuple(
            tuple(reader.read(v, f"groups[{n}][{i}]") for i, v in enumerate(group))
            for n, group in enumerate(request.groups)
        )
        sources = self._sources(reader, request.sources, count)
        rubrics = self.rubrics(request.rubric, count, request.sources is not None)
        options = self._pair(request, rubrics)
        return RankCall(tuple(request.prompts), groups, sources, rubrics, options)

    def rubrics(
        self, spec: RubricSpec | list[RubricSpec] | None, count: int, is_edit: bool
    ) -> tuple[Rubric, ...]:
        """One rubric per item.

        Raises:
            BadRequestError: Another number of rubrics, an unknown name, the other task.
        """
        task: Task = "edit" if is_edit else "t2i"
        if isinstance(spec, list):
            if len(spec) != count:
                raise BadRequestError(f"rubric has {len(spec)} items, prompts has {count}")
            return tuple(self._rubric(one, task, f"rubric[{n}]") for n, one in enumerate(spec))
        return (self._rubric(spec, task, "rubric"),) * count

    def default_rubric(self, task: Task) -> Rubric:
        """The server's rubric if it is for this task, else the packaged default."""
        mine = self.settings.rubric
        return mine if mine is not None and mine.task == task else Rubric.default(task)

    def _rubric(self, spec: RubricSpec | None, task: Task, name: str) -> Rubric:
        try:
            if spec is None:
                rubric = self.default_rubric(task)
            elif isinstance(spec, str):
                # A name, never a path: clients do not read the server's files.
                if spec not in Rubric.builtin_names():
                    known = ", ".join(Rubric.builtin_names())
                    raise BadRequestError(f"{name}: no packaged rubric {spec!r}; known: {known}")
                rubric = Rubric.builtin(spec)
            else:
                rubric = Rubric(**{"name": "request", "task": task, **spec})
        except (RubricError, TypeError) as error:
            # TypeError: a key that no keyword can be, such as "self".
            raise BadRequestError(f"{name}: {error}") from None
        if rubric.task != task:
            needed = "sources" if rubric.task == "edit" else "no sources"
            raise BadRequestError(f"{name}: {rubric.name!r} is for {rubric.task}, needs {needed}")
        if len(rubric.criteria) > self.settings.max_criteria:
            raise BadRequestError(
                f"{name}: {len(rubric.criteria)} criteria, the limit is "
                f"{self.settings.max_criteria}"
            )
        for criterion in rubric.criteria:
            self.check_text(criterion.render(""), f"{name}: criterion {criterion.id!r}")
        return rubric

    def check_text(self, text: str, name: str) -> None:
        """Raises a BadRequestError for text over the limit, or text that is not Unicode."""
        if len(text) > self.settings.max_text:
            limit = self.settings.max_text
            raise BadRequestError(f"{name} has {len(text)} characters, the limit is {limit}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise BadRequestError(f"{name} holds a lone surrogate") from None

    def _check_prompts(self, prompts: list[str]) -> int:
        if len(prompts) > self.settings.max_items:
            raise BadRequestError(
                f"prompts has {len(prompts)} items, the limit is {self.settings.max_items}"
            )
        for number, prompt in enumerate(prompts):
            if not prompt.strip():
                raise BadRequestError(f"prompts[{number}] is empty")
            self.check_text(prompt, f"prompts[{number}]")
        return len(prompts)

    def _list(
        self, reader: ImageReader, values: list[WireImage], count: int, name: str
    ) -> tuple[CanonicalImage, ...]:
        if len(values) != count:
            raise BadRequestError(f"{name} has {len(values)} items, prompts has {count}")
        self._check_count(count)
        return tuple(reader.read(value, f"{name}[{n}]") for n, value in enumerate(values))

    def _sources(
        self, reader: ImageReader, values: list[WireImage] | None, count: int
    ) -> tuple[CanonicalImage, ...] | None:
        return None if values is None else self._list(reader, values, count, "sources")

    def _check_count(self, images: int) -> None:
        if images > self.settings.max_images:
            raise BadRequestError(f"{images} images, the limit is {self.settings.max_images}")

    def _pair(self, request: _PairRequest, rubrics: tuple[Rubric, ...]) -> PairOptions:
        weights = request.learned_weights
        try:
            rule = rule_of(request.aggregation, request.mode, weights)
        except VerdictError as error:
            raise BadRequestError(str(error)) from None
        if weights is not None and {len(each.criteria) for each in rubrics} != {len(weights)}:
            raise BadRequestError('"learned" needs one learned_weights entry per criterion')
        return PairOptions(
            orders=request.orders,
            mode=request.mode,
            label_mass=request.label_mass,
            label_mass_threshold=request.label_mass_threshold,
            aggregation=rule,
            temperature=request.temperature,
            margin=request.margin,
            inconsistent=request.inconsistent,
            learned_weights=None if weights is None else tuple(weights),
        )
