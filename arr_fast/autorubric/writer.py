"""A text backend behind a log of calls: equal requests are answered once, ever."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from arr_fast.autorubric.call_log import CallLog, Progress
from arr_fast.autorubric.text_backend import (
    BudgetError,
    TextBackend,
    TextReply,
    TextRequest,
    TextResult,
)

logger = logging.getLogger("arr_fast")


@dataclass(slots=True)
class WritingCost:
    """What writing cost in this process, and what the log spared.

    Attributes:
        calls: Requests that were sent and answered.
        attempts: Calls of the endpoint, failed ones included.
        failed: Requests without an answer.
        from_log: Requests answered from the log.
        prompt_tokens, completion_tokens, seconds: Of the answered calls.
    """

    calls: int = 0
    attempts: int = 0
    failed: int = 0
    from_log: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes."""
        return asdict(self)


class Writer:
    """Answers requests from the log, or through a backend.

    Args:
        backend: Who writes.
        log: Where answers are kept.
        budget: Most requests to send in this process; None for no limit.
    """

    def __init__(self, backend: TextBackend, log: CallLog, budget: int | None = None) -> None:
        self.backend = backend
        self.cost = WritingCost()
        self._log = log
        self._budget = budget

    def ask(
        self, requests: Sequence[TextRequest], progress: Progress | None = None
    ) -> list[TextResult]:
        """Answers requests, in order; a failure stands in the place of its answer.

        Args:
            requests: What to ask.
            progress: Told how many of them are answered, from the log or by the backend.
        """
        keys = [request.key(self.backend.identity) for request in requests]
        first: dict[str, int] = {}
        for place, key in enumerate(keys):
            if self._log.get(key) is None:
                first.setdefault(key, place)
        missing = list(first.values())
        allowed = missing
        if self._budget is not None:
            allowed = missing[: max(0, self._budget - self.cost.calls - self.cost.failed)]
        results: dict[str, TextResult] = {
            keys[place]: BudgetError("the budget of calls is spent")
            for place in missing[len(allowed) :]
        }

        open_requests = len(allowed)

        def keep(number: int, result: TextResult) -> None:
            nonlocal open_requests
            key = keys[allowed[number]]
            results[key] = result
            self._count(result)
            if isinstance(result, TextReply):
                self._log.put(key, result.to_json())
            open_requests -= 1
            if progress is not None:
                progress(len(requests) - open_requests, len(requests))

        if progress is not None:
            progress(len(requests) - open_requests, len(requests))
        if allowed:
            self.backend.generate([requests[place] for place in allowed], keep)
        self.cost.from_log += len(requests) - len(missing)
        return [results[key] if key in results else TextReply(**self._log.get(key)) for key in keys]

    def _count(self, result: TextResult) -> None:
        if isinstance(result, TextReply):
            self.cost.calls += 1
            self.cost.attempts += result.attempts
            self.cost.prompt_tokens += result.prompt_tokens
            self.cost.completion_tokens += result.completion_tokens
            self.cost.seconds += result.seconds
        else:
            self.cost.failed += 1
            logger.warning("%s", result)
