"""Runs the application under uvicorn: time limits on headers, and a drain on SIGTERM."""

from __future__ import annotations

import asyncio
import logging
from types import FrameType
from typing import TYPE_CHECKING, Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from arr_fast.serve.app import create_app
from arr_fast.serve.settings import ServeSettings, is_loopback

if TYPE_CHECKING:
    from arr_fast.judge import Judge

logger = logging.getLogger("arr_fast.serve")


class DrainingServer(uvicorn.Server):
    """Refuses new requests as soon as a stop signal comes, and serves those it accepted."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Starts the drain, then lets uvicorn close."""
        app = self.config.app
        if isinstance(app, FastAPI):
            app.state.gateway.batcher.start_draining()
        super().handle_exit(sig, frame)


def protocol_with_header_limit(seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP protocol, which closes connections whose headers do not come in time.

    Args:
        seconds: From the first byte of a request (or from connecting) to the end of its headers.
    """

    class HeaderLimit(H11Protocol):
        _header_timer: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._expect_headers()

        def data_received(self, data: bytes) -> None:
            self._expect_headers()
            super().data_received(data)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._header_timer is not None:
                self._header_timer.cancel()
            super().connection_lost(exc)

        def _expect_headers(self) -> None:
            if self._header_timer is None and self.conn.their_state is h11.IDLE:
                self._header_timer = self.loop.call_later(seconds, self._check_headers)

        def _check_headers(self) -> None:
            self._header_timer = None
            is_new = self.cycle is None
            is_partial = bool(self.conn.trailing_data[0])
            if self.conn.their_state is h11.IDLE and (is_new or is_partial):
                self.transport.close()

    return HeaderLimit


def make_server(
    judge: Judge, settings: ServeSettings, *, log_level: str = "info"
) -> uvicorn.Server:
    """A server that is ready to `run()`.

    Args:
        judge: The judge; the server owns it from now on.
        settings: Address, limits and options.
        log_level: Of uvicorn.
    """
    if not is_loopback(settings.host) and settings.token is None:
        logger.warning("%s is reachable from outside and no token is set", settings.host)
    config = uvicorn.Config(
        create_app(judge, settings),
        host=settings.host,
        port=settings.port,
        http=protocol_with_header_limit(settings.header_timeout_s),
        ws="none",
        lifespan="on",
        log_level=log_level,
        access_log=False,
        server_header=False,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=int(settings.drain_timeout_s) + 1,
        h11_max_incomplete_event_size=32768,
    )
    return DrainingServer(config)
