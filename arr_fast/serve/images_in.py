"""Images as they come over the wire -> canonical images, within limits.

A string is base64 or a data URL. Other URLs are fetched only where an allow-list says so; a path of
the server's file system is never read.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import io
import re
import warnings
from typing import Any
from urllib.parse import unquote

from PIL import Image

from arr_fast.errors import BadImageError
from arr_fast.images import CanonicalImage, to_image
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.settings import ServeSettings

_DATA_URL = re.compile(r"data:[\w.+-]*/?[\w.+-]*(?:;[\w=.+-]+)*;base64,", re.ASCII)
_URL = re.compile(r"[a-z][a-z0-9+.-]*:", re.ASCII | re.IGNORECASE)


class ImageReader:
    """Decodes the images of one request, whose pixels it counts.

    Args:
        settings: Size limits and the URL allow-list.
    """

    def __init__(self, settings: ServeSettings) -> None:
        self._settings = settings
        self._pixels = 0

    def read(self, value: Any, name: str) -> CanonicalImage:
        """Reads one image.

        Args:
            value: Encoded bytes, base64 text, a data URL, an allowed URL, `{"url": ...}`, or the
                chat form `{"type": "image_url", "image_url": {"url": ...}}`.
            name: What the client calls it, for messages: "images_a[3]".

        Raises:
            BadRequestError: It is none of these, is not an image, or is over a limit.
        """
        if isinstance(value, dict):
            inner = value.get("image_url", value)
            value = inner.get("url") if isinstance(inner, dict) else inner
        if isinstance(value, str):
            value = self._from_text(value, name)
        if not isinstance(value, bytes):
            kind = type(value).__name__
            raise BadRequestError(f"{name}: expected base64, a data URL or bytes, got {kind}")
        self._check_header(value, name)
        try:
            return to_image(value, name=name)
        except BadImageError as error:
            raise BadRequestError(str(error)) from None

    def _from_text(self, text: str, name: str) -> bytes:
        found = _DATA_URL.match(text[:200])
        if found:
            text = text[found.end() :]
        elif _URL.match(text[:40]):
            return self._fetch(text, name)
        try:
            return base64.b64decode(text, validate=True)
        except (binascii.Error, ValueError):
            raise BadRequestError(f"{name}: not valid base64 and not a data URL") from None

    def _check_header(self, data: bytes, name: str) -> None:
        """Refuses an image whose header promises too many pixels, before it is decoded."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)
                with Image.open(io.BytesIO(data)) as image:
                    width, height = image.size
        except Exception as error:
            # Damaged headers make Pillow's readers raise almost anything.
            raise BadRequestError(f"{name}: not an image that can be read") from error
        limit = self._settings.max_image_pixels
        if width * height > limit:
            raise BadRequestError(f"{name}: {width}x{height} pixels, the limit is {limit} in all")
        self._pixels += width * height
        if self._pixels > self._settings.max_request_pixels:
            raise BadRequestError(
                f"{name}: {self._pixels} pixels in the images up to this one, the limit of a "
                f"request is {self._settings.max_request_pixels}"
            )

    def _fetch(self, url: str, name: str) -> bytes:
        """GETs an allowed URL; redirects are not followed, and size and time are bounded."""
        if not self._allows(url):
            raise BadRequestError(
                f"{name}: URLs are not fetched unless the server allows them; send base64 instead"
            )
        return asyncio.run(self._get(url, name))

    def _allows(self, url: str) -> bool:
        """Whether a URL has an allowed prefix, both as it stands and as it would be requested."""
        prefixes = self._settings.url_prefixes
        if not url.startswith(prefixes):
            return False
        import httpx

        try:
            parsed = httpx.URL(url)
        except (httpx.InvalidURL, UnicodeError):
            return False
        # httpx resolves "..", but the host may also resolve what is escaped.
        leaves = ".." in re.split(r"[/\\]", unquote(parsed.path))
        normal = tuple(str(httpx.URL(prefix)) for prefix in prefixes)
        return not leaves and str(parsed).startswith(normal)

    async def _get(self, url: str, name: str) -> bytes:
        """The body of an answer; asynchronous for a limit on the whole time, headers included."""
        import httpx

        limit, seconds = self._settings.max_body_bytes, self._settings.url_timeout_s
        data = bytearray()
        try:
            async with (
                asyncio.timeout(seconds),
                httpx.AsyncClient(timeout=None, trust_env=False) as client,
                client.stream("GET", url, follow_redirects=False) as response,
            ):
                if response.status_code != 200:
                    raise BadRequestError(f"{name}: the URL answered {response.status_code}")
                async for piece in response.aiter_bytes():
                    data += piece
                    if len(data) > limit:
                        raise BadRequestError(f"{name}: the URL sends over {limit} bytes")
        except TimeoutError:
            raise BadRequestError(f"{name}: the URL takes over {seconds:g} s") from None
        except httpx.HTTPError as error:
            raise BadRequestError(f"{name}: cannot fetch: {type(error).__name__}") from None
        return bytes(data)
