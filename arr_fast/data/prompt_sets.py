"""Prompts without labels: GenEval metadata and outputs, and the dataset folders of flow_grpo.

Facts: djghosh13/geneval (evaluation_metadata.jsonl, outputs/00000/samples/0000.png); yifan123/
flow_grpo dataset/<name>/{train,test}.txt or {train,test}_metadata.jsonl.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from arr_fast.data.fields import Row
from arr_fast.data.formats import Format, Sample, parsed, refuse
from arr_fast.data.record import ItemError, Record
from arr_fast.data.streams import json_lines, json_rows, text_lines
from arr_fast.data.writing import Pictures, plain, replacing, write_json_rows

_OUTPUT = re.compile(r"\d{5}")
_SPLITS = ("train", "test")
_PICTURE = (".png", ".jpg", ".jpeg", ".webp")


def _geneval(row: Row) -> Record:
    row.text("tag")
    include = row.values.get("include")
    if not isinstance(include, list) or not include:
        raise row.error("include", "a list of objects with class and count")
    for number, item in enumerate(include):
        known = isinstance(item, dict) and isinstance(item.get("class"), str)
        if not known or not isinstance(item.get("count"), int):
            raise ItemError(f"{row.place}: include[{number}]: expected an object with class, count")
    return Record(
        row.default_name, row.text("prompt"), place=row.place, metadata=row.rest("prompt")
    )


def read_geneval(path: Path) -> Iterator[Record | ItemError]:
    """Yields prompts of a metadata file; of an output folder also the images made for them."""
    if not path.is_dir():
        yield from parsed(json_rows(path), _geneval)
        return
    for folder in sorted(f for f in path.iterdir() if _OUTPUT.fullmatch(f.name) and f.is_dir()):
        images = sorted(f for f in (folder / "samples").glob("*") if f.suffix.lower() in _PICTURE)
        for record in parsed(json_lines(folder / "metadata.jsonl"), _geneval):
            if isinstance(record, Record):
                record = replace(record, name=folder.name, images=tuple(map(str, images)))
            yield record


def write_geneval(records: Iterable[Record], path: Path) -> int:
    """Writes evaluation_metadata.jsonl; only prompts that say what an image must include."""

    def row(record: Record) -> dict[str, Any]:
        if not {"tag", "include"} <= record.metadata.keys():
            raise refuse(record, "geneval", "no tag and include in its metadata")
        return {**record.metadata, "prompt": record.prompt}

    return write_json_rows((row(record) for record in records), path)


def _recognises_geneval(sample: Sample) -> bool:
    if sample.container == "folder":
        return any(map(_OUTPUT.fullmatch, sample.fields))
    return sample.container == "json" and sample.has("tag", "include", "prompt")


def read_flow_grpo(path: Path) -> Iterator[Record | ItemError]:
    """Yields the prompts of a folder, split by split, or of one of its .txt files."""
    files = [path] if path.is_file() else [f for f in map(path.joinpath, _names()) if f.is_file()]
    for file in files:
        split = file.stem.removesuffix("_metadata")
        if file.suffix == ".txt":
            for place, line in text_lines(file):
                if isinstance(line, ItemError):
                    yield line
                    continue
                row = Row(place, file.parent, {"prompt": line})
                yield Record(row.default_name, line, place=place, metadata={"split": split})
        else:
            for record in parsed(json_lines(file), _flow_grpo):
                if isinstance(record, Record):
                    record = replace(record, metadata={**record.metadata, "split": split})
                yield record


def _flow_grpo(row: Row) -> Record:
    # The edit trainers give every prompt the image that it edits.
    return Record(
        row.default_name,
        row.text("prompt"),
        source=row.image("image") if row.values.get("image") is not None else None,
        place=row.place,
        metadata=row.rest("prompt", "image"),
    )


def write_flow_grpo(records: Iterable[Record], path: Path) -> int:
    """Writes a folder: plain .txt while prompts are all there is, else {split}_metadata.jsonl."""
    splits: dict[str, list[Record]] = {}
    for record in records:
        if record.images:
            raise refuse(record, "flow_grpo", "images (it holds prompts)")
        splits.setdefault(str(record.metadata.get("split", "train")), []).append(record)
    if unknown := sorted(splits.keys() - set(_SPLITS)):
        raise ItemError(f"{path}: flow_grpo has splits {', '.join(_SPLITS)}, got {unknown[0]!r}")
    for split, found in splits.items():
        bare = all(r.source is None and r.metadata.keys() <= {"split"} for r in found)
        one_line = all(r.prompt == " ".join(r.prompt.splitlines()).strip() for r in found)
        target = path / (f"{split}.txt" if bare and one_line else f"{split}_metadata.jsonl")
        pictures = Pictures(target)
        with replacing(target) as handle:
            for record in found:
                handle.write(_line(record, pictures, target.suffix == ".txt"))
    return sum(map(len, splits.values()))


def _line(record: Record, pictures: Pictures, bare: bool) -> str:
    if bare:
        return f"{record.prompt}\n"
    row = {"prompt": record.prompt}
    if record.source is not None:
        row["image"] = pictures.path(record.source)
    row |= {key: value for key, value in record.metadata.items() if key != "split"}
    return json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n"


def _names() -> list[str]:
    return [f"{split}{end}" for split in _SPLITS for end in (".txt", "_metadata.jsonl")]


def _recognises_flow_grpo(sample: Sample) -> bool:
    if sample.container == "folder":
        return bool(sample.fields.intersection(_names()))
    return sample.container == "text"


FORMATS = (
    Format(
        "geneval",
        "GenEval metadata JSONL, or its output folder with the samples",
        _recognises_geneval,
        read_geneval,
        write_geneval,
        frozenset({"metadata"}),
    ),
    Format(
        "flow_grpo",
        "flow_grpo dataset folder ({split}.txt or {split}_metadata.jsonl), or one .txt file",
        _recognises_flow_grpo,
        read_flow_grpo,
        write_flow_grpo,
        frozenset({"metadata"}),
    ),
)
