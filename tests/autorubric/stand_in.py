"""A local HTTP stand-in for an OpenAI-compatible endpoint, which can misbehave on demand."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What one call does: a dict is an answer's text under "text" (and more), a string a misbehaviour.
Plan = Callable[[int, dict[str, Any]], Any]


class StandIn:
    """Counts calls and keeps their bodies.

    Attributes:
        plan: Maps (number of the call, body) to what happens: {"text": ...[, "finish": ...]}, or
            "rate", "error", "slow", "cut", "half", "garbage", "empty", "refuse-schema", "denied".
    """

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str] = []
        self.url = ""
        self.busy = 0
        self.most_busy = 0
        self.lock = threading.Lock()


@contextmanager
def standing_in(plan: Plan) -> Iterator[StandIn]:
    """Serves on a free loopback port."""
    state = StandIn(plan)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with state.lock:
                number = len(state.bodies)
                state.bodies.append(body)
                state.keys.append(self.headers.get("Authorization", ""))
                state.busy += 1
                state.most_busy = max(state.most_busy, state.busy)
            try:
                self.act(state.plan(number, body))
            finally:
                with state.lock:
                    state.busy -= 1

        def act(self, what: Any) -> None:
            if isinstance(what, dict):
                finish = what.get("finish", "stop")
                message = {"role": "assistant", "content": what["text"]}
                choice = {"index": 0, "message": message, "finish_reason": finish}
                usage = {"prompt_tokens": 7, "completion_tokens": 3, "total_tokens": 10}
                self.reply(200, {"id": "x", "object": "chat.completion", "created": 0,
                                 "model": "m", "choices": [choice], "usage": usage})  # fmt: skip
            elif what == "rate":
                self.reply(429, {"error": {"message": "slow down"}}, {"Retry-After": "0.05"})
            elif what == "error":
                self.reply(500, {"error": {"message": "oops"}})
            elif what == "denied":
                key = self.headers.get("Authorization", "").removeprefix("Bearer ")
                self.reply(401, {"error": {"message": f"wrong key {key}"}})
            elif what == "refuse-schema":
                self.reply(400, {"error": {"message": "response_format is not supported"}})
            elif what == "slow":
                time.sleep(1.5)
                self.close_connection = True
            elif what == "cut":
                self.close_connection = True
                self.connection.close()
            elif what == "half":
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", "1000")
                self.end_headers()
                self.wfile.write(b'{"id": "x", "choices": [')
                self.close_connection = True
            elif what == "garbage":
                self.raw(200, b"<html>not an answer</html>")
            elif what == "empty":
                self.reply(200, {"id": "x", "choices": []})
            else:
                raise AssertionError(what)

        def reply(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
            self.raw(status, json.dumps(body).encode(), headers)

        def raw(self, status: int, data: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data)

        def handle(self) -> None:
            with suppress(ConnectionError, ValueError):
                super().handle()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    state.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)
