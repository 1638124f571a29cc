"""JSON preference sets: HPDv2, HPDv3, EditReward-Data, ImageRewardDB.

Facts: tgxs002/HPSv2, MizzenAI/HPSv3 (path1 is the preferred image), TIGER-AI-Lab/EditReward,
THUDM/ImageReward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from arr_fast.data.fields import Row
from arr_fast.data.formats import Format, Sample, decided_pair, fits_task, parsed, refuse
from arr_fast.data.record import ImageRef, ItemError, Record
from arr_fast.data.streams import json_rows
from arr_fast.data.writing import Pictures, write_json_rows

_SCORES = tuple(
    f"model{i}_{name}" for i in (1, 2) for name in ("dim1_score", "dim2_score", "overall_score")
)


def _hpdv2(row: Row) -> Record:
    """train.json has votes for and against; test.json has ranks."""
    is_train = "file_path" in row.values
    images = row.images("file_path" if is_train else "image_path")
    if len(images) < 2:
        raise row.error("file_path" if is_train else "image_path", "two or more paths")
    if is_train:
        votes = row.numbers("human_preference", len(images))
        if not set(votes) <= {0, 1}:
            raise row.error("human_preference", "1 for the preferred image and 0 for the others")
        ranks: tuple[float, ...] = tuple(2 - vote for vote in votes)
    else:
        ranks = row.numbers("rank", len(images))
    known = ("prompt", "file_path", "image_path", "human_preference", "rank")
    return Record(
        row.default_name,
        row.text("prompt"),
        images,
        label_rank=ranks,
        place=row.place,
        metadata=row.rest(*known),
    )


def _hpdv2_row(record: Record, pictures: Pictures) -> dict[str, Any]:
    fits_task(record, "hpdv2", source=False)
    if record.label_rank is None:
        raise refuse(record, "hpdv2", "no label_rank")
    images = [pictures.path(image) for image in record.images]
    if record.kind == "pair":
        votes = [int(rank == min(record.label_rank)) for rank in record.label_rank]
        return {"human_preference": votes, "prompt": record.prompt, "file_path": images}
    return {"prompt": record.prompt, "image_path": images, "rank": list(record.label_rank)}


def _preferred_first(row: Row, source: ImageRef | None, ranks: tuple[float, float]) -> Record:
    known = ("id", "prompt", "path1", "path2", "path_src")
    return Record(
        row.name("id"),
        row.text("prompt"),
        (row.image("path1"), row.image("path2")),
        source=source,
        label_rank=ranks,
        place=row.place,
        metadata=row.rest(*known),
    )


def _hpdv3(row: Row) -> Record:
    return _preferred_first(row, None, (1, 2))


def _hpdv3_row(record: Record, pictures: Pictures) -> dict[str, Any]:
    order = decided_pair(record, "hpdv3", source=False)
    first, second = record.images[::order]
    return {
        "prompt": record.prompt,
        "path1": pictures.path(first),
        "path2": pictures.path(second),
        **record.metadata,
    }


def _editreward(row: Row) -> Record:
    # Only an explicit True is a tie: the scores are the annotators' means, not the label.
    tied = row.values.get("tie_case") is True
    for name in _SCORES:
        if row.values.get(name) is not None:
            row.number(name)
    return _preferred_first(row, row.image("path_src"), (1, 1) if tied else (1, 2))


def _editreward_row(record: Record, pictures: Pictures) -> dict[str, Any]:
    tied = record.preference == 0
    if tied:
        fits_task(record, "editreward_data", source=True)
    order = 1 if tied else decided_pair(record, "editreward_data", source=True)
    first, second = record.images[::order]
    assert record.source is not None
    return {
        "prompt": record.prompt,
        "path_src": pictures.path(record.source),
        "path1": pictures.path(first),
        "path2": pictures.path(second),
        **record.metadata,
        "tie_case": tied,
    }


def _imagerewarddb(row: Row) -> Record:
    images = row.images("generations")
    if len(images) < 2:
        raise row.error("generations", "two or more paths")
    return Record(
        row.name("id"),
        row.text("prompt"),
        images,
        label_rank=row.numbers("ranking", len(images)),
        place=row.place,
        metadata=row.rest("id", "prompt", "generations", "ranking"),
    )


def _imagerewarddb_row(record: Record, pictures: Pictures) -> dict[str, Any]:
    fits_task(record, "imagerewarddb", source=False)
    if record.label_rank is None:
        raise refuse(record, "imagerewarddb", "no label_rank")
    return {
        "id": record.name,
        "prompt": record.prompt,
        "generations": [pictures.path(image) for image in record.images],
        "ranking": list(record.label_rank),
    }


def _format(
    name: str,
    about: str,
    recognises: Callable[[Sample], bool],
    parse: Callable[[Row], Record],
    row_of: Callable[[Record, Pictures], dict[str, Any]],
    *keeps: str,
) -> Format:
    def read(path: Path) -> Iterator[Record | ItemError]:
        return parsed(json_rows(path), parse)

    def write(records: Iterable[Record], path: Path) -> int:
        pictures = Pictures(path)
        return write_json_rows((row_of(record, pictures) for record in records), path)

    return Format(
        name,
        about,
        lambda sample: sample.container == "json" and recognises(sample),
        read,
        write,
        frozenset({"images", "label_rank", *keeps}),
    )


FORMATS = (
    _format(
        "hpdv2",
        "HPDv2 train.json (human_preference) or test.json (rank)",
        lambda s: any(
            s.has("prompt", *names)
            for names in (("file_path", "human_preference"), ("image_path", "rank"))
        ),
        _hpdv2,
        _hpdv2_row,
    ),
    _format(
        "hpdv3",
        "HPDv3 JSON: path1 is preferred to path2",
        lambda s: s.has("prompt", "path1", "path2") and not s.has("path_src"),
        _hpdv3,
        _hpdv3_row,
        "metadata",
    ),
    _format(
        "editreward_data",
        "EditReward-Data JSON: path_src edited into path1 (preferred) and path2",
        lambda s: s.has("prompt", "path1", "path2", "path_src"),
        _editreward,
        _editreward_row,
        "metadata",
    ),
    _format(
        "imagerewarddb",
        "ImageRewardDB JSON: generations with a ranking",
        lambda s: s.has("prompt", "generations", "ranking"),
        _imagerewarddb,
        _imagerewarddb_row,
        "id",
    ),
)
