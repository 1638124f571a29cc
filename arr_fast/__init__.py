"""Many rubric criteria over an image pair, read in one forward of a vision-language model.

The public names load on first use, so `import arr_fast` imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "ArrFastError": "arr_fast.errors",
    "BadImageError": "arr_fast.errors",
    "BadPromptError": "arr_fast.errors",
    "CanonicalImage": "arr_fast.images",
    "Criterion": "arr_fast.rubric",
    "GroupVerdicts": "arr_fast.ranking",
    "Judge": "arr_fast.judge",
    "MissingDependencyError": "arr_fast.errors",
    "PairVerdicts": "arr_fast.verdicts",
    "PointVerdicts": "arr_fast.verdicts",
    "PromptTooLongError": "arr_fast.errors",
    "Provenance": "arr_fast.provenance",
    "Rubric": "arr_fast.rubric",
    "RubricError": "arr_fast.errors",
    "UnsupportedModelError": "arr_fast.errors",
    "VerdictError": "arr_fast.errors",
    "VerdictTrace": "arr_fast.trace",
}

__all__ = [
    "ArrFastError",
    "BadImageError",
    "BadPromptError",
    "CanonicalImage",
    "Criterion",
    "GroupVerdicts",
    "Judge",
    "MissingDependencyError",
    "PairVerdicts",
    "PointVerdicts",
    "PromptTooLongError",
    "Provenance",
    "Rubric",
    "RubricError",
    "UnsupportedModelError",
    "VerdictError",
    "VerdictTrace",
    "__version__",
]

if TYPE_CHECKING:
    from arr_fast.errors import (
        ArrFastError,
        BadImageError,
        BadPromptError,
        MissingDependencyError,
        PromptTooLongError,
        RubricError,
        UnsupportedModelError,
        VerdictError,
    )
    from arr_fast.images import CanonicalImage
    from arr_fast.judge import Judge
    from arr_fast.provenance import Provenance
    from arr_fast.ranking import GroupVerdicts
    from arr_fast.rubric import Criterion, Rubric
    from arr_fast.trace import VerdictTrace
    from arr_fast.verdicts import PairVerdicts, PointVerdicts


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'arr_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
