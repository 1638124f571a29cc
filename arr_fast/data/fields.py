"""One raw row and the typed reading of its fields; every refusal names the place and the field."""

from __future__ import annotations

import base64
import binascii
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arr_fast.data.record import EmbeddedImage, ImageRef, ItemError, Place

_DATA_URL = re.compile(r"data:image/[\w.+-]+;base64,", re.IGNORECASE)
_REMOTE = re.compile(r"(https?|s3|gs|hf|ftp)://", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Row:
    """A mapping as it stands in a file.

    Attributes:
        place: Where it begins.
        folder: What its paths are relative to.
        values: Field name -> value.
    """

    place: Place
    folder: Path
    values: Mapping[str, Any]

    @property
    def default_name(self) -> str:
        """A name for a record without an id: the file's own name and the line."""
        return self.place.name

    def name(self, *fields: str) -> str:
        """Returns the first id that is there, as a string, else the default name."""
        found = next((self.values[f] for f in fields if self.values.get(f) is not None), None)
        return self.default_name if found is None else str(found)

    def error(self, field: str, expected: str) -> ItemError:
        """Returns the error to raise about a field."""
        if field not in self.values:
            return ItemError(f"{self.place}: {field}: missing, expected {expected}")
        shown = repr(self.values[field])
        shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
        return ItemError(f"{self.place}: {field}: expected {expected}, got {shown}")

    def text(self, field: str) -> str:
        """Returns a non-empty string that can be written as UTF-8."""
        value = self.values.get(field)
        if not isinstance(value, str) or not value.strip():
            raise self.error(field, "a non-empty string")
        try:
            value.encode("utf-8")
        except UnicodeEncodeError:
            raise self.error(field, "text without lone surrogates") from None
        return value

    def optional_text(self, field: str) -> str | None:
        """As `text`; None where the field is absent or null."""
        return None if self.values.get(field) is None else self.text(field)

    def number(self, field: str) -> float:
        """Returns a finite number."""
        value: Any = self.values.get(field)
        if not _is_number(value):
            raise self.error(field, "a finite number")
        number: float = value
        return number

    def numbers(self, field: str, count: int) -> tuple[float, ...]:
        """Returns a list of `count` finite numbers."""
        values = self.values.get(field)
        is_list = isinstance(values, Sequence) and not isinstance(values, str | bytes)
        if not is_list or not all(_is_number(value) for value in values or ()):
            raise self.error(field, f"a list of {count} finite numbers")
        if values is None or len(values) != count:
            raise ItemError(
                f"{self.place}: {field} has {len(values or ())} ranks for {count} images"
            )
        return tuple(values)

    def image(self, field: str) -> ImageRef:
        """Returns one image: a path, a data URL, or a parquet cell with its bytes."""
        return self._image(self.values.get(field), field)

    def images(self, field: str) -> tuple[ImageRef, ...]:
        """Returns one or more images; a single path counts as a list of one."""
        value = self.values.get(field)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            if not value:
                raise self.error(field, "a path or a list of paths")
            return tuple(self._image(item, field) for item in value)
        return (self._image(value, field),)

    def _image(self, value: Any, field: str) -> ImageRef:
        name = f"{self.place} {field}"
        # Hugging Face stores an image as {"bytes": ..., "path": ...}.
        if isinstance(value, Mapping) and isinstance(value.get("bytes"), bytes):
            return EmbeddedImage(name, value["bytes"])
        if isinstance(value, bytes):
            return EmbeddedImage(name, value)
        if isinstance(value, Mapping):
            value = value.get("path")
        if not isinstance(value, str) or not value or "\0" in value:
            raise self.error(field, "a path or a list of paths")
        if prefix := _DATA_URL.match(value):
            try:
                return EmbeddedImage(name, base64.b64decode(value[prefix.end() :], validate=True))
            except (binascii.Error, ValueError):
                raise self.error(field, "valid base64 after data:image/...;base64,") from None
        if _REMOTE.match(value):
            raise self.error(field, "a local path (images are not downloaded)")
        return str(self.folder / value)

    def rest(self, *known: str) -> dict[str, Any]:
        """Returns the fields that a format does not name, for the record's metadata."""
        return {key: value for key, value in self.values.items() if key not in known}


def _is_number(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) < 2**63 if isinstance(value, int) else math.isfinite(value)
