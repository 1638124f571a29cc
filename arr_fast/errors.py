"""The errors that arr_fast raises on purpose, all of them under `ArrFastError`."""

from __future__ import annotations

from collections.abc import Iterable


class ArrFastError(Exception):
    """Base class: `except ArrFastError` catches every deliberate refusal of this package."""


class UnsupportedModelError(ArrFastError, ValueError):
    """The checkpoint is not of a supported family, or has a feature that the engine refuses.

    Args:
        found: What was found, for example the `model_type` of a config.
        supported: What is supported; listed in the message.
        reason: Why this one is refused, where it is more than "unknown".
    """

    def __init__(self, found: str, supported: Iterable[str] = (), reason: str = "") -> None:
        names = ", ".join(sorted(supported))
        message = f"unsupported model: {found}"
        if reason:
            message += f" ({reason})"
        if names:
            message += f"; supported: {names}"
        super().__init__(message)


class MissingDependencyError(ArrFastError, ImportError):
    """An optional package is needed and absent.

    Args:
        package: The package that could not be imported.
        extra: The extra of arr-fast that installs it.
    """

    def __init__(self, package: str, extra: str = "") -> None:
        hint = f'pip install "arr-fast[{extra}]"' if extra else f"pip install {package}"
        super().__init__(f"{package} is needed for this: {hint}")


class BadImageError(ArrFastError, ValueError):
    """An image is unreadable, ambiguous or absurd; the message names the item."""


class BadPromptError(ArrFastError, ValueError):
    """A text cannot be read by any tokenizer (it holds a lone surrogate); names the text."""


class PromptTooLongError(ArrFastError, ValueError):
    """A prompt does not fit the context of the model; names the item, its tokens and the limit."""


class RubricError(ArrFastError, ValueError):
    """A rubric or criterion is malformed; the message names the item."""


class VerdictError(ArrFastError, ValueError):
    """Verdicts are inconsistent in shape, or were asked for where the judge could give none."""


class ConfigError(ArrFastError, ValueError):
    """A configuration has an unknown key or an impossible value; the message names each."""


class TrainingError(ArrFastError, RuntimeError):
    """A training run cannot go on: a judge that keeps failing, ratios that are off, a policy that
    returns NaN."""


class CheckpointError(ArrFastError, RuntimeError):
    """A checkpoint cannot be written or read; names the file, and the last usable one."""
