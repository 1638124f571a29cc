"""Dynamic micro-batching: requests of many clients become few calls of one judge.

One thread owns the judge. It takes the oldest request, waits a little for others that may share its
call, fills up to a budget of tokens, runs, and hands every request its own part. Order is kept, so
nothing starves; the queue has bounds, so nothing piles up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from arr_fast.serve.calls import Call
from arr_fast.serve.failures import AsleepError, DeadlineError, DrainingError, QueueFullError
from arr_fast.serve.metrics import Metrics
from arr_fast.serve.settings import ServeSettings

if TYPE_CHECKING:
    from arr_fast.judge import Judge

logger = logging.getLogger("arr_fast.serve")


@dataclass(slots=True, eq=False)
class Ticket:
    """One request in the queue.

    Attributes:
        call: What it asks for.
        deadline: `time.monotonic()` after which nobody wants the answer.
        future: Resolves to the call's result; cancel it to leave the queue.
        queued_s: Seconds from submission to the start of its batch.
        engine_s: Seconds that its batch ran.
        batch_requests: Requests in its batch.
    """

    call: Call
    deadline: float
    future: Future[Any] = field(default_factory=Future)
    submitted: float = field(default_factory=time.monotonic)
    queued_s: float = 0.0
    engine_s: float = 0.0
    batch_requests: int = 0


class Batcher:
    """A bounded queue and the one thread that runs the judge.

    Args:
        judge: The judge; nobody else should be using it.
        settings: Budgets and bounds.
        metrics: Where to count.
    """

    def __init__(self, judge: Judge, settings: ServeSettings, metrics: Metrics) -> None:
        self._judge = judge
        self._settings = settings
        self._metrics = metrics
        self._queue: deque[Ticket] = deque()
        self._tokens = 0
        self._changed = threading.Condition()
        self._draining = False
        self._rate = 0.0
        self._thread = threading.Thread(target=self._loop, name="arr-fast-engine", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the engine thread runs and takes requests."""
        return self._thread.is_alive() and not self._draining

    @property
    def is_asleep(self) -> bool:
        """Whether the judge sleeps; requests that reach it are then refused."""
        return bool(self._judge.stats()["asleep"])

    @property
    def is_full(self) -> bool:
        """Whether a further request would be refused whatever it asks for."""
        return len(self._queue) >= self._settings.max_queued_requests

    def retry_after(self) -> float:
        """Seconds until the present queue is likely worked off, between 1 and 60."""
        waiting = self._tokens / self._rate if self._rate else 1.0
        return min(60.0, max(1.0, waiting))

    def submit(self, call: Call, deadline: float) -> Ticket:
        """Queues a call.

        Args:
            call: What to run.
            deadline: `time.monotonic()` after which it is not worth running.

        Raises:
            QueueFullError: The queue is at its bound.
            DrainingError: The server is stopping.
        """
        ticket = Ticket(call, deadline)
        limit = self._settings
        with self._changed:
            if self._draining:
                raise DrainingError("the server is stopping", retry_after=5.0)
            # An empty queue takes any one request, or a large one could never be served.
            over = self._tokens + call.tokens > limit.max_queued_tokens and self._queue
            if len(self._queue) >= limit.max_queued_requests or over:
                raise QueueFullError(
                    f"{len(self._queue)} requests ({self._tokens} tokens) wait already",
                    retry_after=self.retry_after(),
                )
            self._queue.append(ticket)
            self._tokens += call.tokens
            self._show_queue()
            self._changed.notify()
        return ticket

    def start_draining(self) -> None:
        """Refuses new requests from now on; those that wait are still served."""
        with self._changed:
            self._draining = True
            self._changed.notify_all()

    def close(self, timeout: float) -> bool:
        """Drains the queue and stops the thread.

        Args:
            timeout: Seconds to wait for what is queued; what is left then gets a DrainingError.

        Returns:
            Whether everything that was accepted was served.
        """
        self.start_draining()
        self._thread.join(timeout)
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._tokens = 0
            self._show_queue()
        for ticket in left:
            if ticket.future.set_running_or_notify_cancel():
                ticket.future.set_exception(DrainingError("the server stopped", retry_after=5.0))
        return not left and not self._thread.is_alive()

    def _loop(self) -> None:
        while True:
            batch = self._next_batch()
            if batch is None:
                return
            if batch:
                try:
                    self._run(batch)
                except Exception as error:
                    # The thread serves everyone: it must outlive a fault of its own.
                    logger.exception("a batch of %d requests was lost", len(batch))
                    for ticket in batch:
                        if not ticket.future.done():
                            ticket.future.set_exception(error)

    def _next_batch(self) -> list[Ticket] | None:
        """Waits for work; None when drained."""
        with self._changed:
            while not self._queue:
                if self._draining:
                    return None
                self._changed.wait()
            patience = self._queue[0].submitted + self._settings.max_wait_ms / 1e3
            while not self._draining and self._queue and not self._has_full_batch():
                left = patience - time.monotonic()
                if left <= 0.0:
                    break
                self._changed.wait(left)
            return self._take()

    def _has_full_batch(self) -> bool:
        """Whether what waits and may share the first request's call fills the budget."""
        key = self._queue[0].call.merge_key
        tokens = sum(t.call.tokens for t in self._queue if t.call.merge_key == key)
        return tokens >= self._settings.max_batch_tokens

    def _take(self) -> list[Ticket]:
        """Removes one batch from the queue, and whatever nobody waits for any more."""
        batch: list[Ticket] = []
        kept: deque[Ticket] = deque()
        used = 0
        now = time.monotonic()
        for ticket in self._queue:
            if ticket.future.cancelled():
                self._metrics.refused.labels("cancelled").inc()
            elif now >= ticket.deadline:
                self._expire(ticket)
            elif batch and (
                ticket.call.merge_key != batch[0].call.merge_key
                or used + ticket.call.tokens > self._settings.max_batch_tokens
            ):
                kept.append(ticket)
            elif ticket.future.set_running_or_notify_cancel():
                batch.append(ticket)
                used += ticket.call.tokens
            else:
                self._metrics.refused.labels("cancelled").inc()
        self._queue = kept
        self._tokens = sum(ticket.call.tokens for ticket in kept)
        self._show_queue()
        return batch

    def _expire(self, ticket: Ticket) -> None:
        if ticket.future.set_running_or_notify_cancel():
            waited = time.monotonic() - ticket.submitted
            ticket.future.set_exception(DeadlineError(f"still queued after {waited:.1f} s"))

    def _run(self, batch: Sequence[Ticket]) -> None:
        started = time.monotonic()
        results = self._results(batch)
        seconds = time.monotonic() - started
        tokens = sum(ticket.call.tokens for ticket in batch)
        rate = tokens / max(seconds, 1e-6)
        self._rate = rate if not self._rate else 0.8 * self._rate + 0.2 * rate
        self._metrics.batch_requests.observe(len(batch))
        self._metrics.batch_items.observe(sum(ticket.call.items for ticket in batch))
        self._metrics.batch_tokens.observe(tokens)
        self._metrics.seconds.labels("engine").observe(seconds)
        for ticket, result in zip(batch, results, strict=True):
            ticket.queued_s = started - ticket.submitted
            ticket.engine_s = seconds
            ticket.batch_requests = len(batch)
            self._metrics.seconds.labels("queue").observe(ticket.queued_s)
            if isinstance(result, BaseException):
                ticket.future.set_exception(result)
            else:
                ticket.future.set_result(result)

    def _results(self, batch: Sequence[Ticket]) -> list[Any]:
        """One result or exception per ticket; a call that fails whole is repeated one by one."""
        calls = [ticket.call for ticket in batch]
        try:
            return calls[0].run(self._judge, calls)
        except Exception as error:
            if len(calls) == 1:
                return [self._failure(calls[0], error)]
            logger.warning("a merged %s call failed, repeating: %s", calls[0].kind, error)
        results: list[Any] = []
        for call in calls:
            try:
                results += call.run(self._judge, [call])
            except Exception as error:
                results.append(self._failure(call, error))
        return results

    def _failure(self, call: Call, error: Exception) -> Exception:
        """What a call comes to that raised."""
        if self.is_asleep:
            return AsleepError("the judge sleeps", retry_after=5.0)
        logger.error("a %s call failed", call.kind, exc_info=error)
        return error

    def _show_queue(self) -> None:
        self._metrics.queued.set(len(self._queue))
        self._metrics.queued_tokens.set(self._tokens)
