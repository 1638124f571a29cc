"""The Python clients against a running server, and against servers that misbehave."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from arr_fast.serve.client import AsyncJudgeClient, JudgeClient, JudgeServerError, RetryPolicy
from tests.engine import scenes
from tests.serve.running import assert_close, pair

FAST = RetryPolicy(retries=2, backoff_s=0.01, max_pause_s=0.05)


def clean(value):
    return json.loads(json.dumps(value))


def test_sync_client_equals_the_judge(server, judge):
    (a, b), rubric = pair(1), scenes.rubric(2)
    batch = np.stack([np.asarray(scenes.image(40, 60, seed).pixels) for seed in (1, 2)])
    with JudgeClient(server.url) as client:
        found = client.compare(["p"], [a.to_pil()], [b], rubric, orders="AB")
        assert_close(found, clean(judge.compare(["p"], [a], [b], rubric, orders="AB").to_json()))
        found = client.score(["p", "q"], batch, [rubric, rubric])
        assert_close(found, clean(judge.score(["p", "q"], batch, rubric).to_json()))
        found = client.rank(["p"], [[a, b]], rubric)
        assert_close(found, clean(judge.rank(["p"], [[a, b]], rubric).to_json()))
        with pytest.raises(JudgeServerError, match="prompts has 1") as refused:
            client.compare(["p"], [a, a], [b], rubric)
        assert refused.value.status == 400


def test_async_client_runs_side_by_side(server, judge):
    rubric = scenes.rubric(2)

    async def main():
        async with AsyncJudgeClient(server.url) as client:
            (a, b), (c, d) = pair(1), pair(2)
            return await asyncio.gather(
                client.compare(["p"], [a], [b], rubric),
                client.score(["q"], [c], rubric),
                client.rank(["r"], [[c, d]], rubric),
            )

    compared, scored, ranked = asyncio.run(main())
    (a, b), (c, d) = pair(1), pair(2)
    assert_close(compared, clean(judge.compare(["p"], [a], [b], rubric).to_json()))
    assert_close(scored, clean(judge.score(["q"], [c], rubric).to_json()))
    assert_close(ranked, clean(judge.rank(["r"], [[c, d]], rubric).to_json()))


def test_nobody_there_fails_at_once():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    begun = time.monotonic()
    with pytest.raises(JudgeServerError, match="start one with `arr-fast serve`"):
        JudgeClient(f"http://127.0.0.1:{port}")
    with pytest.raises(JudgeServerError, match="no judge server"):
        asyncio.run(AsyncJudgeClient(f"http://127.0.0.1:{port}").connect())
    assert time.monotonic() - begun < 5.0


@contextmanager
def scripted(replies):
    """A server that answers POSTs by a script of (status, headers) and counts them."""
    seen: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, {})

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            seen.append(self.path)
            status, headers = replies[min(len(seen), len(replies)) - 1]
            if status == 0:
                self.connection.close()
                return
            self.answer(status, headers)

        def answer(self, status, headers):
            body = b'{"error": {"message": "scripted"}}'
            if "x-proxy" in headers:
                body = b"Internal Server Error"
            self.send_response(status)
            for name, value in {**headers, "content-length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            """Keeps the test output clean."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", seen
    finally:
        server.shutdown()


IMAGE = scenes.image(8, 8, 1)


@pytest.mark.parametrize(
    ("script", "tries", "status"),
    [
        ([(429, {"retry-after": "60"}), (200, {})], 2, None),
        ([(503, {}), (0, {}), (200, {})], 3, None),
        ([(429, {})], 3, 429),
        ([(400, {})], 1, 400),
        ([(422, {})], 1, 422),
        ([(500, {})], 1, 500),
        ([(500, {"x-proxy": "1"}), (200, {})], 2, None),
        ([(0, {})], 3, None),
    ],
    ids=[
        *("429-then-200", "503-cut-200", "429-always", "400", "422", "500"),
        *("500-of-a-proxy-then-200", "cut-always"),
    ],
)
def test_retries_are_bounded_and_only_where_they_help(script, tries, status):
    final = script[-1][0]
    with scripted(script) as (url, seen), JudgeClient(url, policy=FAST) as client:
        begun = time.monotonic()
        if final == 200:
            client.score(["p"], [IMAGE])
        else:
            with pytest.raises(JudgeServerError) as refused:
                client.score(["p"], [IMAGE])
            assert refused.value.status == status
        # A Retry-After of a minute is cut to the policy's longest pause.
        assert time.monotonic() - begun < 5.0
        assert len(seen) == tries


def test_async_retries_are_the_same():
    async def main(url):
        async with AsyncJudgeClient(url, policy=FAST) as client:
            await client.score(["p"], [IMAGE])

    with scripted([(429, {}), (503, {}), (200, {})]) as (url, seen):
        asyncio.run(main(url))
        assert len(seen) == 3


def test_a_token_is_sent(judge):
    from tests.serve.running import running

    with running(judge, token="s3cret-token") as run:
        with JudgeClient(run.url, token="s3cret-token") as client:
            assert client.score(["p"], [IMAGE], scenes.rubric(1))["images"]
        with (
            JudgeClient(run.url, token="other-token") as client,
            pytest.raises(JudgeServerError, match="Bearer"),
        ):
            client.score(["p"], [IMAGE])


def test_a_bad_image_never_leaves_the_client(server):
    with JudgeClient(server.url) as client, pytest.raises(ValueError, match=r"images\[0\]"):
        client.score(["p"], [np.full((3, 4, 4), 2.0, np.float32)])
