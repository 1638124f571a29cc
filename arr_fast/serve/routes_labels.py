"""Routes that read labels for other people's prompts: /v1/systemone and /v1/score."""

from __future__ import annotations

from typing import Any

import numpy as np
from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.requests import Request

from arr_fast.prompts import ImageSlot, Part
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.gateway import Gateway
from arr_fast.serve.images_in import ImageReader
from arr_fast.serve.label_calls import LabelCall, LabelReading
from arr_fast.serve.routes_judge import REFUSALS
from arr_fast.serve.systemone import SystemOneRequest, chat_question, response, shared_text

router = APIRouter(tags=["labels"])

MAX_LABELS = 1024


class ScoringRequest(BaseModel):
    """SGLang's label scoring: P(each label token) after query + item, for every item.

    Text is tokenised as it stands, control tokens included: the query is a rendered prompt.
    """

    query: str | list[int] = ""
    items: str | list[str] | list[list[int]]
    label_token_ids: list[int] | list[list[int]] = Field(
        min_length=1, description="Shared by all items, or one list per item."
    )
    apply_softmax: bool = Field(
        False, description="Normalise over the labels instead of the vocabulary."
    )
    temperature: float = Field(1.0, gt=0.0, allow_inf_nan=False)
    item_first: bool = False
    model: str | None = None


@router.post("/v1/systemone", responses=REFUSALS)
async def systemone(request: Request, body: SystemOneRequest) -> JSONResponse:
    """Answers typed questions about a state and images, all of them in one forward."""
    gateway: Gateway = request.app.state.gateway
    readings = await gateway.ask(request, lambda: _systemone_call(gateway, body))
    return JSONResponse(response(body, readings, gateway.model))


@router.post("/v1/score", responses=REFUSALS)
async def label_scores(request: Request, body: ScoringRequest) -> JSONResponse:
    """Scores label tokens after each item."""
    gateway: Gateway = request.app.state.gateway
    backend = gateway.tokenizer.backend_tokenizer
    readings: list[LabelReading] = await gateway.ask(
        request, lambda: _scoring_call(gateway, backend, body)
    )
    tokens = sum(reading.tokens for reading in readings)
    return JSONResponse(
        {
            "object": "scoring",
            "model": gateway.model,
            "scores": [_scores(reading, body) for reading in readings],
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0},
        }
    )


def _systemone_call(gateway: Gateway, body: SystemOneRequest) -> LabelCall:
    settings = gateway.settings
    if len(body.questions) > settings.max_questions:
        raise BadRequestError(
            f"{len(body.questions)} questions, the limit is {settings.max_questions}"
        )
    if len(body.images) > settings.max_images:
        raise BadRequestError(f"{len(body.images)} images, the limit is {settings.max_images}")
    text = shared_text(body)
    gateway.builder.check_text(text, "state")
    for name in body.questions:
        gateway.builder.check_text(name, "a question id")
    questions = tuple(chat_question(name, q) for name, q in body.questions.items())
    for question in questions:
        gateway.builder.check_text(question.text, question.name)
    read = ImageReader(settings).read
    images = tuple(read(value, f"images[{n}]") for n, value in enumerate(body.images))
    parts: list[Part] = []
    for number in range(len(images)):
        label = "Image" if len(images) == 1 else f"Image {number + 1}"
        parts += [f"\n{label}: ", ImageSlot(number)]
    return LabelCall(parts=(text, *parts), images=images, questions=questions)


def _scoring_call(gateway: Gateway, backend: Any, body: ScoringRequest) -> LabelCall:
    items: list[Any] = [body.items] if isinstance(body.items, str) else list(body.items)
    if not items:
        raise BadRequestError("items is empty")
    if len(items) > gateway.settings.max_questions:
        limit = gateway.settings.max_questions
        raise BadRequestError(f"{len(items)} items, the limit is {limit}")
    sequences = []
    for number, item in enumerate(items):
        first, second = (item, body.query) if body.item_first else (body.query, item)
        if isinstance(first, str) and isinstance(second, str):
            gateway.builder.check_text(first + second, f"items[{number}]")
            # The backend, not the tokenizer: calling that one sets state that threads share.
            ids = [int(token) for token in backend.encode(first + second).ids]
        elif isinstance(first, list) and isinstance(second, list):
            ids = [*first, *second]
        else:
            raise BadRequestError(f"query and items[{number}] must both be text or both token ids")
        if not ids:
            raise BadRequestError(f"query and items[{number}] hold no token")
        if len(ids) > gateway.settings.max_text:
            limit = gateway.settings.max_text
            raise BadRequestError(f"items[{number}] has {len(ids)} tokens, the limit is {limit}")
        sequences.append(tuple(ids))
    return LabelCall(
        sequences=tuple(sequences), label_ids=_labels(body.label_token_ids, len(items))
    )


def _labels(given: list[int] | list[list[int]], count: int) -> tuple[tuple[int, ...], ...]:
    """Label tokens of each item."""
    rows = [row for row in given if isinstance(row, list)]
    lists = rows if rows else [[t for t in given if isinstance(t, int)]] * count
    if rows and len(rows) != count:
        raise BadRequestError(f"label_token_ids has {len(rows)} lists, items has {count}")
    for number, row in enumerate(lists):
        if not 1 <= len(row) <= MAX_LABELS:
            raise BadRequestError(
                f"label_token_ids[{number}] has {len(row)} tokens, expected 1 to {MAX_LABELS}"
            )
        if len(set(row)) != len(row):
            raise BadRequestError(f"label_token_ids[{number}] repeats a token")
    return tuple(tuple(row) for row in lists)


def _scores(reading: LabelReading, body: ScoringRequest) -> list[float]:
    if not body.apply_softmax:
        return [float(p) for p in np.exp(reading.log_probs)]
    logits = reading.log_probs / body.temperature
    weights = np.exp(logits - logits.max())
    return [float(p) for p in weights / weights.sum()]
