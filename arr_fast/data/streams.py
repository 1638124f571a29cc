"""Rows out of files, one at a time: JSON lines, JSON lists, parquet.

A line that is not a valid object is yielded as an error, so that a caller may count it and go on; a
JSON list or a parquet file that breaks ends there.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from arr_fast.data.fields import Row
from arr_fast.data.record import ItemError, Place
from arr_fast.errors import MissingDependencyError

CHUNK = 1 << 16
PARQUET_BATCH = 32
JSON_LINES = (".jsonl", ".ndjson")
_NUMBER = re.compile(r"[-+.0-9eE]+")
_SPACE = re.compile(r"[ \t\n\r]*")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"field {twice!r} appears twice in one object")
    return found


# NaN is not JSON, but Python writes it: it reads as "no value".
_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_constant=lambda _: None)


def text_lines(path: Path) -> Iterator[tuple[Place, str | ItemError]]:
    """Yields the lines of a UTF-8 file with their places, without blank ones."""
    try:
        with path.open("rb") as handle:
            for number, raw in enumerate(handle, start=1):
                place = Place(str(path), number)
                try:
                    text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
                except UnicodeDecodeError as error:
                    yield place, ItemError(f"{place}: not valid UTF-8: {error.reason}")
                    continue
                if text:
                    yield place, text
    except OSError as error:
        raise ItemError(f"{path}: cannot read: {error.strerror or error}") from error


def json_lines(path: Path) -> Iterator[Row | ItemError]:
    """Yields one row per line of a JSON-lines file."""
    for place, text in text_lines(path):
        if isinstance(text, ItemError):
            yield text
            continue
        try:
            yield _row(place, path.parent, _DECODER.decode(text))
        except ItemError as error:
            yield error
        except (ValueError, RecursionError) as error:
            yield ItemError(f"{place}: not valid JSON: {error}")


def json_list(path: Path) -> Iterator[Row | ItemError]:
    """Yields the objects of a JSON list, bare or under one key ({"pairs": [...]}), as it is read.

    Raises:
        ItemError: if the file is something else, naming the line.
    """
    try:
        with path.open(encoding="utf-8-sig", newline="") as handle:
            yield from _list_rows(_Stream(handle, path))
    except OSError as error:
        raise ItemError(f"{path}: cannot read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ItemError(f"{path}: not valid UTF-8: {error.reason}") from error


def json_rows(path: Path) -> Iterator[Row | ItemError]:
    """Yields the rows of a .jsonl (lines) or .json (list) file."""
    return json_lines(path) if path.suffix.lower() in JSON_LINES else json_list(path)


def parquet_rows(path: Path) -> Iterator[Row]:
    """Yields the rows of a parquet file, or of all parquet files of a folder, a few at a time.

    Raises:
        MissingDependencyError: pyarrow is not installed.
        ItemError: a file is not parquet.
    """
    for file in parquet_files(path):
        number = 0
        with _open_parquet(file) as table:
            for batch in table.iter_batches(batch_size=PARQUET_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(Place(str(file), number), file.parent, values)


def parquet_files(path: Path) -> list[Path]:
    """Returns the file itself, or the shards of a folder in order."""
    return sorted(path.glob("*.parquet")) if path.is_dir() else [path]


def parquet_columns(path: Path) -> frozenset[str]:
    """Returns the names of the top-level columns."""
    with _open_parquet(parquet_files(path)[0]) as table:
        return frozenset(table.schema_arrow.names)


def _open_parquet(path: Path) -> Any:
    pyarrow, parquet = load_pyarrow()
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ItemError(f"{path}: cannot read as parquet: {error}") from error


def load_pyarrow() -> tuple[Any, Any]:
    """Returns (pyarrow, pyarrow.parquet)."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingDependencyError("pyarrow", "data") from None
    return pyarrow, parquet


def _row(place: Place, folder: Path, value: Any) -> Row:
    if not isinstance(value, Mapping):
        raise ItemError(f"{place}: expected an object, got {type(value).__name__}")
    return Row(place, folder, value)


class _Stream:
    """JSON values out of a growing buffer, with line numbers.

    The standard decoder parses each value; a failure at the end of what was read so far only means
    that more is needed. The buffer doubles, so the work stays linear in the size of a value.
    """

    def __init__(self, handle: IO[str], path: Path) -> None:
        self._handle, self.path = handle, path
        self._text, self._at, self._ended = "", 0, False
        self.line = 1

    def peek(self) -> str:
        """Returns the next character that is not white space, "" at the end; consumes none."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._text):
                return self._text[self._at]
            if self._ended:
                return ""
            self._more()

    def take(self, expected: str) -> str:
        """Consumes and returns the next character, which must be one of `expected`."""
        found = self.peek()
        if not found or found not in expected:
            options = " or ".join(repr(option) for option in expected)
            shown = repr(found) if found else "the end of the file"
            raise ItemError(f"{self.place}: not valid JSON: expected {options}, got {shown}")
        self._advance(self._at + 1)
        return found

    def value(self) -> Any:
        """Consumes and returns the next value."""
        self.peek()
        while True:
            try:
                value, end = _DECODER.raw_decode(self._text, self._at)
                # "12" or "1." at the edge of the buffer may go on as "123" or "1.5".
                cut = end == len(self._text) or _NUMBER.fullmatch(self._text, self._at)
                if not cut or self._ended:
                    self._advance(end)
                    return value
            except (ValueError, RecursionError) as error:
                if self._ended or self._is_final(error):
                    message = f"{self.place}: not valid JSON: {self._describe(error)}"
                    raise ItemError(message) from error
            self._more()

    @property
    def place(self) -> Place:
        """Where the next value begins."""
        return Place(str(self.path), self.line)

    def _is_final(self, error: Exception) -> bool:
        if not isinstance(error, json.JSONDecodeError):
            return True
        near_the_end = error.pos > len(self._text) - 16
        return not near_the_end and not error.msg.startswith("Unterminated string")

    def _describe(self, error: Exception) -> str:
        if isinstance(error, json.JSONDecodeError):
            line = self.line + self._text.count("\n", self._at, error.pos)
            return f"{error.msg} (line {line})"
        return "nested too deeply" if isinstance(error, RecursionError) else str(error)

    def _advance(self, to: int) -> None:
        self.line += self._text.count("\n", self._at, to)
        self._at = to

    def _more(self) -> None:
        rest = self._text[self._at :]
        chunk = self._handle.read(max(CHUNK, len(rest)))
        self._text, self._at, self._ended = rest + chunk, 0, not chunk


def _list_rows(stream: _Stream) -> Iterator[Row | ItemError]:
    opened = stream.peek()
    if opened == "[":
        yield from _elements(stream)
    elif opened == "{":
        yield from _wrapped(stream)
    elif opened:
        raise ItemError(f"{stream.place}: expected a list of items")
    if stream.peek():
        hint = "; lines of JSON belong in a .jsonl file" if opened == "{" else ""
        raise ItemError(f"{stream.place}: more text after the end of the {opened!r}{hint}")


def _wrapped(stream: _Stream) -> Iterator[Row | ItemError]:
    """The one list of an object; other fields are passed over."""
    stream.take("{")
    found: str | None = None
    while stream.peek() != "}":
        place, key = stream.place, stream.value()
        if not isinstance(key, str):
            raise ItemError(f"{place}: not valid JSON: expected a field name, got {key!r}")
        stream.take(":")
        if stream.peek() == "[":
            if found is not None:
                raise ItemError(f"{place}: two lists, {found!r} and {key!r}; expected one of items")
            found = key
            yield from _elements(stream)
        else:
            stream.value()
        if stream.peek() != "}":
            stream.take(",")
    if found is None:
        raise ItemError(f"{stream.path}: expected a list of items, got one object without any")
    stream.take("}")


def _elements(stream: _Stream) -> Iterator[Row | ItemError]:
    stream.take("[")
    nth, line = 0, 0
    while stream.peek() != "]":
        nth, line = (nth + 1 if stream.line == line else 1), stream.line
        place, value = replace(stream.place, nth=nth), stream.value()
        try:
            yield _row(place, stream.path.parent, value)
        except ItemError as error:
            yield error
        if stream.peek() != "]":
            stream.take(",")
            if stream.peek() == "]":
                raise ItemError(f"{stream.place}: not valid JSON: a comma before the end")
    stream.take("]")
