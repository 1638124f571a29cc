"""Anything image-like -> canonical RGB pixels and a content hash.

Canonical means uint8 [H, W, 3], sRGB as stored (embedded colour profiles are not applied, as in the
image processors of transformers), EXIF orientation applied, alpha laid over white. What could be
read in two ways is an error, never a guess.
"""

from __future__ import annotations

import hashlib
import io
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from PIL import Image, ImageOps

from arr_fast.errors import BadImageError

MAX_PIXELS = 100_000_000
MAX_ASPECT = 200
_CHANNELS = (1, 3, 4)
_SIXTEEN_BIT = ("I;16", "I;16B", "I;16L", "I;16N", "I")
_ALPHA = ("RGBA", "LA", "PA", "La", "RGBa")


@dataclass(frozen=True, slots=True, eq=False)
class CanonicalImage:
    """One decoded image. Equal content hashes mean equal pixels.

    Attributes:
        pixels: uint8 [H, W, 3], RGB, read-only.
        content_hash: sha256 hex over (H, W, 3) as little-endian int64, then the bytes.
    """

    pixels: np.ndarray
    content_hash: str

    def __post_init__(self) -> None:
        pixels = self.pixels
        if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
            raise BadImageError(
                f"pixels must be uint8 [H, W, 3], got {pixels.dtype} {list(pixels.shape)}"
            )
        if pixels.flags.writeable:
            view = pixels.view()
            view.setflags(write=False)
            object.__setattr__(self, "pixels", view)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, CanonicalImage) and self.content_hash == other.content_hash

    def __hash__(self) -> int:
        return hash(self.content_hash)

    @property
    def height(self) -> int:
        """Rows of pixels."""
        return int(self.pixels.shape[0])

    @property
    def width(self) -> int:
        """Columns of pixels."""
        return int(self.pixels.shape[1])

    def to_pil(self) -> Image.Image:
        """Returns the image as a PIL image of mode RGB (a copy)."""
        return Image.fromarray(self.pixels)


def to_image(source: Any, *, name: str) -> CanonicalImage:
    """Reads one image.

    Args:
        source: PIL image; path (str or Path); encoded bytes; CanonicalImage; or an array or torch
            tensor: uint8 or float in [0, 1], CHW or HWC (1, 3 or 4 channels) or HW.
        name: What the caller calls this item, for messages: "images_a[3]".

    Returns:
        The canonical image; a CanonicalImage comes back unchanged.

    Raises:
        BadImageError: unreadable, truncated, empty, closed or animated files; NaN or floats outside
            [0, 1]; shapes that fit CHW and HWC alike; over 100 megapixels, a side under 1, or an
            aspect ratio over 200:1.
    """
    if isinstance(source, CanonicalImage):
        return source
    if isinstance(source, Image.Image):
        return _from_pil(source, name)
    if isinstance(source, str | Path):
        return _from_path(Path(source), name)
    if isinstance(source, bytes | bytearray | memoryview):
        return _from_bytes(bytes(source), name)
    array = _as_array(source)
    if array is not None:
        return _from_array(array, name)
    raise BadImageError(
        f"{name}: expected a PIL image, path, bytes, array or tensor, got {type(source).__name__}"
    )


def to_images(sources: Any, *, name: str) -> list[CanonicalImage]:
    """Reads a batch of images.

    Args:
        sources: A list (any iterable) of what `to_image` takes, or one 4-D batch: float in [0, 1]
            or uint8, BCHW or NHWC.
        name: Name of the argument; item i is called "name[i]" in messages.

    Raises:
        BadImageError: as `to_image`, naming the item; also for a single image in place of a list.
    """
    array = _as_array(sources)
    if array is not None:
        if array.ndim != 4:
            raise BadImageError(
                f"{name}: expected a list of images or a 4-D batch, got an array of shape "
                f"{list(array.shape)}; wrap a single image in a list"
            )
        return [_from_array(item, f"{name}[{i}]") for i, item in enumerate(array)]
    single = isinstance(sources, str | Path | bytes | bytearray | memoryview | Image.Image)
    if single or isinstance(sources, CanonicalImage) or not isinstance(sources, Iterable):
        raise BadImageError(
            f"{name}: expected a list of images or a 4-D batch, got one {type(sources).__name__}"
        )
    return [to_image(item, name=f"{name}[{i}]") for i, item in enumerate(sources)]


def _as_array(source: Any) -> np.ndarray | None:
    """Returns numpy arrays and torch tensors as numpy (bfloat16 widened); others as None."""
    if isinstance(source, np.ndarray):
        return source
    # Looked up, not imported: reading a file must not cost the import of torch.
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(source, torch.Tensor):
        return None
    tensor = source.detach()
    if tensor.is_floating_point():
        tensor = tensor.float()
    array: np.ndarray = tensor.cpu().numpy()
    return array


def _from_path(path: Path, name: str) -> CanonicalImage:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise BadImageError(f"{name}: cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:  # a NUL, or a character that the file system cannot spell
        raise BadImageError(f"{name}: cannot read {str(path)!r}: {error}") from error
    return _from_bytes(data, f"{name} ({path})")


def _from_bytes(data: bytes, name: str) -> CanonicalImage:
    if not data:
        raise BadImageError(f"{name}: 0 bytes, expected an encoded image")
    try:
        image = Image.open(io.BytesIO(data))
    except PIL.UnidentifiedImageError as error:
        raise BadImageError(f"{name}: not an image format that Pillow knows") from error
    except Exception as error:
        raise _undecodable(name, error) from error
    return _from_pil(image, name)


def _from_pil(image: Image.Image, name: str) -> CanonicalImage:
    # Sizes are known from the header: an absurd one is refused before it is decoded.
    _check_size(image.height, image.width, name)
    try:
        # An MPO is a camera's JPEG with a preview behind it, not an animation.
        if getattr(image, "is_animated", False) and image.format != "MPO":
            frames = getattr(image, "n_frames", "several")
            raise BadImageError(f"{name}: animated or multi-page ({frames} frames), expected one")
        image.load()
        image = ImageOps.exif_transpose(image)
        pixels = _pil_to_rgb(image, name)
    except BadImageError:
        raise
    except Exception as error:
        raise _undecodable(name, error) from error
    return _canonical(pixels)


def _undecodable(name: str, error: Exception) -> BadImageError:
    """Pillow's readers raise whatever they meet, asserts and missing codecs included."""
    return BadImageError(f"{name}: cannot decode: {str(error) or type(error).__name__}")


def _pil_to_rgb(image: Image.Image, name: str) -> np.ndarray:
    if image.mode in _SIXTEEN_BIT:
        grey = np.asarray(image).astype(np.int64)
        if grey.min() < 0 or grey.max() > 65535:
            raise BadImageError(
                f"{name}: {image.mode} values span {grey.min()}..{grey.max()}, expected 0..65535"
            )
        return _grey_to_rgb(np.rint(grey / 257.0))
    if image.mode == "F":
        values = np.asarray(image)
        _check_unit_range(values, name)
        return _grey_to_rgb(np.rint(values * 255.0))
    if image.mode in _ALPHA or "transparency" in image.info:
        return _over_white(np.asarray(image.convert("RGBA")))
    return np.array(image.convert("RGB"))


def _grey_to_rgb(grey: np.ndarray) -> np.ndarray:
    return np.repeat(grey.astype(np.uint8)[:, :, None], 3, axis=2)


def _over_white(rgba: np.ndarray) -> np.ndarray:
    alpha = rgba[:, :, 3:].astype(np.float32) / 255.0
    mixed = rgba[:, :, :3].astype(np.float32) * alpha + 255.0 * (1.0 - alpha)
    return np.asarray(np.rint(mixed), dtype=np.uint8)


def _from_array(array: np.ndarray, name: str) -> CanonicalImage:
    is_float = np.issubdtype(array.dtype, np.floating)
    if not is_float and array.dtype != np.uint8:
        raise BadImageError(f"{name}: dtype {array.dtype}, expected uint8 or float in [0, 1]")
    image = _to_hwc(array, name)
    _check_size(image.shape[0], image.shape[1], name)
    if is_float:
        _check_unit_range(image, name)
        image = np.rint(image.astype(np.float32) * np.float32(255.0)).astype(np.uint8)
    if image.shape[2] == 1:
        image = np.repeat(image, 3, axis=2)
    if image.shape[2] == 4:
        image = _over_white(image)
    return _canonical(np.array(image, order="C"))


def _to_hwc(array: np.ndarray, name: str) -> np.ndarray:
    shape = list(array.shape)
    if array.ndim == 2:
        return array[:, :, None]
    if array.ndim != 3:
        raise BadImageError(f"{name}: shape {shape}, expected one image: [C, H, W] or [H, W, C]")
    first, last = shape[0] in _CHANNELS, shape[2] in _CHANNELS
    if first and last:
        raise BadImageError(
            f"{name}: shape {shape} could be [C, H, W] or [H, W, C]; pass a PIL image instead"
        )
    if not first and not last:
        raise BadImageError(f"{name}: shape {shape} has no axis of 1, 3 or 4 channels")
    return array.transpose(1, 2, 0) if first else array


def _check_unit_range(values: np.ndarray, name: str) -> None:
    if not np.isfinite(values).all():
        count = int((~np.isfinite(values)).sum())
        raise BadImageError(f"{name}: {count} of {values.size} values are NaN or infinite")
    low, high = float(values.min()), float(values.max())
    if low < 0.0 or high > 1.0:
        raise BadImageError(f"{name}: floats span [{low:.4g}, {high:.4g}], expected [0, 1]")


def _check_size(height: int, width: int, name: str) -> None:
    if height < 1 or width < 1:
        raise BadImageError(f"{name}: {width}x{height} pixels, each side must be at least 1")
    if height * width > MAX_PIXELS:
        raise BadImageError(
            f"{name}: {width}x{height} is {height * width / 1e6:.0f} megapixels, "
            f"over the limit of {MAX_PIXELS / 1e6:.0f}"
        )
    if max(height, width) > MAX_ASPECT * min(height, width):
        raise BadImageError(f"{name}: {width}x{height} has an aspect ratio over {MAX_ASPECT}:1")


def _canonical(pixels: np.ndarray) -> CanonicalImage:
    pixels.setflags(write=False)
    digest = hashlib.sha256(np.asarray(pixels.shape, dtype="<i8").tobytes())
    digest.update(pixels.data)
    return CanonicalImage(pixels=pixels, content_hash=digest.hexdigest())
