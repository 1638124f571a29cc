"""What is wrong with a data file: malformed rows, missing and unreadable images, bad labels.

Two records are duplicates when prompt, source and the set of images agree, by the images' bytes
where they are read. Duplicates whose labels disagree contradict each other.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arr_fast.data.record import EmbeddedImage, ImageRef, ItemError, Record, image_bytes
from arr_fast.data.registry import detect, format_named, locate, read_records
from arr_fast.errors import BadImageError
from arr_fast.images import to_image

SCHEMA = 1


@dataclass(slots=True)
class CheckReport:
    """Counts and findings; every finding names its place.

    Attributes:
        path, format: What was read, and as what.
        kinds: Records by kind: prompt, point, pair, group.
        tasks: Records by task: t2i, edit.
        labels: Records by label: A, B, tie, ranked, scored, unlabelled.
        images: Distinct images looked at.
        malformed: Rows that are no records.
        missing: Image files that are not there.
        unreadable: Images that no judge could read.
        identical: Pairs and groups that show one image twice.
        duplicates: Records that repeat an earlier one with the same label, or without.
        contradictions: Records that repeat an earlier one with another label.
    """

    path: str
    format: str
    kinds: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    images: int = 0
    malformed: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    identical: list[str] = field(default_factory=list)
    duplicates: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)

    @property
    def records(self) -> int:
        """How many records were read."""
        return sum(self.kinds.values())

    @property
    def passed(self) -> bool:
        """Whether everything can be judged and no label contradicts another."""
        return bool(self.records) and not (
            self.malformed or self.missing or self.unreadable or self.contradictions
        )

    def findings(self) -> dict[str, list[str]]:
        """Returns the lists of findings by name, the gravest first."""
        names = ("malformed", "missing", "unreadable", "contradictions", "identical", "duplicates")
        return {name: getattr(self, name) for name in names}

    def to_json(self) -> dict[str, Any]:
        """Returns a JSON-able object."""
        return {
            "schema": f"arr_fast.data_check/{SCHEMA}",
            "path": self.path,
            "format": self.format,
            "records": self.records,
            "kinds": dict(self.kinds),
            "tasks": dict(self.tasks),
            "labels": dict(self.labels),
            "images": self.images,
            "passed": self.passed,
            **self.findings(),
        }


def check(path: str | Path, format_name: str | None = None, *, images: bool = True) -> CheckReport:
    """Reads a whole file and reports on it.

    Args:
        path: A file or folder, or easy-vqa:SPLIT.
        format_name: Its format; None to recognise it.
        images: Also open and decode every image; without, images are compared by path.

    Raises:
        ItemError: if the file cannot be read at all, or no one format fits.
    """
    where = locate(path)
    chosen = detect(where) if format_name is None else format_named(format_name)
    report = CheckReport(str(path), chosen.name)
    pictures = _Pictures(report, decode=images)
    seen: dict[bytes, tuple[str, Any]] = {}

    def malformed(error: ItemError) -> None:
        report.malformed.append(str(error))

    try:
        for record in read_records(where, chosen.name, on_error=malformed):
            _look_at(record, report, pictures, seen)
    except ItemError as error:
        # A list that breaks off: what came before it still counts.
        malformed(error)
    report.images = len(pictures.known)
    return report


def _look_at(
    record: Record, report: CheckReport, pictures: _Pictures, seen: dict[bytes, tuple[str, Any]]
) -> None:
    report.kinds[record.kind] += 1
    report.tasks[record.task] += 1
    report.labels[_label_name(record)] += 1
    where = str(record.place or record.name)
    shown = [pictures.identity(image, where) for image in record.images]
    source = b"" if record.source is None else pictures.identity(record.source, where)
    if len(set(shown)) < len(shown):
        report.identical.append(f"{where}: shows the same image twice")
    order = sorted(range(len(shown)), key=lambda i: shown[i])
    text = f"{record.prompt}\0{record.criterion or ''}"
    content = [text.encode(), source, *(shown[i] for i in order)]
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in content)).digest()
    label = _label(record, order)
    if key not in seen:
        seen[key] = (where, label)
        return
    earlier = seen[key]
    if label is not None and earlier[1] is not None and label != earlier[1]:
        report.contradictions.append(f"{where}: labelled otherwise than {earlier[0]}")
    else:
        report.duplicates.append(f"{where}: repeats {earlier[0]}")
        if earlier[1] is None:
            seen[key] = (earlier[0], label)


def _label(record: Record, order: list[int]) -> Any:
    """The label as it would read with the images in canonical order; ranks become 0, 1, ..."""
    if record.label_rank is None:
        return record.label_score
    levels = sorted(set(record.label_rank))
    return tuple(levels.index(record.label_rank[i]) for i in order)


def _label_name(record: Record) -> str:
    if record.preference is not None:
        return {1: "A", -1: "B", 0: "tie"}[record.preference]
    if record.label_rank is not None:
        return "ranked"
    return "unlabelled" if record.label_score is None else "scored"


class _Pictures:
    """Opens every image once and remembers what it is."""

    def __init__(self, report: CheckReport, *, decode: bool) -> None:
        self._report, self._decode = report, decode
        self.known: dict[str, bytes] = {}

    def identity(self, image: ImageRef, where: str) -> bytes:
        """Returns a hash of the image's bytes, or of its name where there is nothing to read."""
        name = str(image)
        if name not in self.known:
            self.known[name] = self._open(image, where)
        return self.known[name]

    def _open(self, image: ImageRef, where: str) -> bytes:
        name = str(image)
        if not self._decode and not isinstance(image, EmbeddedImage):
            return name.encode("utf-8", "surrogatepass")
        try:
            data = image_bytes(image)
        except OSError as error:
            self._report.missing.append(f"{where}: {name}: {error.strerror or error}")
            return name.encode("utf-8", "surrogatepass")
        if self._decode:
            try:
                to_image(data, name=name)
            except BadImageError as error:
                self._report.unreadable.append(f"{where}: {error}")
        return hashlib.sha256(data).digest()
