"""Where a number comes from: every output object carries one `Provenance`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from arr_fast import __version__


@dataclass(frozen=True, slots=True)
class Provenance:
    """What one would need to produce the same verdicts again.

    Attributes:
        model: Model id, "builtin:<name>" or directory as given.
        revision: Commit of the checkpoint, or the content hash of a local directory; "+" and the
            same of a merged adapter; "#update<n>" where weights were updated in memory n times.
        rubric_hashes: Distinct `Rubric.content_hash` values used, in order of appearance.
        template_version: Version of the prompt texts (arr_fast/prompts.py).
        arr_fast_version: Version of this package.
        settings: What else can move a number: dtype, device, impl, quantization, adapter.
    """

    model: str
    revision: str
    rubric_hashes: tuple[str, ...]
    template_version: int
    arr_fast_version: str = __version__
    settings: dict[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object with the attributes above."""
        return asdict(self)
