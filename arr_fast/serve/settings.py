"""What a server is told when it starts; every limit of the service is here."""

from __future__ import annotations

import ipaddress
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from arr_fast.rubric import Rubric

RewardMode = Literal["point", "group"]
MAX_OPEN_BODY_BYTES = 256 << 20


class ServeSettings(BaseModel):
    """Settings of one server.

    Attributes:
        host: Address to bind to; loopback unless told otherwise.
        port: TCP port.
        token: Bearer token that every route but /health and /ready asks for, or None.
        served_model: Name in replies; None takes the judge's own.
        rubric: Default rubric of its task; the packaged default serves the other task.
        max_batch_tokens: Estimated tokens that one engine call is filled to; a single larger
            request is still run, alone.
        max_wait_ms: How long the first request of a batch waits for company, in milliseconds.
        max_queued_requests: Requests that may wait; more are refused with 429.
        max_queued_tokens: Estimated tokens that may wait.
        default_timeout_s: Deadline of a request that names none, in seconds.
        max_timeout_s: Longest deadline that a request may ask for.
        drain_timeout_s: How long accepted requests may take to finish after SIGTERM.
        max_body_bytes: Longest body; longer ones are refused with 413.
        max_open_body_bytes: Bytes of all bodies that are held at once; at least one body.
        body_timeout_s: Time that a client has to send its body.
        header_timeout_s: Time that a client has to send its headers.
        max_connections: Open connections.
        max_images: Images in one request.
        max_image_pixels: Pixels of one image, read from its header before it is decoded.
        max_request_pixels: Pixels of all images of one request, counted in the same way; the
            default is 256 images of 1024 x 1024, or 768 MiB once decoded.
        max_items: Pairs, images or groups in one request.
        max_group: Candidates in one group.
        max_criteria: Criteria in one rubric.
        max_text: Characters of one caption, criterion or question.
        max_questions: Questions in one decision request.
        url_prefixes: Image URLs that may be fetched; none by default. A prefix names the scheme,
            the host and a path: "https://images.example.org/set1/".
        url_timeout_s: Time that fetching one image may take, from connecting to its last byte.
        pickle: Whether the flow_grpo pickle protocol is served; loopback only.
        reward_mode: What a reward protocol (pickle, msgpack, /compute) returns: "point" scores
            each image alone; "group" ranks the images that share a prompt.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = "127.0.0.1"
    port: int = Field(default=8077, ge=0, le=65535)
    token: str | None = Field(default=None, min_length=8)
    served_model: str | None = None
    rubric: Rubric | None = None
    max_batch_tokens: int = Field(default=32768, ge=1)
    max_wait_ms: float = Field(default=5.0, ge=0.0, le=10_000.0)
    max_queued_requests: int = Field(default=256, ge=1)
    max_queued_tokens: int = Field(default=4_194_304, ge=1)
    default_timeout_s: float = Field(default=120.0, gt=0.0)
    max_timeout_s: float = Field(default=600.0, gt=0.0)
    drain_timeout_s: float = Field(default=60.0, gt=0.0)
    max_body_bytes: int = Field(default=32 << 20, ge=1)
    max_open_body_bytes: int = Field(default=MAX_OPEN_BODY_BYTES, ge=1)
    body_timeout_s: float = Field(default=30.0, gt=0.0)
    header_timeout_s: float = Field(default=10.0, gt=0.0)
    max_connections: int = Field(default=512, ge=1)
    max_images: int = Field(default=128, ge=1)
    max_image_pixels: int = Field(default=16_777_216, ge=1)
    max_request_pixels: int = Field(default=268_435_456, ge=1)
    max_items: int = Field(default=64, ge=1)
    max_group: int = Field(default=32, ge=2)
    max_criteria: int = Field(default=128, ge=1)
    max_text: int = Field(default=20_000, ge=1)
    max_questions: int = Field(default=64, ge=1)
    url_prefixes: tuple[str, ...] = ()
    url_timeout_s: float = Field(default=10.0, gt=0.0)
    pickle: bool = False
    reward_mode: RewardMode = "point"

    @field_validator("url_prefixes")
    @classmethod
    def _prefixes_end_the_host(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for prefix in value:
            scheme, _, rest = prefix.partition("://")
            # Without the slash "https://good.org" would also admit "https://good.org.evil.net".
            if scheme not in ("http", "https") or "/" not in rest or rest.startswith("/"):
                raise ValueError(f"url prefix {prefix!r} must be http(s)://HOST/ or longer")
            if "@" in rest.partition("/")[0]:
                raise ValueError(f"url prefix {prefix!r} must not hold a user name")
        return value

    @model_validator(mode="after")
    def _a_body_can_be_held(self) -> Self:
        if self.max_open_body_bytes < self.max_body_bytes:
            raise ValueError(
                f"max_open_body_bytes {self.max_open_body_bytes} is under max_body_bytes "
                f"{self.max_body_bytes}, so no body of that length could be held"
            )
        return self

    @model_validator(mode="after")
    def _pickle_stays_at_home(self) -> Self:
        if self.pickle and not is_loopback(self.host):
            raise ValueError(f"the pickle protocol is served on loopback only, not on {self.host}")
        return self


def is_loopback(host: str | None) -> bool:
    """Whether an address (or the name localhost) stays on this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False
