"""What a hostile or careless client can send: size, pace, images, tokens."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import socket
import struct
import threading
import time
import tracemalloc
import zlib
from http.server import BaseHTTPRequestHandler, HTTPServer

import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from arr_fast.images import to_image
from arr_fast.serve import images_in
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.images_in import ImageReader
from arr_fast.serve.settings import ServeSettings, is_loopback
from tests.engine import scenes
from tests.serve.running import compare_body, png, running


@pytest.fixture(scope="module")
def strict(judge):
    settings = {
        "token": "s3cret-token",
        "max_body_bytes": 200_000,
        "body_timeout_s": 0.6,
        "header_timeout_s": 0.6,
        "max_image_pixels": 10_000,
        "max_images": 4,
    }
    with running(judge, **settings) as run:
        run.http.headers["Authorization"] = "Bearer s3cret-token"
        yield run


def raw(run, data: bytes, seconds: float = 10.0) -> bytes:
    """Sends bytes as they are and reads until the server closes or answers in full."""
    with socket.create_connection(("127.0.0.1", run.port), timeout=seconds) as sock:
        sock.sendall(data)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        return answer


HEAD = b"POST /v1/judge/compare HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer s3cret-token\r\n"


def test_the_token_is_asked_for_everywhere_but_for_health(strict):
    for headers in ({}, {"Authorization": "Bearer wrong-token"}, {"Authorization": "s3cret-token"}):
        bare = {**headers}
        for method, path in (("POST", "/v1/judge/compare"), ("GET", "/metrics"), ("GET", "/docs")):
            request = strict.http.build_request(method, path, headers=bare)
            if "Authorization" not in bare:
                del request.headers["Authorization"]
            answer = strict.http.send(request)
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
    request = strict.http.build_request("GET", "/ready")
    del request.headers["Authorization"]
    assert strict.http.send(request).status_code == 200
    assert strict.http.post("/v1/judge/compare", json=compare_body(height=1)).status_code == 422
    assert strict.http.post("/v1/judge/compare", json=compare_body()).status_code == 200


def test_a_two_gigabyte_body_is_refused_unread(strict):
    begun = time.monotonic()
    answer = raw(strict, HEAD + b"Content-Length: 2147483648\r\n\r\n")
    assert answer.startswith(b"HTTP/1.1 413") and b"connection: close" in answer.lower()
    assert time.monotonic() - begun < 5.0


def test_a_chunked_body_is_cut_off_at_the_limit(strict):
    def chunks():
        for _ in range(100):
            yield b"x" * 10_000

    assert strict.http.post("/v1/judge/compare", content=chunks()).status_code == 413
    assert strict.http.get("/ready").status_code == 200


def test_an_endless_chunked_body_is_refused_long_before_two_gigabytes(strict):
    piece = b"10000\r\n" + b"x" * 0x10000 + b"\r\n"
    sent, answer = 0, b""
    with socket.create_connection(("127.0.0.1", strict.port), timeout=10.0) as sock:
        sock.sendall(HEAD + b"Transfer-Encoding: chunked\r\n\r\n")
        with contextlib.suppress(OSError):
            while sent < 2 << 30:
                sock.sendall(piece)
                sent += len(piece)
        # A reset may overtake the answer: the server does not read on to be polite.
        with contextlib.suppress(OSError):
            answer = sock.recv(65536)
    # Beyond the limit of 200 kB lie only the buffers of the sockets.
    assert sent < 64 << 20
    assert answer == b"" or answer.startswith(b"HTTP/1.1 413")
    assert strict.http.get("/ready").status_code == 200


def test_a_slow_body_is_refused(strict):
    answer = raw(strict, HEAD + b"Content-Length: 1000\r\n\r\n{")
    assert answer.startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize("sent", [b"", b"POST /v1/judge/compare HTTP/1.1\r\nHost: x\r\nX-A"])
def test_slow_headers_lose_their_connection(strict, sent):
    begun = time.monotonic()
    assert raw(strict, sent) == b""
    assert 0.3 < time.monotonic() - begun < 5.0


def test_a_slow_loris_among_others_harms_nobody(strict):
    socks = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(30)]
    for sock in socks:
        sock.sendall(b"POST / HTTP/1.1\r\nX-")
    assert strict.http.post("/v1/judge/compare", json=compare_body()).status_code == 200
    time.sleep(0.9)
    for sock in socks:
        sock.settimeout(5.0)
        assert sock.recv(10) == b""
        sock.close()


@pytest.mark.parametrize(
    "text", [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"POST / HTTP/9.9\r\n\r\n"]
)
def test_garbage_is_answered_or_dropped(strict, text):
    answer = raw(strict, text)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 400", b"HTTP/1.1 401"))
    assert strict.http.get("/ready").status_code == 200


def test_bodies_in_flight_are_bounded(judge):
    with running(judge, max_open_body_bytes=300_000, max_body_bytes=250_000) as run:
        first = socket.create_connection(("127.0.0.1", run.port))
        head = b"POST /v1/judge/compare HTTP/1.1\r\nHost: x\r\nContent-Length: 240000\r\n\r\n"
        first.sendall(head + b"x" * 200_000)
        time.sleep(0.3)
        answer = run.http.post("/v1/judge/compare", content=b"x" * 200_000)
        assert answer.status_code == 429
        first.close()
        time.sleep(0.3)
        # What the leaver held is free again.
        assert run.http.post("/v1/judge/compare", content=b"x" * 200_000).status_code == 422


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few hundred bytes whose header promises any size."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = zlib.compress(b"\0" * 100_000)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(50_000, 50_000), (101, 100), (2**31 - 1, 1)])
def test_a_decompression_bomb_is_refused_by_its_header(strict, size):
    encoded = base64.b64encode(bomb(*size)).decode()
    answer = strict.http.post("/v1/judge/compare", json=compare_body(images_a=[encoded]))
    assert answer.status_code == 400 and "images_a[0]" in answer.json()["error"]["message"]


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP", b"iTXt"])
def test_a_bomb_in_the_metadata_is_not_unpacked(strict, kind):
    # 64 MiB of zeros, as a comment or colour profile, in a few kB.
    packed = zlib.compress(b"\0" * (64 << 20), 9)
    data = {
        b"zTXt": b"Comment\0\0" + packed,
        b"iCCP": b"profile\0\0" + packed,
        b"iTXt": b"Comment\0\1\0\0\0" + packed,
    }[kind]
    good = png(scenes.image(8, 8, 1))
    chunk = struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    # After the signature and IHDR.
    encoded = base64.b64encode(good[:33] + chunk + good[33:]).decode()
    tracemalloc.start()
    try:
        answer = strict.http.post("/v1/judge/compare", json=compare_body(images_a=[encoded]))
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Refused, or judged without the metadata; never unpacked.
    assert answer.status_code in (200, 400)
    assert peak < 32 << 20


def test_the_pixels_of_a_request_are_bounded_before_they_are_decoded(judge, monkeypatch):
    decoded = []

    def seen(value, *, name):
        decoded.append(name)
        return to_image(value, name=name)

    monkeypatch.setattr(images_in, "to_image", seen)
    a, b = (base64.b64encode(png(scenes.image(20, 30, seed))).decode() for seed in (1, 2))
    with running(judge, max_request_pixels=2 * 20 * 30) as run:
        body = compare_body(images_a=[a], images_b=[b])
        # Counted by request: the second one starts anew.
        assert [run.http.post("/v1/judge/compare", json=body).status_code for _ in "xx"] == [
            200
        ] * 2
        rubric = body["rubric"]
        over = {
            "/v1/judge/compare": {**body, "rubric": None, "sources": [a]},
            "/v1/judge/score": {"prompts": ["p"] * 3, "images": [a, b, a], "rubric": rubric},
            "/v1/judge/rank": {"prompts": ["p"], "groups": [[a, b, a]], "rubric": rubric},
            "/compute": {"prompt": ["p"] * 3, "image": [a, b, a]},
            "/v1/systemone": {
                "state": "s",
                "questions": {"q": {"type": "noul", "instructions": "?"}},
                "images": [{"url": image} for image in (a, b, a)],
            },
        }
        for route, content in over.items():
            decoded.clear()
            answer = run.http.post(route, json=content)
            assert answer.status_code == 400, (route, answer.text)
            assert "the limit of a request is 1200" in answer.json()["error"]["message"]
            assert len(decoded) == 2, route


def test_image_counts_are_bounded(strict):
    body = compare_body()
    many = {
        "prompts": ["p"] * 5,
        "images_a": body["images_a"] * 5,
        "images_b": body["images_b"] * 5,
    }
    answer = strict.http.post("/v1/judge/compare", json={**body, **many})
    assert answer.status_code == 400 and "the limit is 4" in answer.json()["error"]["message"]


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_fuzzed_image_is_a_refusal_or_an_image(form):
    reader = ImageReader(ServeSettings(max_image_pixels=100_000))
    rng = np.random.default_rng(7)
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(scenes.image(48, 48, 3).pixels)).save(buffer, format=form)
    good = buffer.getvalue()
    assert reader.read(good, "x").width == 48
    outcomes = set()
    for _ in range(150):
        data = bytearray(good[: rng.integers(1, len(good) + 1)])
        for _ in range(int(rng.integers(0, 12))):
            data[rng.integers(len(data))] = rng.integers(256)
        try:
            outcomes.add(type(reader.read(bytes(data), "x")).__name__)
        except BadRequestError as error:
            outcomes.add("refused")
            assert str(error).startswith("x")
    assert "refused" in outcomes


class _Images(BaseHTTPRequestHandler):
    """Serves one image, a redirect, and an endless answer."""

    def do_GET(self):
        if self.path == "/ok/redirect":
            self.send_response(302)
            self.send_header("Location", "/ok/a.png")
            self.end_headers()
            return
        self.send_response(200)
        if self.path.startswith("/ok/slow"):
            self.end_headers() if self.path == "/ok/slow-body" else self.flush_headers()
            with contextlib.suppress(OSError):
                while True:
                    self.wfile.write(b"x")
                    time.sleep(0.02)
        self.end_headers()
        data = png(scenes.image(20, 30, 1)) if self.path.endswith(".png") else b"x" * 100_000
        self.wfile.write(data)

    def log_message(self, *args):
        """Keeps the test output clean."""


@pytest.fixture(scope="module")
def images_host():
    server = HTTPServer(("127.0.0.1", 0), _Images)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_urls_are_fetched_only_from_the_allow_list(images_host):
    closed = ImageReader(ServeSettings())
    with pytest.raises(BadRequestError, match="not fetched"):
        closed.read(f"{images_host}/ok/a.png", "x")
    reader = ImageReader(ServeSettings(url_prefixes=(f"{images_host}/ok/",), max_body_bytes=50_000))
    image = reader.read({"url": f"{images_host}/ok/a.png"}, "x")
    assert (image.height, image.width) == (20, 30)
    refused = {
        f"{images_host}/other/a.png": "not fetched",
        f"{images_host}/ok/../other/a.png": "not fetched",
        f"{images_host}/ok/..?id=5": "not fetched",
        f"{images_host}/ok/%2e%2e/other/a.png": "not fetched",
        f"{images_host}/ok/.%2E%2Fother/a.png": "not fetched",
        f"{images_host}/ok/..\\other/a.png": "not fetched",
        f"{images_host}/ok/%252e%252e/other/a.png": "not fetched",
        f"{images_host}/ok/\ud800": "not fetched",
        f"{images_host}/ok/redirect": "answered 302",
        f"{images_host}/ok/endless": "over 50000 bytes",
        f"{images_host.replace('http:', 'HTTP:')}/ok/a.png": "not fetched",
        "file:///etc/passwd": "not fetched",
        "ftp://x/y": "not fetched",
    }
    for url, words in refused.items():
        with pytest.raises(BadRequestError, match=words):
            reader.read(url, "x")


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_host_that_trickles_holds_nobody_longer_than_the_limit(images_host, part):
    reader = ImageReader(ServeSettings(url_prefixes=(f"{images_host}/ok/",), url_timeout_s=0.3))
    begun = time.monotonic()
    with pytest.raises(BadRequestError, match=r"x: the URL takes over 0\.3 s"):
        reader.read(f"{images_host}/ok/slow-{part}", "x")
    assert time.monotonic() - begun < 3.0


@pytest.mark.parametrize("prefix", ["https://good.org", "good.org/", "file:///x", "http://u@x/"])
def test_url_prefixes_must_end_the_host(prefix):
    with pytest.raises(ValidationError):
        ServeSettings(url_prefixes=(prefix,))


def test_settings_are_closed():
    with pytest.raises(ValidationError):
        ServeSettings(colour=1)
    with pytest.raises(ValidationError):
        ServeSettings(token="short")
    with pytest.raises(ValidationError, match="no body of that length"):
        ServeSettings(max_body_bytes=300 << 20)
    assert ServeSettings().host == "127.0.0.1"
    assert is_loopback("::1") and is_loopback("localhost") and not is_loopback("10.0.0.1")


def test_the_body_limit_counts_bytes_not_characters(strict):
    body = json.dumps({"prompts": ["é" * 150_000]}, ensure_ascii=False).encode()
    assert len(body) > 200_000
    assert strict.http.post("/v1/judge/compare", content=body).status_code == 413
