"""The one record that every format is read into: a prompt, images, a label, and where it came from.

A record without images is a prompt, with one image a point, with two a pair, with more a group.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import combinations
from pathlib import Path
from typing import Any, Literal

from arr_fast.errors import ArrFastError

Kind = Literal["prompt", "point", "pair", "group"]


class ItemError(ArrFastError, ValueError):
    """An input file or one of its records is malformed; the message names file, line and field."""


class UnknownFormatError(ItemError):
    """No known format recognises a file; the message lists what it holds and the formats."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a record begins.

    Attributes:
        file: The file, as given.
        line: Line of a text file, row of a parquet file; from 1. 0 means the file as a whole.
        nth: Which of the records that begin on that line; from 1.
    """

    file: str
    line: int = 0
    nth: int = 1

    def __str__(self) -> str:
        return f"{self.file}:{self.within}" if self.line else self.file

    @property
    def name(self) -> str:
        """What a record without an id is called: the file's own name and the place in it."""
        return f"{Path(self.file).name}:{self.within}"

    @property
    def within(self) -> str:
        """The place without the file: "12", or "1#3" for the third record of one line."""
        return f"{self.line}#{self.nth}" if self.nth > 1 else str(self.line)


@dataclass(frozen=True, slots=True)
class EmbeddedImage:
    """An encoded image that lies inside a data file.

    Attributes:
        name: What to call it, for example "pairs.parquet:3 jpg_0".
        data: The encoded file (JPEG, PNG, ...).
    """

    name: str
    data: bytes = field(repr=False)

    def __str__(self) -> str:
        return self.name


# A path (absolute, or joined to the folder of the data file), or the bytes themselves.
ImageRef = str | EmbeddedImage


def image_bytes(image: ImageRef) -> bytes:
    """Returns the encoded file.

    Raises:
        OSError: if a path cannot be read.
    """
    return image.data if isinstance(image, EmbeddedImage) else Path(image).read_bytes()


@dataclass(frozen=True, slots=True)
class Record:
    """One prompt with the images made for it and what people said about them.

    Attributes:
        name: The record's own id, else its place in the file; for messages and output.
        prompt: Caption or edit instruction.
        images: The images to judge, in order (A, B for a pair).
        source: The image that was edited, or None for text-to-image.
        rubric: Name or path of a rubric of its own, or None.
        label_rank: Human ranks per image, 1 is best and equal ranks are ties; None if unlabelled.
        label_score: Human score of a single image; 1 and 0 where `criterion` is a yes/no question.
        criterion: A criterion of its own to judge by (a question about one image), or None.
        group: Records of one group are right only together (EditReward-Bench), else None.
        place: Where the record was read.
        metadata: What else the format says, untouched.
    """

    name: str
    prompt: str
    images: tuple[ImageRef, ...] = ()
    source: ImageRef | None = None
    rubric: str | None = None
    label_rank: tuple[float, ...] | None = None
    label_score: float | None = None
    criterion: str | None = None
    group: str | None = None
    place: Place | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def has_id(self) -> bool:
        """Whether its name is more than its place in the file."""
        return self.place is None or self.name != self.place.name

    @property
    def kind(self) -> Kind:
        """What the number of images makes of it."""
        kinds: tuple[Kind, ...] = ("prompt", "point", "pair", "group")
        return kinds[min(len(self.images), 3)]

    @property
    def task(self) -> Literal["t2i", "edit"]:
        """Editing where there is a source image, else text-to-image."""
        return "t2i" if self.source is None else "edit"

    @property
    def preference(self) -> int | None:
        """Label of a pair: 1 if A is better, -1 if B is, 0 for a tie; None if it has none."""
        if self.label_rank is None or len(self.images) != 2:
            return None
        first, second = self.label_rank
        return (first < second) - (first > second)

    def pairs(self) -> Iterator[Record]:
        """Yields the record if it is a pair, else all pairs of a group, named "name[i,j]"."""
        if len(self.images) == 2:
            yield self
            return
        for i, j in combinations(range(len(self.images)), 2):
            ranks = self.label_rank
            yield replace(
                self,
                name=f"{self.name}[{i},{j}]",
                images=(self.images[i], self.images[j]),
                label_rank=None if ranks is None else (ranks[i], ranks[j]),
            )
