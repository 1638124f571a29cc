"""The explicit reward as data: `Criterion` and `Rubric`.

A rubric is a list of criteria, each checkable on its own. It is read from and written to YAML,
JSON, or the reference's "Theme: ... / - Tip 1: ..." text (arXiv 2605.08354, appendix I).
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections import Counter
from importlib import resources
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from arr_fast.errors import RubricError
from arr_fast.rubric_text import parse_themes, render_themes, slugs

Task = Literal["t2i", "edit"]
Level = Literal["coarse", "mid", "fine"]

logger = logging.getLogger(__name__)
_YAML, _JSON, _TEXT = (".yaml", ".yml"), (".json",), (".txt", ".md")


class _Strict(BaseModel):
    """Frozen, closed pydantic model whose failures are `RubricError`s that name the item."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **data: Any) -> None:
        try:
            super().__init__(**data)
        except ValidationError as error:
            raise RubricError(_describe(error, data, type(self).__name__)) from None


class Criterion(_Strict):
    """One independently checkable statement.

    Attributes:
        id: Short unique name; results are labelled with it. "holistic" is reserved.
        text: What the judge reads; may contain {caption}.
        theme: Heading that groups criteria; not read by the judge.
        tips: Clauses that spell the text out; read by the judge, one per line.
        weight: Weight in the aggregation; finite, may be negative (a pitfall).
        level: Place in the hierarchy of eq. 10.
        essential: Whether losing it loses the pair under the `veto` rule.
        provenance: Free text: where the criterion comes from.
    """

    id: str = Field(max_length=100)
    text: str
    theme: str | None = None
    tips: tuple[str, ...] = ()
    weight: float = 1.0
    level: Level = "mid"
    essential: bool = False
    provenance: str | None = None

    @field_validator("id")
    @classmethod
    def _id_is_a_name(cls, value: str) -> str:
        if not value or value != "".join(value.split()):
            raise ValueError("must be non-empty and without white space")
        if value == "holistic":
            raise ValueError("is reserved for the whole-rubric verdict")
        return value

    @field_validator("text")
    @classmethod
    def _text_is_not_empty(cls, value: str) -> str:
        if not value.strip():
            raise ValueError("is empty")
        return value.strip()

    @field_validator("tips")
    @classmethod
    def _tips_are_not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for index, tip in enumerate(value):
            if not tip.strip():
                raise ValueError(f"tip {index} is empty")
        return tuple(tip.strip() for tip in value)

    @field_validator("weight")
    @classmethod
    def _weight_is_finite(cls, value: float) -> float:
        if not math.isfinite(value):
            raise ValueError(f"must be finite, got {value}")
        return value

    def render(self, caption: str) -> str:
        """Returns what the judge reads: text and tips, with {caption} substituted literally."""
        lines = [self.text, *(f"- {tip}" for tip in self.tips)]
        # str.replace, not str.format: braces in captions and criteria are ordinary text.
        return "\n".join(lines).replace("{caption}", caption)


class Calibration(_Strict):
    """A temperature and margin fitted for one model, rubric and aggregation rule.

    Attributes:
        temperature: P(A > B) = sigmoid(Z / temperature); positive.
        margin: |Z| up to this is a tie; at least 0, in units of Z.
        rubric_hash: `Rubric.content_hash` at the time of the fit.
    """

    temperature: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    margin: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    rubric_hash: str


class Rubric(_Strict):
    """A named set of criteria for one task.

    Attributes:
        name: Name for reports.
        task: "t2i" (two images for a caption) or "edit" (two edits of a source image).
        criteria: At least one, ids unique, at least one weight other than 0.
        calibration: Fitted values by model revision, then by aggregation rule.
    """

    name: str = Field(min_length=1)
    task: Task = "t2i"
    criteria: tuple[Criterion, ...]
    calibration: dict[str, dict[str, Calibration]] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _criteria_are_a_set(self) -> Self:
        if not self.criteria:
            raise ValueError("has no criteria, expected at least one")
        counts = Counter(criterion.id for criterion in self.criteria)
        repeated = [name for name, count in counts.items() if count > 1]
        if repeated:
            raise ValueError(f"criterion ids must be unique, repeated: {', '.join(repeated)}")
        if all(criterion.weight == 0.0 for criterion in self.criteria):
            raise ValueError("every weight is 0, so no criterion would count")
        return self

    def __len__(self) -> int:
        return len(self.criteria)

    @property
    def ids(self) -> tuple[str, ...]:
        """The criterion ids, in order."""
        return tuple(criterion.id for criterion in self.criteria)

    @property
    def content_hash(self) -> str:
        """sha256 hex over what moves a verdict.

        That is the task and, per criterion, text, tips, weight and essential. Ids, names, themes,
        levels and provenance may change without changing the hash.
        """
        content = {
            "task": self.task,
            "criteria": [
                {"text": c.text, "tips": c.tips, "weight": c.weight, "essential": c.essential}
                for c in self.criteria
            ],
        }
        canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(canonical.encode("utf-8", "surrogatepass")).hexdigest()

    @classmethod
    def load(cls, path: str | Path, *, task: Task | None = None) -> Rubric:
        """Reads a rubric from .yaml, .yml, .json, or theme text (.txt, .md).

        Args:
            path: The file.
            task: Task of a text file (which cannot say it; "t2i" if None); refused where the file
                names another.

        Raises:
            RubricError: for a file that is missing, of another type, or malformed.
        """
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix not in _YAML + _JSON + _TEXT:
            expected = ", ".join(_YAML + _JSON + _TEXT)
            raise RubricError(f"{path}: unknown rubric suffix {suffix!r}, expected {expected}")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RubricError(f"{path}: cannot read: {error}") from error
        if suffix in _TEXT:
            return cls.from_text(text, name=path.stem, task=task or "t2i")
        return cls._from_document(text, str(path), suffix in _JSON, task)

    @classmethod
    def _from_document(cls, text: str, where: str, is_json: bool, task: Task | None) -> Rubric:
        try:
            data = json.loads(text) if is_json else yaml.safe_load(text)
        except (ValueError, yaml.YAMLError) as error:
            kind = "JSON" if is_json else "YAML"
            raise RubricError(f"{where}: not valid {kind}: {error}") from error
        if not isinstance(data, dict):
            raise RubricError(f"{where}: expected a mapping with name, task and criteria")
        try:
            rubric = cls(**{str(key): value for key, value in data.items()})
        except RubricError as error:
            raise RubricError(f"{where}: {error}") from None
        if task is not None and rubric.task != task:
            raise RubricError(f"{where}: is a rubric for {rubric.task}, expected {task}")
        return rubric

    def save(self, path: str | Path) -> None:
        """Writes the rubric in the format of the suffix, as in `load`; text loses weights."""
        path = Path(path)
        suffix = path.suffix.lower()
        if suffix in _TEXT:
            text = self.to_text()
        else:
            data = self.model_dump(mode="json", exclude_defaults=True)
            data = {"name": self.name, "task": self.task, **data}
            if suffix in _JSON:
                text = json.dumps(data, indent=2, ensure_ascii=False) + "\n"
            elif suffix in _YAML:
                text = yaml.safe_dump(data, sort_keys=False, allow_unicode=True, width=100)
            else:
                expected = ", ".join(_YAML + _JSON + _TEXT)
                raise RubricError(f"{path}: unknown rubric suffix {suffix!r}, expected {expected}")
        path.write_text(text, encoding="utf-8")

    @classmethod
    def from_text(
        cls, text: str, *, name: str = "rubric", task: Task = "t2i", split_tips: bool = False
    ) -> Rubric:
        """Reads the reference's theme text, or a plain numbered list.

        Args:
            text: "Theme: X" lines, each followed by "- Tip 1: ..." lines; numbering, "Rubric 2:",
                bold marks and nested dashes are accepted. Without any theme, "1. ..." items.
            name: Name of the rubric.
            task: Its task; the text does not say.
            split_tips: Make every tip a criterion of its own (text = tip) instead of one criterion
                per theme (text = theme, with its tips).

        Raises:
            RubricError: for a line that belongs to no theme or item, with its number.
        """
        criteria: list[dict[str, Any]] = []
        for theme, tips in parse_themes(text):
            if split_tips and tips:
                criteria.extend({"theme": theme, "text": tip} for tip in tips)
            else:
                criteria.append({"theme": theme, "text": theme, "tips": tips})
        names = slugs([criterion["text"] for criterion in criteria])
        for criterion, slug in zip(criteria, names, strict=True):
            criterion["id"] = slug
        return cls(name=name, task=task, criteria=tuple(Criterion(**c) for c in criteria))

    def to_text(self) -> str:
        """Writes numbered theme text.

        A criterion with tips becomes a theme with its tips. Neighbours that share a theme and have
        no tips become its tips: `from_text(..., split_tips=True)` reads them back.
        """
        blocks: list[tuple[str, list[str]]] = []
        open_theme: str | None = None
        for criterion in self.criteria:
            if criterion.tips or criterion.theme in (None, criterion.text):
                blocks.append((criterion.text, list(criterion.tips)))
                open_theme = None
            elif criterion.theme == open_theme:
                blocks[-1][1].append(criterion.text)
            else:
                open_theme = criterion.theme
                blocks.append((str(criterion.theme), [criterion.text]))
        return render_themes(blocks)

    @classmethod
    def default(cls, task: Task) -> Rubric:
        """Returns the packaged rubric of 20 general criteria for a task."""
        return cls.builtin(task)

    @classmethod
    def builtin(cls, name: str) -> Rubric:
        """Returns a packaged rubric by name; an unknown name lists what there is."""
        names = cls.builtin_names()
        if name not in names:
            raise RubricError(f"no builtin rubric {name!r}; there are: {', '.join(names)}")
        source = resources.files("arr_fast") / "rubrics" / f"{name}.yaml"
        text = source.read_text(encoding="utf-8")
        return cls._from_document(text, f"builtin:{name}", False, None)

    @staticmethod
    def builtin_names() -> tuple[str, ...]:
        """Names of the packaged rubrics."""
        folder = resources.files("arr_fast") / "rubrics"
        return tuple(sorted(f.name[:-5] for f in folder.iterdir() if f.name.endswith(".yaml")))

    def calibration_for(self, revision: str, aggregation: str) -> Calibration | None:
        """Returns the values fitted for a model revision and rule.

        A fit of other criteria (by content hash) is ignored, with a warning.
        """
        found = self.calibration.get(revision, {}).get(aggregation)
        if found is not None and found.rubric_hash != self.content_hash:
            logger.warning(
                "rubric %r: the calibration for %s, %s was fitted on other criteria; ignored",
                self.name,
                revision,
                aggregation,
            )
            return None
        return found

    def with_calibration(
        self, revision: str, aggregation: str, *, temperature: float, margin: float
    ) -> Rubric:
        """Returns a copy that carries fitted values for a model revision and aggregation rule."""
        fitted = Calibration(temperature=temperature, margin=margin, rubric_hash=self.content_hash)
        rules = {**self.calibration.get(revision, {}), aggregation: fitted}
        return self.model_copy(update={"calibration": {**self.calibration, revision: rules}})


def _describe(error: ValidationError, data: dict[str, Any], kind: str) -> str:
    """Turns pydantic's report into one line that names each criterion by place and id."""
    own_id = data.get("id", data.get("name"))
    subject = kind.lower() + (f" {own_id!r}" if isinstance(own_id, str) else "")
    problems = []
    for problem in error.errors(include_url=False):
        path = ""
        for part in problem["loc"]:
            path += f"[{part}]" if isinstance(part, int) else ("." if path else "") + str(part)
        message = problem["msg"].removeprefix("Value error, ")
        problems.append(f"{path}: {message}" if path else message)
    return f"{subject}: " + "; ".join(problems)
