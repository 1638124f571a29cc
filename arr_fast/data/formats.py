"""What a format is: how to recognise it, read it and write it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from arr_fast.data.fields import Row
from arr_fast.data.record import ItemError, Record

Container = Literal["json", "parquet", "text", "folder"]
OPTIONAL = ("id", "images", "rubric", "criterion", "label_rank", "label_score", "group", "metadata")


@dataclass(frozen=True, slots=True)
class Sample:
    """What may be looked at to recognise a format.

    Attributes:
        path: The file or folder.
        container: What kind of thing it is.
        fields: Field names of its first row, or columns, or names in the folder.
    """

    path: Path
    container: Container
    fields: frozenset[str]

    def has(self, *names: str) -> bool:
        """Whether all of these fields are there."""
        return self.fields.issuperset(names)


@dataclass(frozen=True, slots=True)
class Format:
    """One data format.

    Attributes:
        name: What commands call it.
        about: One line on what it holds.
        recognises: Whether a sample can be read as this format.
        read: Yields records, and an error for each row that is wrong but leaves the rest readable.
        write: Writes records and returns how many; None for formats that are only read.
        keeps: Which of `OPTIONAL` are written, where a record has them.
    """

    name: str
    about: str
    recognises: Callable[[Sample], bool]
    read: Callable[[Path], Iterator[Record | ItemError]]
    write: Callable[[Iterable[Record], Path], int] | None = field(default=None)
    keeps: frozenset[str] = frozenset()

    def loses(self, record: Record) -> list[str]:
        """What the record has and `write` leaves out, among `OPTIONAL`."""
        has = {name: getattr(record, name) for name in OPTIONAL if name != "id"}
        has["id"] = record.name if record.has_id else None
        return [name for name, value in has.items() if value and name not in self.keeps]


def parsed(
    rows: Iterable[Row | ItemError], parse: Callable[[Row], Record]
) -> Iterator[Record | ItemError]:
    """Turns rows into records; a row that does not parse becomes its error."""
    for row in rows:
        if isinstance(row, ItemError):
            yield row
            continue
        try:
            yield parse(row)
        except ItemError as error:
            yield error


def refuse(record: Record, target: str, reason: str) -> ItemError:
    """Returns the error of a writer whose format cannot hold a record."""
    where = record.place if record.place is not None else record.name
    return ItemError(f"{where}: {target} cannot hold it: {reason}")


def decided_pair(record: Record, target: str, *, source: bool) -> int:
    """Returns 1 or -1, the label of a pair that has one and fits the task.

    Raises:
        ItemError: for anything else.
    """
    preference = labelled_pair(record, target)
    if preference == 0:
        raise refuse(record, target, "a tie")
    fits_task(record, target, source=source)
    return preference


def labelled_pair(record: Record, target: str) -> int:
    """Returns 1, 0 or -1, the label of a pair that has one; raises ItemError otherwise."""
    preference = record.preference
    if preference is None:
        raise refuse(record, target, f"expected a labelled pair, got a {record.kind} without")
    return preference


def fits_task(record: Record, target: str, *, source: bool) -> None:
    """Raises ItemError unless the record has a source image exactly where the format needs one."""
    if (record.source is not None) != source:
        raise refuse(record, target, "a source image is missing" if source else "a source image")


def name_field(row: Row, *names: str) -> Any:
    """Returns the first of several alternative fields that is not null, by name, or None."""
    return next((name for name in names if row.values.get(name) is not None), None)
