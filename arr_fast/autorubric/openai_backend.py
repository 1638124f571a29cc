"""Writes through any OpenAI-compatible vision endpoint: vLLM, SGLang, or a hosted model.

Images travel as base64 data URLs. JSON schema is asked for first; an endpoint that refuses it is
asked for a JSON object, then for plain text, and remembered. Calls that failed for a passing reason
(rate limit, time-out, cut connection, 5xx, a body that is no answer) are repeated with back-off.
"""

from __future__ import annotations

import base64
import io
import json
import logging
import re
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from typing import Any, Literal
from urllib.parse import urlsplit

from arr_fast.autorubric.answers import json_schema
from arr_fast.autorubric.text_backend import (
    OnResult,
    TextBackendError,
    TextReply,
    TextRequest,
    TextResult,
)
from arr_fast.errors import MissingDependencyError
from arr_fast.images import CanonicalImage
from arr_fast.prompts import ImageSlot

logger = logging.getLogger("arr_fast")

Form = Literal["json_schema", "json_object", "text"]
FORMS: tuple[Form, ...] = ("json_schema", "json_object", "text")
# What chat templates spell control tokens with: <|im_end|>, <image>, </s>, [INST].
_CONTROL = re.compile(
    r"<(?=\|?/?[A-Za-z_][\w.:/ -]{0,60}\|?>)|\[(?=/?(?:INST|SYSTEM_PROMPT|IMG)\])"
)


class OpenAIBackend:
    """A writer behind HTTP.

    Args:
        model: Name of the model at the endpoint.
        base_url: The endpoint; None for the openai package's own default and environment.
        api_key: None for the environment variable OPENAI_API_KEY. It is never logged.
        concurrency: Most calls in flight.
        attempts: Most calls per request.
        timeout: Seconds per call.
        first_wait, longest_wait: Seconds of back-off, doubled from one attempt to the next; an
            endpoint's own Retry-After is kept up to the longest.

    Raises:
        MissingDependencyError: openai or tenacity is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        concurrency: int = 8,
        attempts: int = 5,
        timeout: float = 120.0,
        first_wait: float = 1.0,
        longest_wait: float = 60.0,
    ) -> None:
        try:
            import openai
            import tenacity
        except ImportError as error:
            raise MissingDependencyError(str(error.name), "openai") from None
        for name, value in (("concurrency", concurrency), ("attempts", attempts)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self._openai, self._tenacity = openai, tenacity
        # Retries are ours: every attempt is counted.
        self._client = openai.OpenAI(
            base_url=base_url, api_key=api_key, timeout=timeout, max_retries=0
        )
        self.model = model
        self._concurrency, self._attempts = concurrency, attempts
        self._first_wait, self._longest_wait = first_wait, longest_wait
        self._form: Form = FORMS[0]
        self._lock = threading.Lock()

    @property
    def identity(self) -> str:
        """Endpoint (without credentials) and model."""
        url = urlsplit(str(self._client.base_url))
        port = f":{url.port}" if url.port else ""
        return f"openai:{url.hostname}{port}{url.path}:{self.model}"

    def generate(self, requests: Sequence[TextRequest], on_result: OnResult) -> None:
        """Answers requests, several at a time; see `TextBackend`."""
        pool = ThreadPoolExecutor(self._concurrency, thread_name_prefix="arr-fast-writer")
        try:
            futures = {pool.submit(self._ask, r): place for place, r in enumerate(requests)}
            for future in as_completed(futures):
                on_result(futures[future], future.result())
        finally:
            # After Ctrl-C only the calls in flight are waited for.
            pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, request: TextRequest) -> TextResult:
        started = time.perf_counter()
        attempts = 0
        retrying = self._tenacity.Retrying(
            retry=self._tenacity.retry_if_exception(self._passes),
            stop=self._tenacity.stop_after_attempt(self._attempts),
            wait=self._wait,
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    attempts += 1
                    text, finish, usage = self._call(request)
        except (self._openai.OpenAIError, ValueError) as error:
            return TextBackendError(f"{self.model}: {self._describe(error)} (attempt {attempts})")
        return TextReply(
            text,
            finish,
            int(getattr(usage, "prompt_tokens", 0) or 0),
            int(getattr(usage, "completion_tokens", 0) or 0),
            time.perf_counter() - started,
            attempts,
        )

    def _call(self, request: TextRequest) -> tuple[str, Literal["stop", "length"], Any]:
        form = self._form
        while True:
            try:
                completion = self._client.chat.completions.create(**self._body(request, form))
                break
            except (self._openai.BadRequestError, self._openai.UnprocessableEntityError):
                if form == FORMS[-1]:
                    raise
                form = FORMS[FORMS.index(form) + 1]
        with self._lock:
            if FORMS.index(form) > FORMS.index(self._form):
                logger.info("%s takes no %s; asking for %s", self.model, self._form, form)
                self._form = form
        choices = getattr(completion, "choices", None)
        if not choices or choices[0].message is None:
            raise ValueError("the endpoint's answer has no choices")
        finish: Literal["stop", "length"]
        finish = "length" if choices[0].finish_reason == "length" else "stop"
        return choices[0].message.content or "", finish, completion.usage

    def _body(self, request: TextRequest, form: Form) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": _content(request)}],
            "max_tokens": request.max_tokens,
            "temperature": request.temperature,
            "seed": request.seed,
        }
        if form == "json_schema":
            schema = {
                "name": request.answer,
                "schema": json_schema(request.answer),
                "strict": True,
            }
            body["response_format"] = {"type": form, "json_schema": schema}
        elif form == "json_object":
            body["response_format"] = {"type": form}
        return body

    def _passes(self, error: BaseException) -> bool:
        """Whether an error may be gone at the next attempt."""
        if isinstance(error, self._openai.APIStatusError):
            return error.status_code in (408, 409, 429) or error.status_code >= 500
        no_answer = (self._openai.APIConnectionError, self._openai.APIError, json.JSONDecodeError)
        return isinstance(error, (*no_answer, ValueError))

    def _wait(self, state: Any) -> float:
        """Seconds until the next attempt."""
        backoff = self._tenacity.wait_exponential_jitter(
            multiplier=self._first_wait, max=self._longest_wait, jitter=0.25 * self._first_wait
        )(state)
        error = state.outcome.exception()
        response = getattr(error, "response", None)
        asked = response.headers.get("retry-after") if response is not None else None
        try:
            seconds = float(asked) if asked is not None else 0.0
        except ValueError:
            seconds = 0.0
        return float(min(max(backoff, seconds), self._longest_wait))

    def _describe(self, error: Exception) -> str:
        """One line without the key, even where an endpoint repeats it."""
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        key = str(self._client.api_key or "")
        return text.replace(key, "[key]") if key else text


def _content(request: TextRequest) -> list[dict[str, Any]]:
    """The parts of a user turn as the endpoint takes them."""
    content: list[dict[str, Any]] = []
    for part in request.parts:
        if isinstance(part, ImageSlot):
            url = {"url": _data_url(request.images[part.index])}
            content.append({"type": "image_url", "image_url": url})
        else:
            content.append({"type": "text", "text": neutral(part)})
    return content


def neutral(text: str) -> str:
    """The text with control tokens of chat templates broken by a space: "<|im_end|>" stays text."""
    return _CONTROL.sub(lambda match: match.group(0) + " ", text)


@lru_cache(maxsize=64)
def _data_url(image: CanonicalImage) -> str:
    buffer = io.BytesIO()
    image.to_pil().save(buffer, "PNG")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}"
