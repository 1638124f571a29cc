"""Parquet preference sets with the images inside: Pick-a-Pic and EditReward-Bench.

Facts: PickScore trainer/datasetss/clip_hf_dataset.py (caption, jpg_0, jpg_1, label_0, label_1);
EditReward/evaluate/inference_3pair_hf.py (columns, and the group an id belongs to).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from arr_fast.data.fields import Row
from arr_fast.data.formats import Format, Sample, fits_task, labelled_pair, parsed, refuse
from arr_fast.data.record import ItemError, Record, image_bytes
from arr_fast.data.streams import PARQUET_BATCH, load_pyarrow, parquet_rows

_RANKING = re.compile(r"([A-D])([<>=])([A-D])")
_PICK = ("caption", "jpg_0", "jpg_1", "label_0", "label_1")
_BENCH = ("id", "dataset", "instruction", "source_image", "candidate_1", "candidate_2")
_BENCH_LABEL = ("ranking", "comparison_type")


def _pickapic(row: Row) -> Record:
    labels = row.number("label_0"), row.number("label_1")
    if row.values.get("has_label") is False:
        ranks = None
    elif min(labels) < 0 or abs(sum(labels) - 1) > 1e-6:
        raise row.error("label_0", "label_0 and label_1 of 0 to 1 that sum to 1 (0.5 each: a tie)")
    else:
        first = (labels[0] > labels[1]) - (labels[0] < labels[1])
        ranks = {1: (1.0, 2.0), -1: (2.0, 1.0), 0: (1.0, 1.0)}[first]
    return Record(
        row.name("ranking_id", "id"),
        row.text("caption"),
        (row.image("jpg_0"), row.image("jpg_1")),
        label_rank=ranks,
        place=row.place,
        metadata=row.rest(*_PICK, "has_label", "ranking_id", "id"),
    )


def _pickapic_row(record: Record) -> dict[str, Any]:
    fits_task(record, "pickapic", source=False)
    if record.kind != "pair":
        raise refuse(record, "pickapic", f"a {record.kind}")
    preference = record.preference
    first = 0.5 if preference is None else (1 + preference) / 2
    return {
        "id": record.name,
        "caption": record.prompt,
        "jpg_0": image_bytes(record.images[0]),
        "jpg_1": image_bytes(record.images[1]),
        "label_0": first,
        "label_1": 1 - first,
        "has_label": preference is not None,
    }


def _bench(row: Row) -> Record:
    ranking = row.text("ranking").replace(" ", "").upper()
    match = _RANKING.fullmatch(ranking)
    if match is None or match[1] == match[3]:
        raise row.error("ranking", 'two of A to D with >, < or =, such as "A>B"')
    compared = row.optional_text("comparison_type")
    # candidate_1 is the letter that comparison_type names first: AvsC shows A and C.
    letters = compared.split("vs") if compared else sorted((match[1], match[3]))
    if sorted(letters) != sorted((match[1], match[3])):
        raise row.error("comparison_type", f"the two letters of ranking {ranking!r}")
    sign = {">": 1, "<": -1, "=": 0}[match[2]] * (1 if match[1] == letters[0] else -1)
    ranks = {1: (1.0, 2.0), -1: (2.0, 1.0), 0: (1.0, 1.0)}[sign]
    name = row.name("id")
    kind = row.values.get("dataset")
    # Items of 3 and 4 candidates are several rows; the reference groups them by the id's prefix.
    prefix = name.split("_")[0] if "_" in name else name[:10]
    return Record(
        name,
        row.text("instruction"),
        (row.image("candidate_1"), row.image("candidate_2")),
        source=row.image("source_image"),
        label_rank=ranks,
        group=f"{kind}/{prefix}" if kind in ("3pair", "4pair") else None,
        place=row.place,
        metadata=row.rest(*_BENCH, *_BENCH_LABEL) | {"dataset": kind},
    )


def _bench_row(record: Record) -> dict[str, Any]:
    fits_task(record, "editreward_bench", source=True)
    preference = labelled_pair(record, "editreward_bench")
    assert record.source is not None
    kind, _, _ = (record.group or "").partition("/")
    return {
        "id": record.name,
        "dataset": kind or "2pair",
        "instruction": record.prompt,
        "source_image": {"bytes": image_bytes(record.source), "path": None},
        "candidate_1": {"bytes": image_bytes(record.images[0]), "path": None},
        "candidate_2": {"bytes": image_bytes(record.images[1]), "path": None},
        "ranking": {1: "A>B", -1: "B>A", 0: "A=B"}[preference],
        "comparison_type": "AvsB",
    }


def write_parquet(rows: Iterator[dict[str, Any]], path: Path) -> int:
    """Writes rows in small row groups, so that a reader needs little memory too."""
    pyarrow, parquet = load_pyarrow()
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.part")
    writer, count = None, 0
    try:
        while batch := list(islice(rows, PARQUET_BATCH)):
            schema = None if writer is None else writer.schema
            table = pyarrow.Table.from_pylist(batch, schema=schema)
            writer = writer or parquet.ParquetWriter(draft, table.schema)
            writer.write_table(table)
            count += len(batch)
        if writer is None:
            raise ItemError(f"{path}: no records to write")
        writer.close()
        draft.replace(path)
    finally:
        if writer is not None:
            writer.close()
        draft.unlink(missing_ok=True)
    return count


def _format(
    name: str,
    about: str,
    columns: tuple[str, ...],
    parse: Callable[[Row], Record],
    row_of: Callable[[Record], dict[str, Any]],
    *keeps: str,
) -> Format:
    def read(path: Path) -> Iterator[Record | ItemError]:
        return parsed(parquet_rows(path), parse)

    def recognises(sample: Sample) -> bool:
        return sample.container == "parquet" and sample.has(*columns)

    def write(records: Iterable[Record], path: Path) -> int:
        return write_parquet((row_of(record) for record in records), path)

    held = frozenset({"id", "images", "label_rank", *keeps})
    return Format(name, about, recognises, read, write, held)


FORMATS = (
    _format(
        "pickapic",
        "Pick-a-Pic parquet: caption, jpg_0, jpg_1, label_0, label_1",
        _PICK,
        _pickapic,
        _pickapic_row,
    ),
    _format(
        "editreward_bench",
        "EditReward-Bench parquet: source_image, candidate_1, candidate_2, ranking",
        (*_BENCH, "ranking"),
        _bench,
        _bench_row,
        "group",
    ),
)
