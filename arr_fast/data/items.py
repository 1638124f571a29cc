"""What the commands judge: records with a given number of images, from a file of any format."""

from __future__ import annotations

from pathlib import Path

from arr_fast.data.arr_json import EDITED, IMAGES, PROMPT, SOURCE
from arr_fast.data.arr_json import read as read_arr
from arr_fast.data.record import ItemError, UnknownFormatError
from arr_fast.data.record import Record as InputItem
from arr_fast.data.registry import detect, locate
from arr_fast.data.streams import JSON_LINES

__all__ = ["EDITED", "IMAGES", "PROMPT", "SOURCE", "InputItem", "ItemError", "read_items"]


def read_items(path: Path, *, count: int | None) -> list[InputItem]:
    """Reads all records of a file.

    Args:
        path: A file or folder of any format that `arr_fast.data.registry` knows.
        count: Images that each item must have; None for two or more (a group).

    Raises:
        ItemError: naming the file, the item and the field.
    """
    where = locate(path)
    try:
        read = detect(where).read
    except UnknownFormatError:
        if where.suffix.lower() not in (".json", *JSON_LINES):
            raise
        # No format fits: the project's own says most exactly what is missing.
        read = read_arr
    items = []
    for item in read(where):
        if isinstance(item, ItemError):
            raise item
        found = len(item.images)
        if count is not None and found != count:
            raise ItemError(f"{item.place}: has {found} images to judge, expected {count}")
        if count is None and found < 2:
            raise ItemError(f"{item.place}: has {found} images to judge, expected 2 or more")
        items.append(item)
    if not items:
        raise ItemError(f"{path}: holds no items")
    return items
