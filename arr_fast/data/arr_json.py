"""Auto-Rubric JSON: the reference's format with all its aliases, and this project's own names.

Facts: OpenEnvision/AutoRubric-as-Reward, docs/data_formats.md and rubric_pipeline/utils/vision.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from arr_fast.data.fields import Row
from arr_fast.data.formats import OPTIONAL, Format, Sample, name_field, parsed, refuse
from arr_fast.data.record import ImageRef, ItemError, Record
from arr_fast.data.streams import json_rows
from arr_fast.data.writing import Pictures, write_json_rows

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
PAIR = ("image_a", "image_b")
_OTHER = (
    *("id", "pair_id", "rubric", "criterion", "group", "label_rank", "label_score"),
    *("response_includes_base", "metadata"),
)


def parse(row: Row) -> Record:
    """Reads one object.

    Raises:
        ItemError: naming the place and the field.
    """
    values = row.values
    prompt = name_field(row, *PROMPT)
    if prompt is None or not isinstance(values[prompt], str) or not values[prompt].strip():
        names = ", ".join(PROMPT)
        field = prompt or PROMPT[0]
        raise ItemError(f"{row.place}: {field}: needs a non-empty string under one of: {names}")
    ranked = values.get("label_rank")
    if ranked is not None and not isinstance(ranked, list):
        raise row.error("label_rank", "a list of ranks, 1 is best")
    source, images = _pictures(row, None if ranked is None else len(ranked))
    score = None
    if values.get("label_score") is not None:
        if len(images) != 1:
            raise ItemError(
                f"{row.place}: label_score: scores one image, the record has {len(images)}; "
                "use label_rank"
            )
        score = row.number("label_score")
    rubric = row.optional_text("rubric")
    if rubric is not None and (row.folder / rubric).is_file():
        rubric = str(row.folder / rubric)
    extra = values.get("metadata")
    if extra is not None and not isinstance(extra, dict):
        raise row.error("metadata", "an object")
    return Record(
        name=row.name("id", "pair_id"),
        prompt=row.text(prompt),
        images=images,
        source=source,
        rubric=rubric,
        label_rank=None if ranked is None else row.numbers("label_rank", len(images)),
        label_score=score,
        criterion=row.optional_text("criterion"),
        group=row.optional_text("group"),
        place=row.place,
        metadata={
            **row.rest(*PROMPT, *SOURCE, *EDITED, *IMAGES, *PAIR, *_OTHER),
            **(extra or {}),
        },
    )


def _pictures(row: Row, ranked: int | None) -> tuple[ImageRef | None, tuple[ImageRef, ...]]:
    """Returns (source, images to judge)."""
    name = name_field(row, *SOURCE)
    source = None if name is None else row.images(name)[0]
    if any(field in row.values for field in PAIR):
        return source, tuple(row.image(field) for field in PAIR)
    edited = name_field(row, *EDITED)
    if edited is not None:
        return source, row.images(edited)
    images = row.images(name_field(row, *IMAGES) or IMAGES[0])
    # The reference's old layout: response = [base, edit 1, edit 2].
    leading_base = row.values.get("response_includes_base")
    if leading_base is None:
        leading_base = source is None and ranked is not None and len(images) == ranked + 1
    if leading_base:
        if len(images) < 2:
            raise ItemError(f"{row.place}: response_includes_base: leaves no image to judge")
        source, images = source or images[0], images[1:]
    return source, images


def read(path: Path) -> Iterator[Record | ItemError]:
    """Yields the records of a .jsonl or .json file."""
    return parsed(json_rows(path), parse)


def recognises(sample: Sample) -> bool:
    """A prompt and images, each under one of the names above."""
    named = sample.fields & {*EDITED, *IMAGES, *PAIR}
    return sample.container == "json" and bool(named) and bool(sample.fields & {*PROMPT})


def write(records: Iterable[Record], path: Path) -> int:
    """Writes records under the reference's names, which its own tools read."""
    pictures = Pictures(path)
    return write_json_rows((_object(record, pictures) for record in records), path)


def _object(record: Record, pictures: Pictures) -> dict[str, Any]:
    if not record.images:
        raise refuse(record, "arr", "a prompt without images")
    images = [pictures.path(image) for image in record.images]
    single = len(images) == 1
    row: dict[str, Any] = {"id": record.name, "query": record.prompt}
    if record.source is not None:
        row["source_image"] = pictures.path(record.source)
        row["edited_images"] = images
    else:
        row["response"] = images[0] if single else images
    if record.label_rank is not None:
        row["label_rank"] = list(record.label_rank)
    optional = {
        "label_score": record.label_score,
        "criterion": record.criterion,
        "group": record.group,
        "rubric": record.rubric,
        "metadata": dict(record.metadata) or None,
    }
    return row | {key: value for key, value in optional.items() if value is not None}


FORMAT = Format(
    "arr",
    "Auto-Rubric JSON or JSONL: pairs, groups, edits, single images",
    recognises,
    read,
    write,
    frozenset(OPTIONAL),
)
