"""Writing data files: relative paths, embedded images beside the file, nothing half-written."""

from __future__ import annotations

import io
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

from arr_fast.data.record import EmbeddedImage, ImageRef

_SUFFIXES = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp", "GIF": "gif", "TIFF": "tif", "BMP": "bmp"}


class Pictures:
    """Gives every image of a data file a path that is written into it.

    Args:
        target: The data file (or a file in the folder that holds it).
    """

    def __init__(self, target: Path) -> None:
        self._folder = target.parent
        self._own = f"{target.stem}_images"
        self._used: set[str] = set()

    def path(self, image: ImageRef) -> str:
        """Returns a path relative to the data file; an embedded image is written out first."""
        if not isinstance(image, EmbeddedImage):
            try:
                return Path(os.path.relpath(image, self._folder)).as_posix()
            except ValueError:  # another drive
                return str(Path(image).absolute())
        stem = re.sub(r"[^\w.-]+", "_", Path(image.name).name) or "image"
        name, number = stem, 1
        while name in self._used:
            number += 1
            name = f"{stem}_{number}"
        self._used.add(name)
        file = self._folder / self._own / f"{name}.{_suffix(image.data)}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image.data)
        return f"{self._own}/{file.name}"


def _suffix(data: bytes) -> str:
    try:
        with Image.open(io.BytesIO(data)) as image:
            return _SUFFIXES.get(image.format or "", "bin")
    except (OSError, UnidentifiedImageError, SyntaxError, ValueError):
        return "bin"


@contextmanager
def replacing(path: Path) -> Iterator[IO[str]]:
    """Opens a text file that takes the place of `path` only when all of it was written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    try:
        with draft.open("w", encoding="utf-8", newline="\n") as handle:
            yield handle
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)


def write_json_rows(rows: Iterable[Mapping[str, Any]], path: Path, key: str | None = None) -> int:
    """Writes objects as JSON lines, or as a list (under `key` if given), one row per line.

    Args:
        rows: What to write; NaN becomes null.
        path: A suffix .jsonl or .ndjson means lines.
        key: Wraps the list: {key: [...]}.

    Returns:
        How many were written.
    """
    lines = path.suffix.lower() in (".jsonl", ".ndjson")
    count = 0
    with replacing(path) as handle:
        if not lines:
            handle.write("[\n" if key is None else f"{{{json.dumps(key)}: [\n")
        for row in rows:
            if count and not lines:
                handle.write(",\n")
            handle.write(json.dumps(plain(row), ensure_ascii=False, allow_nan=False))
            handle.write("\n" if lines else "")
            count += 1
        if not lines:
            handle.write("\n]\n" if key is None else "\n]}\n")
    return count


def plain(value: Any) -> Any:
    """Returns a value that JSON can hold: NaN and bytes become null, tuples lists."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | int | float | bool):
        return value
    return None if isinstance(value, bytes) else str(value)
