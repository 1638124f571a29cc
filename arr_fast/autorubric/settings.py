"""Settings of the loop, checked as a whole."""

from __future__ import annotations

import hashlib

from pydantic import BaseModel, ConfigDict, Field


class AutoRubricSettings(BaseModel):
    """How criteria are written, verified and selected.

    Attributes:
        criteria: Criteria per pair (K of eq. 6).
        refinements: Most rewrites of a pair's criteria (T_max of eq. 8).
        general: General criteria, which make one rubric; else prompt-specific ones, which make a
            rubric per prompt.
        temperature: Of the first answer; 0 is greedy.
        refine_temperature: Of rewrites, which must not repeat the answer that failed.
        max_tokens: Longest answer.
        require_consistent: Verification also needs both orders to name the preferred image.
        structured: Most criteria of the structured rubric.
        min_support: Fewest pairs behind a criterion of the structured rubric; where none has so
            many, all stay.
        selected: Most criteria of the selected rubric.
        folds: Of cross-validation.
        seed: Of sampling and folds.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    criteria: int = Field(default=5, ge=1, le=50)
    refinements: int = Field(default=5, ge=0, le=20)
    general: bool = True
    temperature: float = Field(default=0.0, ge=0.0, le=2.0)
    refine_temperature: float = Field(default=0.7, ge=0.0, le=2.0)
    max_tokens: int = Field(default=1024, ge=16)
    require_consistent: bool = False
    structured: int = Field(default=40, ge=1)
    min_support: int = Field(default=1, ge=1)
    selected: int = Field(default=20, ge=1)
    folds: int = Field(default=5, ge=2)
    seed: int = Field(default=0, ge=0)

    def request_seed(self, *parts: object) -> int:
        """A seed of its own for each request, the same in every run."""
        text = "\x1f".join(str(part) for part in (self.seed, *parts))
        return int.from_bytes(hashlib.sha256(text.encode("utf-8", "replace")).digest()[:4]) >> 1
