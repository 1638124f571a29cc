"""From a request to its answer: decode, queue, wait; with deadline and cancellation."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request

from arr_fast.serve.batcher import Batcher, Ticket
from arr_fast.serve.calls import Call
from arr_fast.serve.failures import ClientGoneError, DeadlineError
from arr_fast.serve.metrics import Metrics
from arr_fast.serve.settings import ServeSettings
from arr_fast.serve.wire import CallBuilder

if TYPE_CHECKING:
    from arr_fast.judge import Judge

Value = TypeVar("Value")
DECODERS = 2


class Gateway:
    """What the routes hold: the judge's batcher, the call builder and the metrics.

    Args:
        judge: The judge to serve.
        settings: Limits of the service.
    """

    def __init__(self, judge: Judge, settings: ServeSettings) -> None:
        loaded = judge.engine.loaded
        self.settings = settings
        self.model = settings.served_model or loaded.name
        self._judge = judge
        self.tokenizer = loaded.adapter.tokenizer
        self.metrics = Metrics(judge.stats)
        self.builder = CallBuilder(settings)
        self.batcher = Batcher(judge, settings, self.metrics)
        self._decoders = ThreadPoolExecutor(DECODERS, thread_name_prefix="arr-fast-decode")

    @property
    def revision(self) -> str:
        """Revision of the judge's weights, which may be updated while it serves."""
        return self._judge.engine.loaded.revision

    def close(self) -> bool:
        """Drains and stops; returns whether everything accepted was served."""
        done = self.batcher.close(self.settings.drain_timeout_s)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        return done

    async def ask(
        self, request: Request, build: Callable[[], Call], timeout_s: float | None = None
    ) -> Any:
        """Builds a call in a worker thread, queues it, and waits for its result.

        Args:
            request: The HTTP request; when its client leaves, the call leaves the queue.
            build: Decodes and checks; what it raises is the client's to know.
            timeout_s: The deadline that the client asked for; the header X-Request-Timeout says
                the same.

        Raises:
            ServeError: Refused, too late, or the client is gone.
        """
        call = await self.decode(request, build, timeout_s)
        timings: dict[str, float] = request.scope["arr_fast.timings"]
        self.metrics.seconds.labels("decode").observe(timings["decode"])
        deadline = self._deadline(request, timeout_s)
        ticket = self.batcher.submit(call, deadline)
        try:
            result = await self._wait(request, asyncio.wrap_future(ticket.future), deadline)
        finally:
            ticket.future.cancel()
            _note(ticket, timings)
        return result

    async def decode(
        self, request: Request, work: Callable[[], Value], timeout_s: float | None = None
    ) -> Value:
        """Runs a part of decoding in a worker thread and waits for it.

        Args:
            request: The HTTP request; its deadline counts from its first part on.
            work, timeout_s: As `build` and `timeout_s` of `ask`.

        Raises:
            ServeError: Refused, too late, or the client is gone.
        """
        timings: dict[str, float] = request.scope.setdefault("arr_fast.timings", {})
        deadline = self._deadline(request, timeout_s)
        started = time.perf_counter()
        decoding = asyncio.get_running_loop().run_in_executor(self._decoders, work)
        value = await self._wait(request, decoding, deadline)
        timings["decode"] = timings.get("decode", 0.0) + time.perf_counter() - started
        return value

    async def _wait(self, request: Request, work: asyncio.Future[Value], deadline: float) -> Value:
        """Waits for work, the deadline, or the client's leaving, whichever comes first."""
        leaving: asyncio.Future[Any] = asyncio.ensure_future(_client_leaves(request))
        either: set[asyncio.Future[Any]] = {work, leaving}
        try:
            done, _ = await asyncio.wait(
                either,
                timeout=max(0.0, deadline - time.monotonic()),
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            leaving.cancel()
        if work in done:
            return work.result()
        work.cancel()
        if leaving in done:
            raise ClientGoneError("the client closed the connection")
        raise DeadlineError("the deadline passed before the verdict was there")

    def _deadline(self, request: Request, asked: float | None) -> float:
        """When nobody wants the answer any more, as it was when first asked about the request."""
        latest = time.monotonic() + self._timeout(request, asked)
        deadline: float = request.scope.setdefault("arr_fast.deadline", latest)
        return deadline

    def _timeout(self, request: Request, asked: float | None) -> float:
        header = request.headers.get("x-request-timeout")
        if asked is None and header is not None:
            try:
                asked = float(header)
            except ValueError:
                asked = None
        if asked is None or not asked > 0.0:
            asked = self.settings.default_timeout_s
        return min(asked, self.settings.max_timeout_s)


async def _client_leaves(request: Request) -> None:
    """Returns when the client disconnects; the body has been read by then."""
    while (await request.receive())["type"] != "http.disconnect":
        continue


def _note(ticket: Ticket, timings: dict[str, float]) -> None:
    timings["queue"] = ticket.queued_s
    timings["engine"] = ticket.engine_s
    timings["batch"] = ticket.batch_requests
