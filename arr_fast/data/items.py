"""What the commands judge: items from options, or from a JSONL or JSON file.

A file may use this project's names (prompt, image_a, image_b, source) or those of the Auto-Rubric
reference (docs/data_formats.md there): see the tables below. Paths are relative to the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arr_fast.errors import ArrFastError

PROMPT = ("prompt", "query", "instruction", "caption", "text")
SOURCE = (
    "source",
    "source_image",
    "base_image",
    "original_image",
    "input_image",
    "reference_image",
    "ref_image",
)
EDITED = (
    "edited_images",
    "edited_image",
    "target_images",
    "target_image",
    "output_images",
    "output_image",
    "result_images",
    "result_image",
)
IMAGES = (
    "image_paths",
    "response",
    "responses",
    "images",
    "image",
    "generated_images",
    "generated_image",
)


class ItemError(ArrFastError, ValueError):
    """An input file or one of its items is malformed; the message names the line and the field."""


@dataclass(frozen=True, slots=True)
class InputItem:
    """One prompt with the images to judge.

    Attributes:
        name: The item's own id, else its place in the file; for messages and output.
        prompt: Caption or edit instruction.
        images: Paths of the images to judge, in order (A, B for a pair).
        source: Path of the image that was edited, or None for text-to-image.
        rubric: Name or path of a rubric of its own, or None.
        label_rank: Human ranks per image, 1 is best, or None; passed through.
    """

    name: str
    prompt: str
    images: tuple[str, ...]
    source: str | None = None
    rubric: str | None = None
    label_rank: tuple[float, ...] | None = None


def read_items(path: Path, *, count: int | None) -> list[InputItem]:
    """Reads items from a .jsonl file, or from a .json file that holds a list.

    Args:
        path: The file.
        count: Images that each item must have; None for two or more (a group).

    Raises:
        ItemError: naming the file, the item and the field.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ItemError(f"{path}: cannot read: {error}") from error
    records = _records(text, path)
    if not records:
        raise ItemError(f"{path}: holds no items")
    items = []
    for where, record in records:
        if not isinstance(record, dict):
            raise ItemError(f"{where}: expected an object, got {type(record).__name__}")
        items.append(_item(record, where, path.parent, count))
    return items


def _records(text: str, path: Path) -> list[tuple[str, Any]]:
    if path.suffix.lower() == ".json":
        try:
            data = json.loads(text)
        except ValueError as error:
            raise ItemError(f"{path}: not valid JSON: {error}") from error
        # MMRB2 and others wrap the list in one key.
        if isinstance(data, dict):
            lists = [value for value in data.values() if isinstance(value, list)]
            data = lists[0] if len(lists) == 1 else data
        if not isinstance(data, list):
            raise ItemError(f"{path}: expected a list of items")
        return [(f"{path} item {index}", record) for index, record in enumerate(data)]
    records = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            try:
                records.append((f"{path} line {number}", json.loads(line)))
            except ValueError as error:
                raise ItemError(f"{path} line {number}: not valid JSON: {error}") from error
    return records


def _item(record: Mapping[str, Any], where: str, folder: Path, count: int | None) -> InputItem:
    prompt = _first(record, PROMPT)
    if not isinstance(prompt, str) or not prompt.strip():
        raise ItemError(f"{where}: needs a non-empty string under one of: {', '.join(PROMPT)}")
    label = record.get("label_rank")
    source, images = _pictures(record, where, len(label) if isinstance(label, list) else None)
    if count is not None and len(images) != count:
        raise ItemError(f"{where}: has {len(images)} images to judge, expected {count}")
    if count is None and len(images) < 2:
        raise ItemError(f"{where}: has {len(images)} images to judge, expected 2 or more")
    if isinstance(label, list) and len(label) != len(images):
        raise ItemError(f"{where}: label_rank has {len(label)} ranks for {len(images)} images")
    rubric = record.get("rubric")
    if isinstance(rubric, str) and (folder / rubric).is_file():
        rubric = str(folder / rubric)
    name = record.get("id", record.get("pair_id"))
    return InputItem(
        name=str(name) if name is not None else where.removeprefix(f"{folder}/"),
        prompt=prompt,
        images=tuple(str(folder / image) for image in images),
        source=None if source is None else str(folder / source),
        rubric=rubric if isinstance(rubric, str) else None,
        label_rank=tuple(label) if isinstance(label, list) else None,
    )


def _pictures(
    record: Mapping[str, Any], where: str, ranked: int | None
) -> tuple[str | None, list[str]]:
    """Returns (source, images to judge)."""
    found = _first(record, SOURCE)
    sources = [] if found is None else _paths(found, where, "source image")
    source = sources[0] if sources else None
    if "image_a" in record or "image_b" in record:
        pair = [record.get("image_a"), record.get("image_b")]
        return source, [_paths(p, where, f"image_{n}")[0] for n, p in zip("ab", pair, strict=True)]
    edited = _first(record, EDITED)
    if edited is not None:
        return source, _paths(edited, where, "edited image")
    images = _paths(_first(record, IMAGES), where, "image")
    # The reference's old layout: response = [base, edit 1, edit 2].
    leading_base = record.get("response_includes_base")
    if leading_base is None:
        leading_base = source is None and ranked is not None and len(images) == ranked + 1
    if leading_base:
        source, images = source or images[0], images[1:]
    return source, images


def _paths(value: Any, where: str, what: str) -> list[str]:
    paths = [value] if isinstance(value, str) else value
    if (
        not isinstance(paths, Sequence)
        or not paths
        or not all(isinstance(path, str) and path for path in paths)
    ):
        raise ItemError(f"{where}: needs a path or a list of paths for the {what}, got {value!r}")
    return list(paths)


def _first(record: Mapping[str, Any], names: Sequence[str]) -> Any:
    return next((record[name] for name in names if record.get(name) is not None), None)
