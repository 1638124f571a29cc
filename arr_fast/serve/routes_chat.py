"""The OpenAI chat route, just wide enough for the ARR reference's evaluation prompts."""

from __future__ import annotations

import json
import time
import uuid
from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field
from starlette.requests import Request

from arr_fast.serve.arr_prompt import ArrPrompt, parse
from arr_fast.serve.calls import Call, PairOptions, RankCall, ScoreCall
from arr_fast.serve.failures import BadRequestError, UnjudgedError
from arr_fast.serve.gateway import Gateway
from arr_fast.serve.images_in import ImageReader
from arr_fast.serve.routes_judge import REFUSALS

router = APIRouter(tags=["chat"])


class ChatRequest(BaseModel):
    """A chat request; sampling options are accepted and have no effect, as nothing is sampled."""

    model: str = ""
    messages: list[dict[str, Any]] = Field(min_length=1)
    stream: bool = False
    n: int | None = Field(1, ge=1, le=1)


@router.get("/v1/models")
async def models(request: Request) -> dict[str, Any]:
    """The one model that is served."""
    gateway: Gateway = request.app.state.gateway
    return {"object": "list", "data": [_model(gateway.model)]}


@router.get("/v1/models/{name:path}")
async def model(request: Request, name: str) -> dict[str, Any]:
    """The served model, whatever name was asked for."""
    del name
    gateway: Gateway = request.app.state.gateway
    return _model(gateway.model)


@router.post("/v1/chat/completions", responses=REFUSALS)
async def chat(request: Request, body: ChatRequest) -> JSONResponse:
    """Answers a ranking or scoring prompt of the ARR reference with the JSON that it expects."""
    gateway: Gateway = request.app.state.gateway
    if body.stream:
        raise BadRequestError("stream is not supported: the answer is read, not generated")
    prompt = await gateway.decode(request, lambda: parse(body.messages, gateway.settings))
    result = await gateway.ask(request, lambda: _call(gateway, prompt))
    content = _ranked(result) if prompt.kind == "rank" else _scored(result, prompt)
    message = {"role": "assistant", "content": json.dumps(content), "refusal": None}
    return JSONResponse(
        {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": gateway.model,
            "choices": [
                {"index": 0, "message": message, "finish_reason": "stop", "logprobs": None}
            ],
            "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
        }
    )


def _call(gateway: Gateway, prompt: ArrPrompt) -> Call:
    builder, settings = gateway.builder, gateway.settings
    if len(prompt.images) > settings.max_group:
        raise BadRequestError(f"{len(prompt.images)} images, the limit is {settings.max_group}")
    builder.check_text(prompt.caption, "the caption")
    # Through the builder, so that a rubric in a prompt meets the same limits as any other.
    spec = prompt.rubric.model_dump(exclude_defaults=True)
    rubrics = builder.rubrics(spec, 1, prompt.source is not None)
    read = ImageReader(settings).read
    images = tuple(read(v, f"image {n + 1}") for n, v in enumerate(prompt.images))
    sources = None if prompt.source is None else (read(prompt.source, "image BASE"),)
    if prompt.kind == "score":
        return ScoreCall((prompt.caption,), images, sources, rubrics)
    return RankCall((prompt.caption,), (images,), sources, rubrics, PairOptions())


def _ranked(result: dict[str, Any]) -> dict[str, Any]:
    """rank[i] is the place of image i, 1 the best; the format knows no tie.

    Raises:
        UnjudgedError: A pair could not be judged; a rank would be invented.
    """
    group = result["groups"][0]
    for pair in group["pairs"]:
        if pair["status"] == "error":
            raise UnjudgedError(f"no verdict: {pair['error']}")
    rank = [0] * len(group["ranking"])
    for place, candidate in enumerate(group["ranking"], 1):
        rank[candidate] = place
    ties = sum(pair["status"] == "tie" for pair in group["pairs"])
    rates = ", ".join(f"image {n}: {rate:.3g}" for n, rate in enumerate(group["win_rate"], 1))
    reason = f"Win rates: {rates}. {ties} of {len(group['pairs'])} pairs are ties"
    return {"rank": rank, "reason": reason + (", ordered by log-odds." if ties else ".")}


def _scored(result: dict[str, Any], prompt: ArrPrompt) -> dict[str, Any]:
    """The mean P(yes) on the prompt's integer scale."""
    image = result["images"][0]
    if image["status"] == "error":
        raise UnjudgedError(f"no verdict: {image['error']}")
    score = round(prompt.low + min(1.0, max(0.0, image["score"])) * (prompt.high - prompt.low))
    parts = ", ".join(f"{c['id']}: {c['probability']:.3g}" for c in image["criteria"])
    return {"score": score, "reason": f"P(yes): {parts}."}


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "arr-fast"}
