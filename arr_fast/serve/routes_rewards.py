"""Reward protocols of training loops: Flow-Factory's JSON, flow_grpo's pickle, and msgpack.

- `GET /health`, `POST /compute`: Flow-Factory at a0b2bc5 (reward_server/example_server.py).
- `POST /` and `/v1/reward/pickle`: flow_grpo's reward servers and verl-omni at a1139ba
  (docs/start/http_scorer.md); `POST /mode/logits_non_cot`: Edit-R1 at 4217f25. Off by default.
- `POST /v1/reward/msgpack`: the same objects as msgpack; no code can hide in it.

None of them has a place for an abstention, so an image without a verdict gets the mean reward of
its prompt's other images (see integrations/groups.py).
"""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import msgpack
from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.requests import Request

from arr_fast.errors import VerdictError
from arr_fast.integrations.groups import fill_abstentions, places_by_key
from arr_fast.rubric import Criterion, Rubric
from arr_fast.serve.calls import Call, PairOptions, RankCall, ScoreCall
from arr_fast.serve.failures import BadRequestError, ForbiddenError, ServeError, UnjudgedError
from arr_fast.serve.gateway import Gateway
from arr_fast.serve.guard import error_headers
from arr_fast.serve.images_in import ImageReader
from arr_fast.serve.routes_judge import REFUSALS
from arr_fast.serve.settings import is_loopback
from arr_fast.serve.unpickle import load_plain

router = APIRouter(tags=["rewards"])
pickle_router = APIRouter(tags=["rewards"], include_in_schema=False)


class ComputeRequest(BaseModel):
    """Flow-Factory's payload; videos are refused by name."""

    prompt: list[str]
    image: list[str] | None = None
    condition_images: list[list[str]] | None = None
    video: Any = None
    condition_videos: Any = None


@router.post("/compute", responses=REFUSALS)
async def compute(request: Request, body: ComputeRequest) -> JSONResponse:
    """Flow-Factory's remote reward: one number per image."""
    if body.video or body.condition_videos or not body.image:
        raise BadRequestError("image is needed; videos are not judged")
    sources = None
    if body.condition_images:
        for number, images in enumerate(body.condition_images):
            if len(images) != 1:
                raise BadRequestError(
                    f"condition_images[{number}] has {len(images)} images, expected 1"
                )
        sources = [images[0] for images in body.condition_images]
    rewards = await _rewards(request, body.prompt, body.image, sources)
    return JSONResponse({"rewards": rewards})


@router.post("/v1/reward/msgpack", responses=REFUSALS)
async def reward_msgpack(request: Request) -> Response:
    """flow_grpo's payload as msgpack: {"images": [bytes], "prompts": [str], ...}."""
    data = await request.body()
    gateway: Gateway = request.app.state.gateway
    answer = await _answer(request, await gateway.decode(request, lambda: _unpack(data)))
    return Response(msgpack.packb(answer), media_type="application/msgpack")


@pickle_router.post("/")
@pickle_router.post("/v1/reward/pickle")
@pickle_router.post("/mode/logits_non_cot")
async def reward_pickle(request: Request) -> Response:
    """The same as a pickle of plain data, from this machine only."""
    headers: dict[str, str] = {}
    status = 200
    try:
        if not is_loopback(request.client.host if request.client else None):
            raise ForbiddenError("the pickle protocol is for this machine only")
        data = await request.body()
        gateway: Gateway = request.app.state.gateway
        answer = await _answer(request, await gateway.decode(request, lambda: load_plain(data)))
    except ServeError as error:
        answer = {"error": str(error)}
        status, headers = error.status, error_headers(error)
    body = pickle.dumps(answer, protocol=4)
    return Response(body, status, headers, media_type="application/octet-stream")


def _unpack(data: bytes) -> Any:
    try:
        return msgpack.unpackb(data, raw=False, strict_map_key=True)
    except Exception as error:
        raise BadRequestError(f"not msgpack: {type(error).__name__}") from None


async def _answer(request: Request, payload: Any) -> dict[str, Any]:
    """Scores a flow_grpo payload, in whichever of its dialects it comes."""
    if not isinstance(payload, dict):
        raise BadRequestError(f"expected a dict, got {type(payload).__name__}")
    images = _typed(payload, "images", bytes)
    # GenEval's dialect has the prompts inside its records, and answers with five names.
    records = payload.get("meta_datas")
    if "prompts" not in payload and isinstance(records, list):
        prompts = [r.get("prompt") if isinstance(r, dict) else None for r in records]
        payload = {**payload, "prompts": prompts}
    prompts = _typed(payload, "prompts", str)
    sources = _typed(payload, "ref_images", bytes) if payload.get("ref_images") else None
    scores = await _rewards(request, prompts, images, sources, _requirements(payload))
    if records is None:
        return {"scores": scores}
    return {
        "scores": scores,
        "rewards": scores,
        "strict_rewards": scores,
        "group_rewards": {},
        "group_strict_rewards": {},
    }


async def _rewards(
    request: Request,
    prompts: list[str],
    images: list[Any],
    sources: list[Any] | None,
    requirements: list[str] | None = None,
) -> list[float]:
    """One number per image, by the server's reward mode."""
    gateway: Gateway = request.app.state.gateway
    is_group = gateway.settings.reward_mode == "group"
    build: Callable[..., Call] = _group_call if is_group else _point_call
    result = await gateway.ask(
        request, lambda: build(gateway, prompts, images, sources, requirements)
    )
    keys = _keys(prompts, sources)
    rewards: list[float | None]
    if is_group:
        rewards = [None] * len(prompts)
        for group, places in zip(result["groups"], places_by_key(keys).values(), strict=True):
            for place, rate in zip(places, group["win_rate"], strict=True):
                rewards[place] = rate
    else:
        rewards = [image["score"] for image in result["images"]]
        gateway.metrics.count_statuses("score", [i["status"] for i in result["images"]])
    try:
        return fill_abstentions(rewards, keys)
    except VerdictError as error:
        raise UnjudgedError(str(error)) from None


def _point_call(
    gateway: Gateway,
    prompts: list[str],
    images: list[Any],
    sources: list[Any] | None,
    requirements: list[str] | None,
) -> ScoreCall:
    rubrics = _rubrics(gateway, prompts, images, sources, requirements)
    read = ImageReader(gateway.settings).read
    return ScoreCall(
        tuple(prompts),
        tuple(read(image, f"images[{n}]") for n, image in enumerate(images)),
        None if sources is None else tuple(read(s, f"sources[{n}]") for n, s in enumerate(sources)),
        rubrics,
    )


def _group_call(
    gateway: Gateway,
    prompts: list[str],
    images: list[Any],
    sources: list[Any] | None,
    requirements: list[str] | None,
) -> RankCall:
    rubrics = _rubrics(gateway, prompts, images, sources, requirements)
    groups = places_by_key(_keys(prompts, sources))
    for places in groups.values():
        if not 2 <= len(places) <= gateway.settings.max_group:
            raise BadRequestError(
                f"prompts[{places[0]}] has {len(places)} images in this request; reward mode "
                f"'group' needs 2 to {gateway.settings.max_group} of each prompt"
            )
    read = ImageReader(gateway.settings).read
    firsts = [places[0] for places in groups.values()]
    chosen = tuple(rubrics[first] for first in firsts)
    return RankCall(
        tuple(prompts[first] for first in firsts),
        tuple(tuple(read(images[p], f"images[{p}]") for p in ps) for ps in groups.values()),
        None if sources is None else tuple(read(sources[f], f"sources[{f}]") for f in firsts),
        chosen,
        PairOptions(),
    )


def _rubrics(
    gateway: Gateway,
    prompts: list[str],
    images: list[Any],
    sources: list[Any] | None,
    requirements: list[str] | None,
) -> tuple[Rubric, ...]:
    """Checks lengths and texts; one rubric per image, with an item's own requirement appended."""
    lists = {"images": images, "sources": sources, "metadatas": requirements}
    for name, values in lists.items():
        if values is not None and len(values) != len(prompts):
            raise BadRequestError(f"{name} has {len(values)} items, prompts has {len(prompts)}")
    if not 1 <= len(prompts) <= gateway.settings.max_images:
        limit = gateway.settings.max_images
        raise BadRequestError(f"{len(prompts)} prompts, expected 1 to {limit}")
    for number, prompt in enumerate(prompts):
        if not prompt.strip():
            raise BadRequestError(f"prompts[{number}] is empty")
        gateway.builder.check_text(prompt, f"prompts[{number}]")
    rubric = gateway.builder.default_rubric("t2i" if sources is None else "edit")
    rubrics = [rubric] * len(prompts)
    for number, text in enumerate(requirements or ()):
        if text.strip():
            gateway.builder.check_text(text, f"metadatas[{number}]")
            criterion = Criterion(id="request.requirement", text=text)
            added = {"criteria": (*rubric.criteria, criterion), "calibration": {}}
            rubrics[number] = rubric.model_copy(update=added)
    return tuple(rubrics)


def _keys(prompts: list[str], sources: list[Any] | None) -> list[Any]:
    """What makes a group: the prompt, and the source of an edit."""
    return [*zip(prompts, sources or [None] * len(prompts), strict=True)]


def _requirements(payload: dict[str, Any]) -> list[str] | None:
    """Edit-R1's per-item requirement."""
    records = payload.get("metadatas")
    if not isinstance(records, list):
        return None
    found = [r.get("requirement", "") if isinstance(r, dict) else "" for r in records]
    return [text if isinstance(text, str) else "" for text in found]


def _typed(payload: dict[str, Any], name: str, kind: type) -> list[Any]:
    values = payload.get(name)
    if not isinstance(values, list | tuple) or not all(isinstance(v, kind) for v in values):
        raise BadRequestError(f"{name} must be a list of {kind.__name__}")
    return list(values)
