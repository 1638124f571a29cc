"""The door of the server, as one plain ASGI layer: token, limits, early refusal, timings."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import math
import time

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from arr_fast.serve.failures import (
    BadRequestError,
    BodyTooLargeError,
    ClientGoneError,
    DrainingError,
    QueueFullError,
    ServeError,
    TimeoutRequestError,
)
from arr_fast.serve.gateway import Gateway

logger = logging.getLogger("arr_fast.serve")

OPEN_PATHS = ("/health", "/ready")


class UnauthorisedError(ServeError):
    """No token, or the wrong one."""

    status = 401
    kind = "unauthorised"


class Guard:
    """Checks every request before the application sees it, and times it.

    The body is read here, under a size and a time limit, and handed on whole. A request that would
    be refused for a full queue is refused before its body is read.

    Args:
        app: The application.
        gateway: Queue, settings and metrics.
    """

    def __init__(self, app: ASGIApp, gateway: Gateway) -> None:
        self._app = app
        self._gateway = gateway
        self._open_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection event; anything but HTTP passes."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        timings: dict[str, float] = scope.setdefault("arr_fast.timings", {})
        status = 500

        async def timed_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                timings["total"] = time.perf_counter() - started
                message["headers"] = [*message["headers"], *_timing_headers(timings)]
            await send(message)

        held = 0
        try:
            self._admit(scope)
            body = await self._read_body(scope, receive)
            held = len(body)
            timings["read"] = time.perf_counter() - started
            await self._app(scope, _replay(body, receive), timed_send)
        except ServeError as error:
            status = error.status
            self._gateway.metrics.refused.labels(error.kind).inc()
            if not isinstance(error, ClientGoneError):
                # The body may still be on its way; a kept-alive connection would read it as the
                # next request.
                await send_error(timed_send, error, close=True)
        finally:
            self._open_bytes -= held
            route = getattr(scope.get("route"), "path", "none")
            self._gateway.metrics.requests.labels(route, str(status)).inc()
            total = time.perf_counter() - started
            self._gateway.metrics.seconds.labels("total").observe(total)

    def _admit(self, scope: Scope) -> None:
        """Raises unless the request may come in."""
        if scope["path"] in OPEN_PATHS:
            return
        token = self._gateway.settings.token
        headers = dict(scope["headers"])
        if token is not None:
            given = headers.get(b"authorization", b"")
            if not hmac.compare_digest(given, b"Bearer " + token.encode()):
                raise UnauthorisedError("expected Authorization: Bearer TOKEN")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return
        batcher = self._gateway.batcher
        if not batcher.is_alive:
            raise DrainingError("the server is stopping", retry_after=5.0)
        if batcher.is_full:
            raise QueueFullError("too many requests wait already", batcher.retry_after())

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        """The whole body, under the limits; counts towards the bytes that are held at once."""
        settings = self._gateway.settings
        declared = dict(scope["headers"]).get(b"content-length", b"0")
        if not declared.isdigit():
            raise BadRequestError("content-length is not a number")
        if int(declared) > settings.max_body_bytes:
            raise BodyTooLargeError(
                f"{int(declared)} bytes, the limit is {settings.max_body_bytes}"
            )
        pieces: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                more = True
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGoneError("the client left before its body was read")
                    piece = message.get("body", b"")
                    more = message.get("more_body", False)
                    size += len(piece)
                    self._open_bytes += len(piece)
                    pieces.append(piece)
                    if size > settings.max_body_bytes:
                        raise BodyTooLargeError(
                            f"over {settings.max_body_bytes} bytes, which is the limit"
                        )
                    if self._open_bytes > settings.max_open_body_bytes:
                        raise QueueFullError("too many bodies are held already", retry_after=1.0)
        except BaseException as error:
            self._open_bytes -= size
            if isinstance(error, TimeoutError):
                raise TimeoutRequestError(
                    f"the body did not come within {settings.body_timeout_s:g} s"
                ) from None
            raise
        return b"".join(pieces)


async def send_error(send: Send, error: ServeError, *, close: bool) -> None:
    """Sends the error object that all routes use."""
    body = json.dumps(error_object(error)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
    headers += [(name.encode(), value.encode()) for name, value in error_headers(error).items()]
    if close:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def error_object(error: ServeError) -> dict[str, object]:
    """The body of an error, in the form that OpenAI clients read as well."""
    detail = {"message": str(error), "type": error.kind, "code": error.status, "param": None}
    return {"error": detail}


def error_headers(error: ServeError) -> dict[str, str]:
    """Retry-After in whole seconds, and the challenge of a missing token."""
    headers = {}
    if error.retry_after is not None:
        headers["retry-after"] = str(math.ceil(error.retry_after))
    if error.status == 401:
        headers["www-authenticate"] = "Bearer"
    return headers


def _timing_headers(timings: dict[str, float]) -> list[tuple[bytes, bytes]]:
    """Server-Timing in milliseconds; `batch` is how many requests shared the call."""
    parts = [
        f"{name};dur={1e3 * timings[name]:.2f}"
        for name in ("read", "decode", "queue", "engine", "total")
        if name in timings
    ]
    if timings.get("batch"):
        parts.append(f'batch;desc="{int(timings["batch"])}"')
    return [(b"server-timing", ", ".join(parts).encode())]


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then whatever the connection says (that it closed)."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if not given:
            given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return replay
