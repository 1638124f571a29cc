"""A real uvicorn around a judge, in a thread of the test process, and what tests send to it."""

from __future__ import annotations

import base64
import io
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import numpy as np

from arr_fast.images import CanonicalImage
from arr_fast.serve.server import make_server
from arr_fast.serve.settings import ServeSettings
from tests.engine import scenes

MODEL = "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0]"
TOLERANCE = 1e-4


class Running:
    """A server that answers; `url`, its `gateway`, and an httpx client."""

    def __init__(self, server: Any, port: int) -> None:
        self.server = server
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.gateway = server.config.app.state.gateway
        self.http = httpx.Client(base_url=self.url, timeout=60.0, trust_env=False)

    def metric(self, name: str, **labels: str) -> float:
        """A sample of the server's registry; 0 before its first count."""
        return self.gateway.metrics.registry.get_sample_value(name, labels) or 0.0


@contextmanager
def running(judge: Any, **settings: Any) -> Iterator[Running]:
    """Starts a server on a free port and stops it, drained, at the end."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = make_server(judge, ServeSettings(port=port, **settings), log_level="error")
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 20.0
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.01)
    assert server.started
    run = Running(server, port)
    try:
        yield run
    finally:
        run.http.close()
        server.should_exit = True
        thread.join(30.0)
        assert not thread.is_alive()


class SlowJudge:
    """A judge whose calls wait until the test lets them go; counts what it was asked."""

    def __init__(self, judge: Any) -> None:
        self._judge = judge
        self.engine = judge.engine
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.calls: list[int] = []
        self.fail = 0

    def compare(self, prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        self.calls.append(len(prompts))
        self.entered.set()
        assert self.gate.wait(30.0)
        if self.fail and len(prompts) > self.fail:
            raise RuntimeError("too many at once")
        return self._judge.compare(prompts, *args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)


def png(image: CanonicalImage) -> bytes:
    buffer = io.BytesIO()
    image.to_pil().save(buffer, format="PNG")
    return buffer.getvalue()


def b64(image: CanonicalImage) -> str:
    return base64.b64encode(png(image)).decode()


def pair(seed: int, height: int = 56, width: int = 84) -> tuple[CanonicalImage, CanonicalImage]:
    return scenes.image(height, width, seed), scenes.image(width, height, seed + 1000)


def compare_body(seed: int = 1, criteria: int = 2, **more: Any) -> dict[str, Any]:
    a, b = pair(seed)
    rubric = scenes.rubric(criteria).model_dump(mode="json")
    body = {"prompts": [f"scene {seed}"], "images_a": [b64(a)], "images_b": [b64(b)]}
    return {**body, "rubric": rubric, **more}


def assert_close(left: Any, right: Any, where: str = "$") -> None:
    """Equal structure, and numbers within the engine's tolerance."""
    if isinstance(left, float) and isinstance(right, float):
        assert np.isclose(left, right, rtol=0.0, atol=TOLERANCE), (where, left, right)
    elif isinstance(left, dict) and isinstance(right, dict):
        assert left.keys() == right.keys(), where
        for key in left:
            assert_close(left[key], right[key], f"{where}.{key}")
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple):
        assert len(left) == len(right), where
        for n, (x, y) in enumerate(zip(left, right, strict=True)):
            assert_close(x, y, f"{where}[{n}]")
    else:
        assert left == right, (where, left, right)
