"""Python clients of the server, sync and async, with the same methods.

    with JudgeClient("http://127.0.0.1:8077") as client:
        answer = client.compare(["a red cube"], ["a.png"], ["b.png"])

A client asks /ready when it is made and raises at once if nobody answers: a training run should
stop at its start, not sit in retries. Later requests are retried a bounded number of times, where
another try may help: no connection, 429, 502, 503, 504, and a 500 that the judge server did not
write itself (a proxy's, whose replica died). Judging has no side effects, so a request that was
judged and lost on its way back may be judged again; the caller sees one answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import httpx
import numpy as np
from PIL import Image

from arr_fast.errors import ArrFastError
from arr_fast.images import CanonicalImage, to_image, to_images
from arr_fast.rubric import Rubric

RETRIED = (429, 502, 503, 504)


class JudgeServerError(ArrFastError):
    """The server refused a request, or could not be reached.

    Attributes:
        status: HTTP status, or None without an answer.
    """

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and how long a request is tried again.

    Attributes:
        retries: Further tries after the first.
        backoff_s: Pause before the first retry, in seconds; doubles each time.
        max_pause_s: Longest single pause, a Retry-After of the server included.
        total_s: No retry starts after this many seconds.
    """

    retries: int = 4
    backoff_s: float = 0.25
    max_pause_s: float = 10.0
    total_s: float = 120.0

    def pause(self, attempt: int, response: httpx.Response | None) -> float:
        """Seconds to wait before retry number `attempt` (from 0)."""
        pause = self.backoff_s * 2.0**attempt
        if response is not None:
            with contextlib.suppress(ValueError):
                pause = max(pause, float(response.headers.get("retry-after", "0")))
        return min(pause, self.max_pause_s)


class _Attempts:
    """Decides, request by request, whether to go on; shared by both clients."""

    def __init__(self, policy: RetryPolicy, path: str) -> None:
        self._policy = policy
        self._path = path
        self._started = time.monotonic()
        self._done = 0

    def next_pause(self, outcome: httpx.Response | httpx.HTTPError) -> float | None:
        """Seconds to pause before another try; None when the outcome is final and good.

        Raises:
            JudgeServerError: The outcome is final and bad.
        """
        response = outcome if isinstance(outcome, httpx.Response) else None
        if response is not None and response.status_code == 200:
            return None
        late = time.monotonic() - self._started > self._policy.total_s
        may_retry = response is None or response.status_code in RETRIED or _is_foreign(response)
        if not may_retry or late or self._done >= self._policy.retries:
            tries = f" after {self._done + 1} tries" if self._done else ""
            if response is None:
                problem = f"{type(outcome).__name__}: {outcome}"
                raise JudgeServerError(f"{self._path}: no answer{tries}: {problem}")
            raise JudgeServerError(
                f"{self._path}: {response.status_code}{tries}: {_message(response)}",
                response.status_code,
            )
        self._done += 1
        return self._policy.pause(self._done - 1, response)


class JudgeClient:
    """A blocking client.

    Args:
        base_url: "http://127.0.0.1:8077".
        token: The server's bearer token.
        timeout_s: Deadline of one try, told to the server as well.
        policy: Retries.
        check: Ask /ready now.

    Raises:
        JudgeServerError: With `check`, the server does not answer or is not ready.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        policy: RetryPolicy | None = None,
        check: bool = True,
    ) -> None:
        self._policy = policy or RetryPolicy()
        self._client = httpx.Client(**_options(base_url, token, timeout_s))
        if check:
            try:
                _check_ready(base_url, self._client.get("/ready", timeout=5.0))
            except httpx.HTTPError as error:
                self.close()
                raise _unreachable(base_url, error) from None
            except JudgeServerError:
                self.close()
                raise

    def compare(
        self,
        prompts: Sequence[str],
        images_a: Any,
        images_b: Any,
        rubric: Any = None,
        *,
        sources: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Judges pairs; arguments as `Judge.compare`, answer as `PairVerdicts.to_json`."""
        images = {"images_a": images_a, "images_b": images_b, "sources": sources}
        return self._post("/v1/judge/compare", _payload(prompts, images, rubric, options))

    def score(
        self,
        prompts: Sequence[str],
        images: Any,
        rubric: Any = None,
        *,
        sources: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Scores images; arguments as `Judge.score`, answer as `PointVerdicts.to_json`."""
        columns = {"images": images, "sources": sources}
        return self._post("/v1/judge/score", _payload(prompts, columns, rubric, options))

    def rank(
        self,
        prompts: Sequence[str],
        groups: Sequence[Any],
        rubric: Any = None,
        *,
        sources: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Ranks groups; arguments as `Judge.rank`, answer as `GroupVerdicts.to_json`."""
        payload = _payload(prompts, {"sources": sources}, rubric, options)
        return self._post("/v1/judge/rank", {**payload, "groups": _groups(groups)})

    def close(self) -> None:
        """Closes the connections."""
        self._client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self.close()

    def _post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        attempts = _Attempts(self._policy, path)
        while True:
            outcome: httpx.Response | httpx.HTTPError
            try:
                outcome = self._client.post(path, json=payload)
            except httpx.HTTPError as error:
                outcome = error
            pause = attempts.next_pause(outcome)
            if pause is None and isinstance(outcome, httpx.Response):
                answer: dict[str, Any] = outcome.json()
                return answer
            time.sleep(pause or 0.0)


class AsyncJudgeClient:
    """The same for asyncio. Use it as `async with`, or call `connect` first.

    Args:
        base_url, token, timeout_s, policy: See `JudgeClient`.
    """

    def __init__(
        self,
        base_url: str,
        *,
        token: str | None = None,
        timeout_s: float = 120.0,
        policy: RetryPolicy | None = None,
    ) -> None:
        self._base_url = base_url
        self._policy = policy or RetryPolicy()
        self._client = httpx.AsyncClient(**_options(base_url, token, timeout_s))

    async def connect(self) -> Self:
        """Asks /ready.

        Raises:
            JudgeServerError: The server does not answer or is not ready.
        """
        try:
            _check_ready(self._base_url, await self._client.get("/ready", timeout=5.0))
        except httpx.HTTPError as error:
            await self.close()
            raise _unreachable(self._base_url, error) from None
        except JudgeServerError:
            await self.close()
            raise
        return self

    async def compare(
        self,
        prompts: Sequence[str],
        images_a: Any,
        images_b: Any,
        rubric: Any = None,
        *,
        sources: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """See `JudgeClient.compare`."""
        images = {"images_a": images_a, "images_b": images_b, "sources": sources}
        return await self._post("/v1/judge/compare", _payload(prompts, images, rubric, options))

    async def score(
        self,
        prompts: Sequence[str],
        images: Any,
        rubric: Any = None,
        *,
        sources: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """See `JudgeClient.score`."""
        columns = {"images": images, "sources": sources}
        return await self._post("/v1/judge/score", _payload(prompts, columns, rubric, options))

    async def rank(
        self,
        prompts: Sequence[str],
        groups: Sequence[Any],
        rubric: Any = None,
        *,
        sources: Any = None,
        **options: Any,
    ) -> dict[str, Any]:
        """See `JudgeClient.rank`."""
        payload = _payload(prompts, {"sources": sources}, rubric, options)
        return await self._post("/v1/judge/rank", {**payload, "groups": _groups(groups)})

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.aclose()

    async def __aenter__(self) -> Self:
        return await self.connect()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    async def _post(self, path: str, payload: dict[str, Any]) -> dict[str, Any]:
        attempts = _Attempts(self._policy, path)
        while True:
            outcome: httpx.Response | httpx.HTTPError
            try:
                outcome = await self._client.post(path, json=payload)
            except httpx.HTTPError as error:
                outcome = error
            pause = attempts.next_pause(outcome)
            if pause is None and isinstance(outcome, httpx.Response):
                answer: dict[str, Any] = outcome.json()
                return answer
            await asyncio.sleep(pause or 0.0)


def encode_image(image: CanonicalImage) -> str:
    """Base64 of a PNG; lossless, so the server judges the very same pixels."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(image.pixels)).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _payload(
    prompts: Sequence[str], images: dict[str, Any], rubric: Any, options: dict[str, Any]
) -> dict[str, Any]:
    payload: dict[str, Any] = {"prompts": list(prompts), **options}
    for name, values in images.items():
        if values is not None:
            payload[name] = [encode_image(image) for image in to_images(values, name=name)]
    if rubric is not None:
        many = isinstance(rubric, list | tuple)
        payload["rubric"] = [_spec(one) for one in rubric] if many else _spec(rubric)
    return payload


def _groups(groups: Sequence[Any]) -> list[list[str]]:
    return [
        [encode_image(to_image(v, name=f"groups[{n}][{i}]")) for i, v in enumerate(group)]
        for n, group in enumerate(groups)
    ]


def _spec(rubric: Any) -> Any:
    return rubric.model_dump(mode="json") if isinstance(rubric, Rubric) else rubric


def _options(base_url: str, token: str | None, timeout_s: float) -> dict[str, Any]:
    headers = {"X-Request-Timeout": str(timeout_s)}
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    timeout = httpx.Timeout(timeout_s + 5.0, connect=5.0)
    # The judge is named by address: a proxy of the environment has no business in between.
    return {"base_url": base_url, "headers": headers, "timeout": timeout, "trust_env": False}


def _check_ready(base_url: str, response: httpx.Response) -> None:
    if response.status_code != 200:
        raise JudgeServerError(
            f"{base_url} is not ready: {response.status_code}: {_message(response)}",
            response.status_code,
        )


def _unreachable(base_url: str, error: httpx.HTTPError) -> JudgeServerError:
    return JudgeServerError(
        f"no judge server at {base_url} ({type(error).__name__}); start one with `arr-fast serve`"
    )


def _is_foreign(response: httpx.Response) -> bool:
    """Whether a 500 is not from the judge server, which would say so in an error object."""
    if response.status_code != 500:
        return False
    try:
        return "error" not in response.json()
    except (ValueError, TypeError):
        return True


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
