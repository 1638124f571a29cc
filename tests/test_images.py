"""Images: every accepted form gives the same pixels; what is unreadable or ambiguous is named."""

from __future__ import annotations

import hashlib
import io
import struct
import zlib

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from arr_fast.errors import BadImageError
from arr_fast.images import CanonicalImage, to_image, to_images

RNG = np.random.default_rng(7)
PIXELS = RNG.integers(0, 256, size=(20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(grey: np.ndarray) -> bytes:
    """A 16-bit grey PNG written by hand, so that the oracle does not pass through Pillow."""
    height, width = grey.shape
    rows = b"".join(b"\x00" + row.astype(">u2").tobytes() for row in grey)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


def test_every_form_gives_the_same_image(tmp_path):
    pil = Image.fromarray(PIXELS)
    path = tmp_path / "x.png"
    pil.save(path)
    chw = torch.from_numpy(PIXELS).permute(2, 0, 1)
    forms = [
        pil,
        path,
        str(path),
        path.read_bytes(),
        PIXELS,
        PIXELS.transpose(2, 0, 1),
        chw,
        chw.permute(1, 2, 0),
        chw.float() / 255,
        (chw.double() / 255).requires_grad_(),
        PIXELS.astype(np.float32) / 255,
        np.dstack([PIXELS, np.full((20, 30), 255, np.uint8)]),
    ]
    images = [to_image(form, name="x") for form in forms]
    for image in images:
        np.testing.assert_array_equal(image.pixels, PIXELS)
    digest = hashlib.sha256(struct.pack("<3q", 20, 30, 3) + PIXELS.tobytes()).hexdigest()
    assert {image.content_hash for image in images} == {digest}
    assert to_image(images[0], name="x") is images[0]
    np.testing.assert_array_equal(np.asarray(images[0].to_pil()), PIXELS)
    assert (images[0].height, images[0].width) == (20, 30)


def test_pixels_are_read_only_and_do_not_alias_the_source():
    source = PIXELS.copy()
    image = to_image(source, name="x")
    source[:] = 0
    np.testing.assert_array_equal(image.pixels, PIXELS)
    with pytest.raises(ValueError, match="read-only"):
        image.pixels[0, 0, 0] = 1
    by_hand = CanonicalImage(source, "h")
    with pytest.raises(ValueError, match="read-only"):
        by_hand.pixels[0, 0, 0] = 1


def test_hash_tells_shapes_and_pixels_apart():
    flat = np.zeros((6, 10, 3), np.uint8)
    changed = flat.copy()
    changed[5, 9, 2] = 1
    hashes = {to_image(a, name="x").content_hash for a in (flat, flat.reshape(10, 6, 3), changed)}
    assert len(hashes) == 3
    assert to_image(flat, name="x") == to_image(flat.copy(), name="y")
    assert to_image(flat, name="x") != to_image(changed, name="x")


def test_bfloat16_and_half_round_to_nearest():
    values = torch.linspace(0, 1, 30 * 20 * 3).reshape(3, 20, 30)
    for dtype in (torch.bfloat16, torch.float16):
        stored = values.to(dtype)
        expected = torch.round(stored.float() * 255).to(torch.uint8).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(to_image(stored, name="x").pixels, expected)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(Image.fromarray(PIXELS), exif=exif)
    turned = {
        1: PIXELS,
        2: PIXELS[:, ::-1],
        3: PIXELS[::-1, ::-1],
        4: PIXELS[::-1],
        5: PIXELS.transpose(1, 0, 2),
        6: np.rot90(PIXELS, -1),
        7: PIXELS[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(PIXELS, 1),
    }
    np.testing.assert_array_equal(to_image(data, name="x").pixels, turned[orientation])


def test_alpha_is_laid_over_white():
    alpha = RNG.integers(0, 256, size=(20, 30), dtype=np.uint8)
    rgba = np.dstack([PIXELS, alpha])
    share = alpha[..., None] / 255.0
    expected = PIXELS * share + 255.0 * (1 - share)
    for source in (Image.fromarray(rgba, "RGBA"), encoded(Image.fromarray(rgba, "RGBA")), rgba):
        difference = to_image(source, name="x").pixels - expected
        assert np.abs(difference).max() <= 0.5 + 1e-4
    clear = np.zeros((8, 9, 4), np.uint8)
    assert (to_image(clear, name="x").pixels == 255).all()


def test_palette_with_transparency_and_keyed_rgb():
    palette = Image.fromarray(np.array([[0, 1], [1, 2]], np.uint8), "P")
    palette.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    colours = np.array([[10, 20, 30], [40, 50, 60], [70, 80, 90]])
    expected = colours[[[0, 1], [1, 2]]]
    np.testing.assert_array_equal(to_image(encoded(palette), name="x").pixels, expected)
    see_through = to_image(encoded(palette, transparency=1), name="x").pixels
    expected[[0, 1], [1, 0]] = 255
    np.testing.assert_array_equal(see_through, expected)
    keyed = np.zeros((4, 5, 3), np.uint8)
    keyed[0, 0] = (9, 8, 7)
    pixels = to_image(encoded(Image.fromarray(keyed), transparency=(9, 8, 7)), name="x").pixels
    assert (pixels[0, 0] == 255).all() and (pixels[1:] == 0).all()


def test_sixteen_bit_grey_is_scaled():
    grey = np.linspace(0, 65535, 20 * 30).round().reshape(20, 30).astype(np.uint16)
    pixels = to_image(png16(grey), name="x").pixels
    expected = np.round(grey / 65535 * 255)
    assert (pixels == expected[..., None]).all()
    wide = Image.fromarray(grey.astype(np.int32), "I")
    assert (to_image(wide, name="x").pixels == expected[..., None]).all()
    with pytest.raises(BadImageError, match=r"img.*-5\.\.0"):
        to_image(Image.fromarray(np.array([[0, -5]], np.int32), "I"), name="img")


def test_cmyk_and_other_modes():
    cmyk = Image.new("CMYK", (4, 3), (255, 0, 0, 0))
    assert to_image(cmyk, name="x").pixels[0, 0].tolist() == [0, 255, 255]
    bits = Image.fromarray(np.array([[True, False], [False, True]]))
    assert to_image(bits, name="x").pixels[..., 0].tolist() == [[255, 0], [0, 255]]
    assert to_image(Image.new("L", (2, 2), 77), name="x").pixels.tolist() == [[[77] * 3] * 2] * 2
    luminous = Image.new("LA", (2, 2), (0, 0))
    assert (to_image(luminous, name="x").pixels == 255).all()
    floating = Image.fromarray(np.array([[0.0, 0.5], [1.0, 0.25]], np.float32), "F")
    assert to_image(floating, name="x").pixels[..., 1].tolist() == [[0, 128], [255, 64]]


def test_adobe_cmyk_jpeg_keeps_its_colours():
    data = encoded(Image.new("CMYK", (16, 16), (0, 255, 255, 0)), "JPEG", quality=95)
    red = to_image(data, name="x").pixels.reshape(-1, 3).mean(0)
    assert red[0] > 240 and red[1] < 15 and red[2] < 15


def jpeg() -> bytes:
    return encoded(Image.fromarray(RNG.integers(0, 256, (64, 64, 3), np.uint8)), "JPEG")


def animation() -> bytes:
    frames = [Image.new("RGB", (8, 8), c) for c in ("red", "blue")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def dds(code: bytes) -> bytes:
    """The header of a DirectDraw surface of some pixel format, and no pixels."""
    sizes = struct.pack("<7I", 124, 0x1007, 64, 64, 0, 0, 0) + bytes(44)
    return b"DDS " + sizes + struct.pack("<2I4s5I", 32, 4, code, 0, 0, 0, 0, 0) + bytes(20)


def spent() -> Image.Image:
    """An image whose file was closed before its pixels were read."""
    with Image.open(io.BytesIO(jpeg())) as image:
        return image


def verified() -> Image.Image:
    """An image whose file was read to its end to check it."""
    image = Image.open(io.BytesIO(encoded(Image.fromarray(PIXELS))))
    image.verify()
    return image


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (dds(b"ABCD"), "cannot decode: Unimplemented pixel format"),
        (spent(), "cannot decode: "),
        (verified(), "cannot decode: "),
        ("a\x00.png", r"cannot read 'a\\x00.png': embedded null byte"),
        ("\ud800.png", r"cannot read '\\ud800.png'"),
        (b"", "0 bytes"),
        (b"not an image", "not an image format"),
        (jpeg()[:-400], "cannot decode"),
        (encoded(Image.fromarray(PIXELS))[:-60], "cannot decode"),
        (animation(), "animated"),
        (np.zeros((3, 8, 3), np.uint8), "could be"),
        (np.zeros((4, 8, 1), np.uint8), "could be"),
        (torch.zeros(3, 8, 3), "could be"),
        (np.zeros((5, 8, 7), np.uint8), "no axis"),
        (np.zeros((2, 3, 8, 8), np.uint8), "expected one image"),
        (np.zeros((8, 8, 3), np.int64), "dtype int64"),
        (torch.full((3, 8, 8), float("nan")), "192 of 192 values are NaN"),
        (torch.full((3, 8, 8), float("inf")), "infinite"),
        (torch.full((3, 8, 8), 1.001), r"\[1.001, 1.001\]"),
        (torch.full((3, 8, 8), -0.5), r"expected \[0, 1\]"),
        (torch.full((3, 8, 8), 255.0), r"expected \[0, 1\]"),
        (np.zeros((0, 8, 3), np.uint8), "at least 1"),
        (Image.new("RGB", (0, 5)), "at least 1"),
        (np.zeros((8, 1608, 3), np.uint8), "aspect ratio"),
        (Image.new("1", (10_001, 10_000)), "megapixels"),
        (17, "got int"),
        (None, "got NoneType"),
    ],
)
def test_bad_images_are_named(source, expected):
    with pytest.raises(BadImageError, match=expected) as caught:
        to_image(source, name="images_b[3]")
    assert str(caught.value).startswith("images_b[3]")


@pytest.mark.parametrize("place", ["open", "load"])
def test_whatever_a_reader_raises_is_a_bad_image(monkeypatch, place):
    """The AVIF reader raises RuntimeError, for example; not every Pillow has it."""

    def fails(*_: object, **__: object) -> None:
        raise RuntimeError("Failed to decode image")

    data = encoded(Image.fromarray(PIXELS))
    owner = Image if place == "open" else PngImagePlugin.PngImageFile
    monkeypatch.setattr(owner, place, fails)
    with pytest.raises(BadImageError, match=r"^x\[1\]: cannot decode: Failed to decode"):
        to_image(data, name="x[1]")


def test_limits_are_inclusive():
    assert to_image(np.zeros((8, 1600, 3), np.uint8), name="x").width == 1600
    assert to_image(np.zeros((1, 1), np.uint8), name="x").pixels.shape == (1, 1, 3)


def test_a_bomb_is_refused_before_decoding():
    header = struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + header
    data += struct.pack(">I", zlib.crc32(b"IHDR" + header))
    with pytest.raises(BadImageError, match="bomb"):
        to_image(data, name="bomb")


def test_missing_and_directory_paths(tmp_path):
    (tmp_path / "empty.png").touch()
    for path, expected in (
        ("gone.png", "cannot read"),
        (".", "cannot read"),
        ("empty.png", "0 by"),
    ):
        with pytest.raises(BadImageError, match=expected):
            to_image(tmp_path / path, name="a")


def test_batches():
    batch = RNG.integers(0, 256, size=(4, 20, 30, 3), dtype=np.uint8)
    nchw = torch.from_numpy(batch).permute(0, 3, 1, 2)
    for source in (batch, nchw, nchw.float() / 255, list(batch), iter(batch), tuple(nchw)):
        images = to_images(source, name="x")
        np.testing.assert_array_equal(np.stack([i.pixels for i in images]), batch)
    assert to_images([], name="x") == []


@pytest.mark.parametrize(
    "source", ["path.png", b"12", PIXELS, torch.zeros(3, 8, 8), Image.new("RGB", (2, 2)), 5, None]
)
def test_one_image_is_not_a_batch(source):
    with pytest.raises(BadImageError, match=r"^images_a: expected a list"):
        to_images(source, name="images_a")


def test_batch_errors_name_the_item():
    batch = torch.rand(4, 3, 8, 8)
    batch[3, 1, 2, 2] = float("nan")
    with pytest.raises(BadImageError, match=r"^images_b\[3\]: 1 of 192"):
        to_images(batch, name="images_b")
    with pytest.raises(BadImageError, match=r"^images_b\[1\]"):
        to_images([PIXELS, b"junk"], name="images_b")
