"""The application: routes, errors and the lifespan around one judge."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import anyio.to_thread
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import Request

from arr_fast import __version__
from arr_fast.serve import routes_chat, routes_judge, routes_labels, routes_rewards
from arr_fast.serve.failures import ClientGoneError, InvalidError, ServeError
from arr_fast.serve.gateway import Gateway
from arr_fast.serve.guard import Guard, error_headers, error_object
from arr_fast.serve.settings import ServeSettings

if TYPE_CHECKING:
    from arr_fast.judge import Judge

logger = logging.getLogger("arr_fast.serve")


def create_app(judge: Judge, settings: ServeSettings | None = None) -> FastAPI:
    """An application that serves one judge; it owns the judge until it is shut down.

    Args:
        judge: A loaded judge.
        settings: Limits and options.

    Returns:
        The application; `app.state.gateway` is its `Gateway`.
    """
    settings = settings or ServeSettings()
    gateway = Gateway(judge, settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        if not await anyio.to_thread.run_sync(gateway.close):
            logger.warning("the drain timed out; accepted requests were dropped")

    app = FastAPI(
        title="arr-fast",
        version=__version__,
        description="Many rubric criteria over image pairs, read in one forward.",
        lifespan=lifespan,
    )
    app.state.gateway = gateway
    app.add_middleware(Guard, gateway=gateway)
    app.add_exception_handler(ServeError, _on_serve_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(StarletteHTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_fault)
    app.add_api_route("/health", _health, methods=["GET"], tags=["service"])
    app.add_api_route("/ready", _ready, methods=["GET"], tags=["service"])
    app.add_api_route("/metrics", _metrics, methods=["GET"], tags=["service"])
    app.add_api_route("/limits", _limits, methods=["GET"], tags=["service"])
    app.include_router(routes_judge.router)
    app.include_router(routes_labels.router)
    app.include_router(routes_chat.router)
    app.include_router(routes_rewards.router)
    if settings.pickle:
        app.include_router(routes_rewards.pickle_router)
    return app


async def _health() -> dict[str, str]:
    """The process answers. Says nothing about the judge; see /ready."""
    return {"status": "ok"}


async def _ready(request: Request) -> JSONResponse:
    """Whether requests are taken: 200, or 503 while draining or asleep."""
    gateway: Gateway = request.app.state.gateway
    batcher = gateway.batcher
    status = "draining" if not batcher.is_alive else "asleep" if batcher.is_asleep else "ready"
    body = {
        "status": status,
        "model": gateway.model,
        "revision": gateway.revision,
        "arr_fast_version": __version__,
    }
    return JSONResponse(body, status_code=200 if status == "ready" else 503)


async def _metrics(request: Request) -> Response:
    """Prometheus metrics."""
    gateway: Gateway = request.app.state.gateway
    return Response(gateway.metrics.text(), media_type=CONTENT_TYPE_LATEST)


async def _limits(request: Request) -> dict[str, Any]:
    """The limits that requests are held to."""
    gateway: Gateway = request.app.state.gateway
    return gateway.settings.model_dump(
        mode="json", exclude={"token", "rubric", "host", "port", "url_prefixes"}
    )


async def _on_serve_error(request: Request, error: Exception) -> Response:
    """Every refusal as one JSON object with its status."""
    assert isinstance(error, ServeError)
    gateway: Gateway = request.app.state.gateway
    gateway.metrics.refused.labels(error.kind).inc()
    if isinstance(error, ClientGoneError):
        return Response(status_code=error.status)
    return JSONResponse(error_object(error), status_code=error.status, headers=error_headers(error))


async def _on_invalid(request: Request, error: Exception) -> Response:
    """A request of the wrong shape: where and why, without echoing what was sent."""
    assert isinstance(error, RequestValidationError)
    places = [
        f"{'.'.join(str(part) for part in each['loc'][1:]) or 'body'}: {each['msg']}"
        for each in error.errors()[:5]
    ]
    refusal = InvalidError("; ".join(places))
    return await _on_serve_error(request, refusal)


async def _on_http_error(_: Request, error: Exception) -> Response:
    """Unknown routes, wrong methods and unreadable JSON, in the same form."""
    assert isinstance(error, StarletteHTTPException)
    detail = {
        "message": str(error.detail),
        "type": "invalid_request_error",
        "code": error.status_code,
        "param": None,
    }
    return JSONResponse(
        {"error": detail}, status_code=error.status_code, headers=dict(error.headers or {})
    )


async def _on_fault(_: Request, error: Exception) -> Response:
    """A fault of the server; details go to the log, not to the client."""
    logger.error("request failed", exc_info=error)
    return JSONResponse(error_object(ServeError("the server failed")), status_code=500)
