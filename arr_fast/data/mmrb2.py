"""Multimodal RewardBench 2: text-to-image and editing pairs of interleaved content.

Facts: facebookresearch/MMRB2, README and evaluate/compute_scores (which reads `id`, where the
README says `pair_id`). Responses of several images (interleaved, reasoning) are refused: a judge of
pairs compares one image with one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from arr_fast.data.fields import Row
from arr_fast.data.formats import Format, Sample, decided_pair, parsed
from arr_fast.data.record import ImageRef, ItemError, Record
from arr_fast.data.streams import json_rows
from arr_fast.data.writing import Pictures, write_json_rows

_FIELDS = ("pair_id", "id", "prompt_content", "response_a", "response_b", "chosen")


def parse(row: Row) -> Record:
    """Reads one pair.

    Raises:
        ItemError: naming the place and the field.
    """
    texts, sources = _content(row, "prompt_content", row.values.get("prompt_content"))
    if not texts:
        raise row.error("prompt_content", "at least one text")
    if len(sources) > 1:
        raise ItemError(f"{row.place}: prompt_content: {len(sources)} images, expected 0 or 1")
    chosen = row.values.get("chosen")
    if chosen not in ("A", "B", None):
        raise row.error("chosen", '"A" or "B"')
    extra = row.rest(*_FIELDS)
    images = []
    for field in ("response_a", "response_b"):
        response = row.values.get(field)
        if not isinstance(response, dict):
            raise row.error(field, "an object with response_content")
        _, found = _content(row, f"{field}.response_content", response.get("response_content"))
        if len(found) != 1:
            raise ItemError(
                f"{row.place}: {field}.response_content: {len(found)} images, expected 1"
            )
        images.append(found[0])
        extra[f"{field}_model"] = response.get("model")
    ranks = {"A": (1.0, 2.0), "B": (2.0, 1.0)}
    return Record(
        name=row.name("pair_id", "id"),
        prompt="\n".join(texts),
        images=tuple(images),
        source=sources[0] if sources else None,
        label_rank=None if chosen is None else ranks[chosen],
        place=row.place,
        metadata=extra,
    )


def _content(row: Row, field: str, parts: Any) -> tuple[list[str], list[ImageRef]]:
    """Splits [["text", ...], ["image", ...]] into texts and images."""
    shape = '[["text" | "image", value], ...]'
    if not isinstance(parts, list):
        raise ItemError(f"{row.place}: {field}: expected {shape}, got {type(parts).__name__}")
    texts, images = [], []
    for number, part in enumerate(parts):
        name = f"{field}[{number}]"
        if not (isinstance(part, list) and len(part) == 2 and part[0] in ("text", "image")):
            raise ItemError(f"{row.place}: {name}: expected {shape}, got {part!r:.60}")
        inner = Row(row.place, row.folder, {name: part[1]})
        if part[0] == "image":
            images.append(inner.image(name))
        elif isinstance(part[1], str) and not part[1].strip():
            continue
        else:
            texts.append(inner.text(name))
    return texts, images


def read(path: Path) -> Iterator[Record | ItemError]:
    """Yields the pairs of a file such as t2i.json or edit.json."""
    return parsed(json_rows(path), parse)


def write(records: Iterable[Record], path: Path) -> int:
    """Writes {"pairs": [...]}."""
    pictures = Pictures(path)

    def row(record: Record) -> dict[str, Any]:
        chosen = decided_pair(record, "mmrb2", source=record.source is not None)
        prompt = [["text", record.prompt]]
        if record.source is not None:
            prompt.append(["image", pictures.path(record.source)])
        extra = dict(record.metadata)
        responses = {
            field: {
                "model": extra.pop(f"{field}_model", None),
                "response_content": [["image", pictures.path(image)]],
            }
            for field, image in zip(("response_a", "response_b"), record.images, strict=True)
        }
        return {
            "pair_id": record.name,
            "id": record.name,
            "prompt_content": prompt,
            **responses,
            "chosen": "A" if chosen > 0 else "B",
            **extra,
        }

    return write_json_rows((row(record) for record in records), path, key="pairs")


def recognises(sample: Sample) -> bool:
    """The three nested fields that nobody else has."""
    needed = ("prompt_content", "response_a", "response_b")
    return sample.container == "json" and sample.has(*needed)


FORMAT = Format(
    "mmrb2",
    "MMRB2 JSON: prompt_content, response_a, response_b, chosen",
    recognises,
    read,
    write,
    frozenset({"id", "images", "label_rank", "metadata"}),
)
