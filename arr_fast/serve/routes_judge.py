"""Our own routes: compare, score and rank, with every verdict in the answer."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter
from fastapi.responses import JSONResponse
from starlette.requests import Request

from arr_fast.serve.gateway import Gateway
from arr_fast.serve.wire import CompareRequest, JudgeAnswer, RankRequest, ScoreRequest

router = APIRouter(prefix="/v1/judge", tags=["judge"])

REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "The request makes no sense; the message names the item"},
    413: {"description": "The body is over the limit"},
    429: {"description": "The queue is full; see Retry-After"},
    503: {"description": "The server is stopping, or the judge sleeps"},
    504: {"description": "The deadline passed"},
}


@router.post("/compare", response_model=JudgeAnswer, responses=REFUSALS)
async def compare(request: Request, body: CompareRequest) -> JSONResponse:
    """Judges pairs of images by every criterion, in both orders."""
    gateway: Gateway = request.app.state.gateway
    answer = await gateway.ask(request, lambda: gateway.builder.compare(body), body.timeout_s)
    return _answer(gateway, "compare", answer, "pairs")


@router.post("/score", response_model=JudgeAnswer, responses=REFUSALS)
async def score(request: Request, body: ScoreRequest) -> JSONResponse:
    """Scores single images by every criterion."""
    gateway: Gateway = request.app.state.gateway
    answer = await gateway.ask(request, lambda: gateway.builder.score(body), body.timeout_s)
    return _answer(gateway, "score", answer, "images")


@router.post("/rank", response_model=JudgeAnswer, responses=REFUSALS)
async def rank(request: Request, body: RankRequest) -> JSONResponse:
    """Ranks groups of candidates by all of their pairs."""
    gateway: Gateway = request.app.state.gateway
    answer = await gateway.ask(request, lambda: gateway.builder.rank(body), body.timeout_s)
    pairs = [pair for group in answer["groups"] for pair in group["pairs"]]
    gateway.metrics.count_statuses("rank", [pair["status"] for pair in pairs])
    return JSONResponse(answer)


def _answer(gateway: Gateway, kind: str, answer: dict[str, Any], items: str) -> JSONResponse:
    gateway.metrics.count_statuses(kind, [item["status"] for item in answer[items]])
    return JSONResponse(answer)
