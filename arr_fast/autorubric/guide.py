"""Exemplars of expert judgement, for the "with guide" variant."""

from __future__ import annotations

from pathlib import Path

from arr_fast.autorubric.templates import Exemplar
from arr_fast.data.fields import Row
from arr_fast.data.record import ItemError, image_bytes
from arr_fast.data.streams import json_rows
from arr_fast.images import CanonicalImage, to_image


def read_guide(path: Path) -> list[Exemplar]:
    """Reads a JSON or JSONL file of {prompt, preferred, dispreferred, rationale[, source]}.

    Image paths are relative to the file.

    Raises:
        ItemError: A row is malformed or the file is empty; names file, line and field.
        BadImageError: An image is missing or unreadable.
    """
    exemplars = []
    for row in json_rows(path):
        if isinstance(row, ItemError):
            raise row
        exemplars.append(
            Exemplar(
                prompt=row.text("prompt"),
                preferred=_image(row, "preferred"),
                dispreferred=_image(row, "dispreferred"),
                rationale=row.text("rationale"),
                source=_image(row, "source") if row.values.get("source") is not None else None,
            )
        )
    if not exemplars:
        raise ItemError(f"{path}: holds no exemplars")
    return exemplars


def _image(row: Row, field: str) -> CanonicalImage:
    reference = row.image(field)
    try:
        return to_image(image_bytes(reference), name=f"{row.place}: {field}")
    except OSError as error:
        message = f"{row.place}: {field}: cannot read {reference}: {error.strerror or error}"
        raise ItemError(message) from error
