"""What all sections of a run's configuration share: a closed base, ranges of numbers, hints."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Count = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    """Frozen; an unknown key is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())


def did_you_mean(name: str, known: Sequence[str]) -> str:
    """The nearest known name in brackets, after a space; "" if none is near."""
    close = get_close_matches(name, known, 1)
    return f" (did you mean {close[0]}?)" if close else ""
