"""easy-VQA as pointwise records: a picture, its yes/no question as the criterion, the answer.

Facts: the PyPI package easy-vqa (MIT): data/{train,test}/questions.json holds [question, answer,
image number], beside images/{number}.png. Questions about a colour or shape have no yes or no and
are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

from arr_fast.data.formats import Format, Sample
from arr_fast.data.record import ItemError, Place, Record
from arr_fast.errors import MissingDependencyError

INSTALLED = "easy-vqa:"
# Says nothing about the picture: the question alone decides.
CAPTION = "an image"


def installed(name: str) -> Path:
    """Returns the folder of "easy-vqa:train" or "easy-vqa:test" inside the installed package.

    Raises:
        MissingDependencyError: easy-vqa is not installed.
        ItemError: for another split.
    """
    split = name.removeprefix(INSTALLED)
    if split not in ("train", "test"):
        raise ItemError(f"{name}: expected easy-vqa:train or easy-vqa:test")
    try:
        return Path(str(resources.files("easy_vqa") / "data" / split))
    except ModuleNotFoundError:
        raise MissingDependencyError("easy-vqa", "shapes") from None


def read(path: Path) -> Iterator[Record | ItemError]:
    """Yields one record per yes/no question of a split.

    Raises:
        ItemError: if questions.json is no list of [question, answer, image number].
    """
    file = path / "questions.json"
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ItemError(f"{file}: cannot read: {error}") from error
    if not isinstance(rows, list):
        raise ItemError(f"{file}: expected a list of [question, answer, image number]")
    for number, row in enumerate(rows):
        # The whole file is one line: the item's number says more than the line's.
        place = Place(str(file), number + 1)
        types = [type(value) for value in row] if isinstance(row, list) else []
        if types != [str, str, int]:
            yield ItemError(f"{place}: expected [question, answer, image number], got {row!r:.60}")
            continue
        question, answer, picture = row
        if answer in ("yes", "no"):
            yield Record(
                f"{path.name}:{number + 1}",
                CAPTION,
                (str(path / "images" / f"{picture}.png"),),
                label_score=float(answer == "yes"),
                criterion=question,
                place=place,
            )


def recognises(sample: Sample) -> bool:
    """A folder with questions.json and images."""
    return sample.container == "folder" and sample.has("questions.json", "images")


FORMAT = Format(
    "easy_vqa",
    "easy-VQA split folder, or easy-vqa:test of the installed package",
    recognises,
    read,
)
