"""All formats by name, and the one that a file is: exactly one must recognise it."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from arr_fast.data import (
    arr_json,
    easy_vqa,
    mmrb2,
    preference_json,
    preference_parquet,
    prompt_sets,
)
from arr_fast.data.fields import Row
from arr_fast.data.formats import Format, Sample
from arr_fast.data.record import ItemError, Record, UnknownFormatError
from arr_fast.data.streams import json_rows, parquet_columns, parquet_files

logger = logging.getLogger("arr_fast")

FORMATS: dict[str, Format] = {
    found.name: found
    for found in (
        arr_json.FORMAT,
        *preference_json.FORMATS,
        mmrb2.FORMAT,
        *preference_parquet.FORMATS,
        *prompt_sets.FORMATS,
        easy_vqa.FORMAT,
    )
}


def format_named(name: str) -> Format:
    """Returns a format; an unknown name lists what there is."""
    if name not in FORMATS:
        raise ItemError(f"no data format {name!r}; there are: {', '.join(FORMATS)}")
    return FORMATS[name]


def locate(name: str | Path) -> Path:
    """Returns the path that a user means: a path, or easy-vqa:SPLIT."""
    return easy_vqa.installed(str(name)) if str(name).startswith("easy-vqa:") else Path(name)


def sample(path: Path) -> Sample:
    """Looks at the first row of a file, or at the names in a folder.

    Raises:
        ItemError: if there is nothing to look at.
    """
    if path.is_dir():
        names = frozenset(entry.name for entry in path.iterdir())
        if parquet_files(path):
            return Sample(path, "parquet", parquet_columns(path))
        return Sample(path, "folder", names)
    suffix = path.suffix.lower()
    if not path.is_file():
        raise ItemError(f"{path}: cannot read: no such file or folder")
    if suffix == ".parquet":
        return Sample(path, "parquet", parquet_columns(path))
    if suffix == ".txt":
        return Sample(path, "text", frozenset())
    first = next(json_rows(path), None)
    if first is None:
        raise ItemError(f"{path}: holds no items")
    if not isinstance(first, Row):
        raise first
    return Sample(path, "json", frozenset(k for k, v in first.values.items() if v is not None))


def detect(path: Path) -> Format:
    """Returns the one format that recognises a file.

    Raises:
        ItemError: if none does, or more than one; the message lists them.
    """
    seen = sample(path)
    found = [candidate for candidate in FORMATS.values() if candidate.recognises(seen)]
    if len(found) == 1:
        return found[0]
    fields = ", ".join(sorted(seen.fields)[:20]) or "nothing"
    if found:
        names = " and ".join(candidate.name for candidate in found)
        raise ItemError(f"{path}: fits the formats {names}; name one (it has: {fields})")
    names = ", ".join(FORMATS)
    raise UnknownFormatError(f"{path}: no known format (it has: {fields}); name one of: {names}")


def read_records(
    path: str | Path,
    format_name: str | None = None,
    *,
    on_error: Callable[[ItemError], None] | None = None,
) -> Iterator[Record]:
    """Yields the records of a file or folder as they are read.

    Args:
        path: The file or folder, or easy-vqa:SPLIT.
        format_name: A key of `FORMATS`; None to recognise it.
        on_error: Told about each row that is wrong; reading goes on. None raises the first.

    Raises:
        ItemError: naming the file, the line or row, and the field.
        MissingDependencyError: pyarrow or easy-vqa is needed.
    """
    where = locate(path)
    chosen = detect(where) if format_name is None else format_named(format_name)
    for found in chosen.read(where):
        if isinstance(found, Record):
            yield found
        elif on_error is None:
            raise found
        else:
            on_error(found)


def write_records(records: Iterable[Record], path: str | Path, format_name: str) -> int:
    """Writes records to a new file (or folder); embedded images of JSON formats beside it.

    What the format has no place for is left out, and a warning counts it.

    Returns:
        How many were written.

    Raises:
        ItemError: for a format that is only read, or a record that it cannot hold; nothing is left
            under the file's name then.
    """
    chosen = format_named(format_name)
    if chosen.write is None:
        raise ItemError(f"format {format_name} is only read, not written")
    lost: Counter[str] = Counter()

    def watched() -> Iterator[Record]:
        for record in records:
            lost.update(chosen.loses(record))
            yield record

    count = chosen.write(watched(), Path(path))
    if lost:
        parts = ", ".join(f"{name} ({number} records)" for name, number in lost.items())
        logger.warning("%s: format %s has no place for %s", path, format_name, parts)
    return count
