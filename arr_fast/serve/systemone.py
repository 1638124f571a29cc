"""The System One decision format: a state, images, typed questions; probabilities in the answers.

The request and answer shapes are those that SGLang (python/sglang/srt/entrypoints/systemone at
9bf099f) and vLLM (vllm/entrypoints/generate/structured_decisions at 142a8f0) publish for
POST /v1/systemone. The answers hold the union of both. `confidence` is where they differ: SGLang's
rule (how far the answer stands out among the options) is the default, vLLM's (probability times
label mass) comes with `"confidence_rule": "label_mass"`, an extension of ours.
"""

from __future__ import annotations

import json
import string
import time
import uuid
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.label_calls import ChatQuestion, LabelReading

MAX_CHOICES = len(string.ascii_uppercase)
MAX_LEVELS = 10


class _Question(BaseModel):
    model_config = ConfigDict(extra="forbid")
    instructions: Any = None


class NoulCriteria(BaseModel):
    """What yes and no mean."""

    model_config = ConfigDict(extra="forbid")
    true: Any = None
    false: Any = None


class NoulQuestion(_Question):
    """Yes or no."""

    type: Literal["noul"]
    criteria: NoulCriteria | None = None

    @model_validator(mode="after")
    def _asks_something(self) -> NoulQuestion:
        criteria = self.criteria or NoulCriteria()
        if not any(_words(v).strip() for v in (self.instructions, criteria.true, criteria.false)):
            raise ValueError("a noul question needs instructions, or what true or false means")
        return self


class ChoiceQuestion(_Question):
    """One of some named options."""

    type: Literal["choice"]
    criteria: dict[str, Any] = Field(min_length=1, max_length=MAX_CHOICES)


class ScoreQuestion(_Question):
    """A place on a scale of levels, from the first to the last."""

    type: Literal["score"]
    criteria: list[Any] = Field(min_length=1, max_length=MAX_LEVELS)


class SystemOneRequest(BaseModel):
    """A state, images, and questions by id; unknown top-level fields are ignored, as upstream."""

    state: Any
    images: list[str | dict[str, Any]] = Field(default_factory=list)
    model: str | None = None
    instructions: str | None = Field(None, description="Context ahead of the questions (vLLM).")
    questions: dict[
        str,
        Annotated[NoulQuestion | ChoiceQuestion | ScoreQuestion, Field(discriminator="type")],
    ] = Field(min_length=1)
    confidence_rule: Literal["margin", "label_mass"] = "margin"

    @field_validator("questions")
    @classmethod
    def _ids_are_names(cls, value: dict[str, Any]) -> dict[str, Any]:
        if "" in value:
            raise ValueError("question ids must not be empty")
        return value


Question = NoulQuestion | ChoiceQuestion | ScoreQuestion


def shared_text(request: SystemOneRequest) -> str:
    """What comes before the images and the questions."""
    lines = [request.instructions] if request.instructions else []
    lines.append(f"State: {_words(request.state)}")
    return "\n".join(lines)


def chat_question(name: str, question: Question) -> ChatQuestion:
    """The question as the model reads it, with a label per option."""
    lines = []
    asked = _words(question.instructions).strip()
    if asked:
        lines.append(f"Question: {asked}")
    if isinstance(question, NoulQuestion):
        labels: tuple[str, ...] = ("Yes", "No")
        criteria = question.criteria or NoulCriteria()
        for label, meaning in zip(labels, (criteria.true, criteria.false), strict=True):
            if _words(meaning).strip():
                lines.append(f"{label} means: {_words(meaning)}")
        lines.append("Reply with Yes or No.")
    elif isinstance(question, ChoiceQuestion):
        labels = tuple(string.ascii_uppercase[: len(question.criteria)])
        for label, (option, detail) in zip(labels, question.criteria.items(), strict=True):
            lines.append(f"{label}: {option}" + (f" ({_words(detail)})" if detail else ""))
        lines.append("Reply with the letter of one option.")
    else:
        labels = tuple(string.digits[: len(question.criteria)])
        for label, level in zip(labels, question.criteria, strict=True):
            lines.append(f"{label}: {_words(level)}")
        lines.append("Reply with the number of one level.")
    return ChatQuestion(f"question {name!r}", "\n" + "\n".join(lines), labels)


def answer(question: Question, reading: LabelReading, rule: str) -> dict[str, Any]:
    """The answer to one question.

    Args:
        question: The question.
        reading: Its labels, in the order of its options.
        rule: "margin" or "label_mass", see the module.
    """
    p = reading.probabilities
    mass = reading.mass
    top = int(p.argmax())
    if isinstance(question, NoulQuestion):
        noul: dict[str, Any] = {
            "type": "noul",
            "noul": float(p[0]),
            "probabilities": {"yes": float(p[0]), "no": float(p[1])},
            "x_label_mass": mass,
        }
        if rule == "label_mass":
            noul["confidence"] = float(p[top]) * mass
        return noul
    if isinstance(question, ChoiceQuestion):
        names = list(question.criteria)
        margin = 1.0 if len(p) == 1 else (len(p) * float(p[top]) - 1) / (len(p) - 1)
        return {
            "type": "choice",
            "choice": names[top],
            "confidence": _unit(margin) if rule == "margin" else float(p[top]) * mass,
            "probabilities": dict(zip(names, map(float, p), strict=True)),
            "x_label_mass": mass,
        }
    levels = np.arange(len(p))
    spread = float((p * np.abs(levels - top)).sum())
    even = float(np.abs(levels - (len(p) - 1) / 2).mean())
    margin = 1.0 if len(p) == 1 else 1.0 - spread / even
    return {
        "type": "score",
        "score": float((levels * p).sum()),
        "confidence": _unit(margin) if rule == "margin" else float(p[top]) * mass,
        "legend": {str(n): level for n, level in enumerate(question.criteria)},
        "probabilities": {str(n): float(value) for n, value in enumerate(p)},
        "x_label_mass": mass,
    }


def response(request: SystemOneRequest, readings: list[LabelReading], model: str) -> dict[str, Any]:
    """The whole answer.

    `argmax_is_label` is true where one label holds over half of the whole probability, and null
    where the read, which does not look at other tokens one by one, cannot tell.
    """
    answers = {}
    diagnostics = {}
    for (name, question), reading in zip(request.questions.items(), readings, strict=True):
        answers[name] = answer(question, reading, request.confidence_rule)
        sure = bool(np.exp(reading.log_probs.max()) > 0.5)
        diagnostics[name] = {
            "label_mass": reading.mass,
            "argmax_is_label": True if sure else None,
        }
    return {
        "id": f"systemone-{uuid.uuid4().hex}",
        "object": "structured_decision",
        "created": int(time.time()),
        "model": model,
        "answers": answers,
        "usage": {"input_tokens": sum(r.tokens for r in readings), "output_tokens": 0},
        "diagnostics": diagnostics,
    }


def _words(value: Any) -> str:
    """Text as it is, None as nothing, anything else as JSON.

    Raises:
        BadRequestError: It holds NaN or an infinity, which no JSON could echo.
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except ValueError:
        raise BadRequestError("NaN and infinities are not JSON") from None


def _unit(value: float) -> float:
    return min(1.0, max(0.0, value))
