"""Bad data: duplicates, contradictions, missing and damaged images, ties."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
from PIL import Image

from arr_fast.autorubric.labelled import cluster_numbers, read_labelled
from arr_fast.data.record import EmbeddedImage, Record


def png(level: int, size: tuple[int, int] = (8, 8), mode: str = "RGB", kind: str = "PNG") -> bytes:
    fill = level if mode in ("L", "I;16") else (level,) * len(Image.new(mode, (1, 1)).getbands())
    buffer = io.BytesIO()
    Image.new(mode, size, fill).save(buffer, kind)
    return buffer.getvalue()


def record(name: str, *images: bytes | str, rank=(1.0, 2.0), prompt: str = "p", **more) -> Record:
    refs = tuple(
        image if isinstance(image, str) else EmbeddedImage(f"{name}-{n}", image)
        for n, image in enumerate(images)
    )
    return Record(name, prompt, refs, label_rank=rank, **more)


A, B, C = png(10), png(100), png(200)


def test_labels_sides_and_clusters() -> None:
    reading = read_labelled(
        [record("x", A, B), record("y", A, C, rank=(2.0, 1.0)), record("z", B, C, prompt="q")]
    )
    assert [(p.name, p.preferred, p.label) for p in reading.pairs] == [
        ("x", 1, 1),
        ("y", 2, -1),
        ("z", 1, 1),
    ]
    assert cluster_numbers(reading.pairs).tolist() == [0, 0, 1]


def test_duplicates_are_kept_once_and_contradictions_not_at_all() -> None:
    reading = read_labelled(
        [
            record("first", A, B),
            record("swapped", B, A, rank=(2.0, 1.0)),
            record("against", A, C),
            record("again", C, A),
        ]
    )
    assert [p.name for p in reading.pairs] == ["first"]
    assert reading.duplicates == ["swapped repeats first"]
    assert reading.contradictions == ["again contradicts against"]


def test_ties_groups_and_unlabelled() -> None:
    reading = read_labelled(
        [
            record("tie", A, B, rank=(1.0, 1.0)),
            record("none", A, B, rank=None),
            record("group", A, B, C, rank=(1.0, 2.0, 3.0)),
        ]
    )
    assert (reading.ties, reading.unlabelled) == (1, 1)
    assert [p.name for p in reading.pairs] == ["group[0,1]", "group[0,2]", "group[1,2]"]


def animated() -> bytes:
    buffer = io.BytesIO()
    frames = [Image.new("L", (8, 8), n) for n in (0, 250)]
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("image", "why"),
    [
        ("/nowhere/at/all.png", "no such file|cannot read"),
        (b"", "0 bytes"),
        (png(5, (1, 20000)), "aspect ratio"),
        (animated(), "animated"),
        (png(5, (64, 64), kind="JPEG")[:-200], "cannot decode"),
    ],
)
def test_images_that_cannot_be_judged_are_named(image, why: str) -> None:
    reading = read_labelled([record("bad one", A, image), record("good", A, B)])
    assert [p.name for p in reading.pairs] == ["good"]
    (message,) = reading.unreadable
    assert "bad one: image B" in message
    assert re.search(why, message, re.IGNORECASE), message


def test_cmyk_and_sixteen_bit_images_are_read() -> None:
    cmyk = png(60, mode="CMYK", kind="TIFF")
    deep = io.BytesIO()
    Image.fromarray(np.full((8, 8), 30000, np.uint16)).save(deep, "PNG")
    (pair,) = read_labelled([record("x", cmyk, deep.getvalue())]).pairs
    assert pair.images[1].pixels[0, 0].tolist() == [117, 117, 117]
