"""Labelled pairs as the loop needs them: decoded images, a winner, and nothing that contradicts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from arr_fast.data.record import EmbeddedImage, ImageRef, Record
from arr_fast.errors import BadImageError
from arr_fast.images import CanonicalImage, to_image


@dataclass(frozen=True, slots=True)
class LabelledPair:
    """Two images for a prompt, and which one people prefer.

    Attributes:
        name: For messages and reports.
        prompt: Caption or edit instruction.
        images: (A, B).
        preferred: 1 for A, 2 for B.
        source: The image that was edited, or None.
    """

    name: str
    prompt: str
    images: tuple[CanonicalImage, CanonicalImage]
    preferred: Literal[1, 2]
    source: CanonicalImage | None = None

    @property
    def task(self) -> Literal["t2i", "edit"]:
        """Editing where there is a source image."""
        return "t2i" if self.source is None else "edit"

    @property
    def label(self) -> int:
        """1 where A is preferred, -1 where B is."""
        return 1 if self.preferred == 1 else -1

    @property
    def shown(self) -> tuple[CanonicalImage, ...]:
        """The images in order of appearance: the source, if any, then A and B."""
        return self.images if self.source is None else (self.source, *self.images)

    @property
    def content_key(self) -> str:
        """Hash of what a judge sees; the label is not part of it."""
        content = [self.prompt, self.source is not None, *(i.content_hash for i in self.shown)]
        return digest(content)

    @property
    def cluster(self) -> tuple[str, str]:
        """Pairs with equal clusters are never parted by a split: same prompt, same source."""
        return self.prompt, self.source.content_hash if self.source else ""


@dataclass(slots=True)
class Reading:
    """Usable pairs, and what was left out and why.

    Attributes:
        pairs: In order; each distinct.
        unlabelled: Records without a label.
        ties: Pairs that people call a tie.
        duplicates: Pairs that repeat an earlier one.
        contradictions: Pairs whose copies have different labels; all copies are left out.
        unreadable: Missing or damaged images, named.
    """

    pairs: list[LabelledPair] = field(default_factory=list)
    unlabelled: int = 0
    ties: int = 0
    duplicates: list[str] = field(default_factory=list)
    contradictions: list[str] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    def problems(self) -> dict[str, list[str]]:
        """What a report lists."""
        return {
            "contradictions": self.contradictions,
            "duplicates": self.duplicates,
            "unreadable": self.unreadable,
        }


def read_labelled(records: Iterable[Record]) -> Reading:
    """Decodes images and sorts out what cannot teach anything; groups are taken apart."""
    reading = Reading()
    seen: dict[str, tuple[str, LabelledPair]] = {}
    contradicted: set[str] = set()
    for record in records:
        if record.label_rank is None or len(record.images) < 2:
            reading.unlabelled += 1
            continue
        for pair in record.pairs():
            preference = pair.preference
            if not preference:
                reading.ties += 1
                continue
            try:
                read = _decode(pair, 1 if preference > 0 else 2)
            except (BadImageError, OSError) as error:
                reading.unreadable.append(str(error))
                continue
            key, winner = _identity(read)
            if key not in seen:
                seen[key] = (winner, read)
            elif seen[key][0] == winner:
                reading.duplicates.append(f"{read.name} repeats {seen[key][1].name}")
            else:
                contradicted.add(key)
                reading.contradictions.append(f"{read.name} contradicts {seen[key][1].name}")
    reading.pairs = [pair for key, (_, pair) in seen.items() if key not in contradicted]
    return reading


def cluster_numbers(pairs: Iterable[LabelledPair]) -> np.ndarray:
    """Returns int [N]: equal clusters get equal numbers, from 0 in order of appearance."""
    numbers: dict[tuple[str, str], int] = {}
    return np.array([numbers.setdefault(p.cluster, len(numbers)) for p in pairs], dtype=int)


def digest(content: object) -> str:
    """sha256 hex (32 digits) of a JSON-able value."""
    text = json.dumps(content, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _decode(record: Record, preferred: Literal[1, 2]) -> LabelledPair:
    def read(image: ImageRef, what: str) -> CanonicalImage:
        data = image.data if isinstance(image, EmbeddedImage) else image
        return to_image(data, name=f"{record.name}: {what}")

    first, second = (
        read(image, f"image {side}") for image, side in zip(record.images, "AB", strict=True)
    )
    source = None if record.source is None else read(record.source, "source image")
    return LabelledPair(record.name, record.prompt, (first, second), preferred, source)


def _identity(pair: LabelledPair) -> tuple[str, str]:
    """(key of prompt, source and the set of images; hash of the winner)."""
    hashes = [image.content_hash for image in pair.images]
    source = pair.source.content_hash if pair.source else ""
    return digest([pair.prompt, source, sorted(hashes)]), hashes[pair.preferred - 1]
