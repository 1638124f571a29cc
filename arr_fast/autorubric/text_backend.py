"""What every text backend takes and gives: conversations with images in, text out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, Protocol

from arr_fast.autorubric.labelled import digest
from arr_fast.errors import ArrFastError
from arr_fast.images import CanonicalImage
from arr_fast.prompts import Part

AnswerKind = Literal["criteria", "themes"]


class TextBackendError(ArrFastError):
    """A request got no answer; the message says why and after how many attempts."""


class BudgetError(TextBackendError):
    """The budget of calls is spent; nothing more was sent."""


@dataclass(frozen=True, slots=True)
class TextRequest:
    """One user turn that asks for JSON.

    Attributes:
        parts: Texts and image slots.
        images: The images, as the slots number them.
        answer: Which schema the answer has.
        limit: Most criteria to write.
        banned: Criteria that must not be written (again).
        max_tokens: Longest answer.
        temperature: 0 is greedy.
        seed: Of sampling.
    """

    parts: tuple[Part, ...]
    images: tuple[CanonicalImage, ...] = ()
    answer: AnswerKind = "criteria"
    limit: int = 5
    banned: tuple[str, ...] = ()
    max_tokens: int = 512
    temperature: float = 0.0
    seed: int = 0

    def key(self, backend: str) -> str:
        """Content hash: equal keys ask the same of the same writer."""
        parts = [part if isinstance(part, str) else part.index for part in self.parts]
        images = [image.content_hash for image in self.images]
        settings = [self.answer, self.limit, self.max_tokens, self.temperature, self.seed]
        return digest(["text", backend, parts, images, list(self.banned), settings])


@dataclass(frozen=True, slots=True)
class TextReply:
    """An answer and what it cost.

    Attributes:
        text: As it came.
        finish: "length" where the answer was cut off at `max_tokens`.
        prompt_tokens, completion_tokens: As counted by the backend.
        seconds: Wall time; of a batch, its share.
        attempts: Calls that it took, failed ones included.
    """

    text: str
    finish: Literal["stop", "length"] = "stop"
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0
    attempts: int = 1

    def to_json(self) -> dict[str, Any]:
        """Returns the attributes."""
        return asdict(self)


# What a request came to; a failed one does not take its batch down.
TextResult = TextReply | TextBackendError
OnResult = Callable[[int, TextResult], None]


class TextBackend(Protocol):
    """Something that answers requests."""

    @property
    def identity(self) -> str:
        """Names writer and settings for good: part of every cache key."""

    def generate(self, requests: Sequence[TextRequest], on_result: OnResult) -> None:
        """Answers all requests; tells each result as soon as it is there, once, in any order."""
