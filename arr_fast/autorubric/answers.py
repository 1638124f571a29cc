"""Answers of a writer: JSON schemas, and strict parsing after json-repair."""

from __future__ import annotations

import json
import re
import unicodedata
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
)

from arr_fast.autorubric.text_backend import AnswerKind, TextReply
from arr_fast.errors import ArrFastError, MissingDependencyError
from arr_fast.rubric import Level

MAX_CRITERION = 400


def _in_one_line(text: Any) -> Any:
    """Any white space, as Python sees it, is one space; lengths are checked after that."""
    return " ".join(text.split()) if isinstance(text, str) else text


CriterionText = Annotated[
    str,
    BeforeValidator(_in_one_line),
    StringConstraints(min_length=3, max_length=MAX_CRITERION),
]
_THINKING = re.compile(r"^.*?</think>", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s*(.*?)```", re.DOTALL)


class AnswerError(ArrFastError, ValueError):
    """An answer is not what was asked for; `raw` is its text."""

    def __init__(self, message: str, raw: str) -> None:
        super().__init__(message)
        self.raw = raw


class _Answer(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")


class CriteriaAnswer(_Answer):
    """{"criteria": ["...", "..."]}"""

    criteria: list[CriterionText] = Field(min_length=1)


class ThemedCriterion(_Answer):
    """One merged criterion, and the numbers of those it stands for."""

    text: CriterionText
    level: Level
    sources: list[int] = Field(min_length=1)


class Theme(_Answer):
    """A heading with its criteria."""

    theme: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=120)]
    criteria: list[ThemedCriterion] = Field(min_length=1)


class ThemesAnswer(_Answer):
    """{"themes": [{"theme": "...", "criteria": [{"text", "level", "sources"}, ...]}, ...]}"""

    themes: list[Theme] = Field(min_length=1)


_MODELS: dict[AnswerKind, type[_Answer]] = {"criteria": CriteriaAnswer, "themes": ThemesAnswer}


@dataclass(frozen=True, slots=True)
class Criteria:
    """Parsed criteria: distinct, at most as many as asked for.

    Attributes:
        texts: In order.
        repeated: How many were dropped as repetitions (or banned).
        surplus: How many were dropped beyond the limit.
    """

    texts: tuple[str, ...]
    repeated: int
    surplus: int


def json_schema(kind: AnswerKind) -> dict[str, Any]:
    """The JSON schema of an answer, self-contained, every object closed."""
    return _MODELS[kind].model_json_schema()


def parse_criteria(reply: TextReply, limit: int, banned: tuple[str, ...] = ()) -> Criteria:
    """Reads a list of criteria.

    Raises:
        AnswerError: cut off, not JSON even after repair, another shape, or nothing new in it.
    """
    answer = _parse(reply, "criteria")
    assert isinstance(answer, CriteriaAnswer)
    seen = {normal_form(text) for text in banned}
    texts: list[str] = []
    for text in answer.criteria:
        form = normal_form(text)
        if form not in seen:
            seen.add(form)
            texts.append(text)
    if not texts:
        raise AnswerError("no criterion that is new", reply.text)
    repeated = len(answer.criteria) - len(texts)
    return Criteria(tuple(texts[:limit]), repeated, max(0, len(texts) - limit))


def parse_themes_answer(reply: TextReply, count: int) -> ThemesAnswer:
    """Reads merged criteria under themes.

    Args:
        reply: The answer.
        count: How many criteria were given, numbered from 1.

    Raises:
        AnswerError: as `parse_criteria`; also a source that was not given.
    """
    answer = _parse(reply, "themes")
    assert isinstance(answer, ThemesAnswer)
    for theme in answer.themes:
        for criterion in theme.criteria:
            odd = [n for n in criterion.sources if not 1 <= n <= count]
            if odd:
                raise AnswerError(f"sources {odd} are not among 1 to {count}", reply.text)
    return answer


def normal_form(text: str) -> str:
    """What two texts share that differ in case, spaces and final stops alone."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(folded.split()).rstrip(" .!;")


def _parse(reply: TextReply, kind: AnswerKind) -> _Answer:
    if reply.finish == "length":
        # A repaired half sentence would pass for a criterion.
        raise AnswerError(f"cut off after {reply.completion_tokens} tokens", reply.text)
    value = _load(reply.text)
    try:
        return _MODELS[kind].model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "answer"
        raise AnswerError(f"{where}: {first['msg']}", reply.text) from None


def _load(raw: str) -> Any:
    text = _THINKING.sub("", raw, count=1).strip()
    try:
        return json.loads(text)
    except ValueError:
        pass
    try:
        from json_repair import loads
    except ImportError:
        raise MissingDependencyError("json-repair", "autorubric") from None
    fenced = _FENCE.search(text)
    body = fenced.group(1) if fenced else text[text.find("{") :] if "{" in text else ""
    if not body.strip():
        raise AnswerError("no JSON object in the answer", raw)
    return loads(body)
