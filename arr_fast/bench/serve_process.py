"""A judge server as a process of its own, and what it looks like from outside while it works."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from arr_fast.errors import ArrFastError

QUEUED = "arr_fast_queue_requests"
# A request is queued as soon as it is decoded.
ACCEPTED = 'arr_fast_stage_seconds_count{stage="decode"}'


@dataclass(slots=True)
class Server:
    """A running server.

    Attributes:
        process: The process.
        url: Where it answers.
        log: What it has written.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def stop(self) -> int:
        """Sends SIGTERM and returns the exit status; -SIGKILL if it did not end in a minute."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60.0)
        except subprocess.TimeoutExpired:
            return -int(signal.SIGKILL)


@contextmanager
def serving(arguments: Sequence[str], *, patience_s: float = 300.0) -> Iterator[Server]:
    """Starts `arr-fast serve` on a free port and waits until it is ready.

    Args:
        arguments: Of the command, without the port.
        patience_s: How long loading may take.

    Raises:
        ArrFastError: It ended or was not ready in time; the message holds its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "serve.log"
        command = [sys.executable, "-m", "arr_fast", "serve", "--port", str(port), *arguments]
        with log.open("wb") as file:
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            )
        server = Server(process, f"http://127.0.0.1:{port}", log)
        try:
            _wait_until_ready(server, patience_s)
            yield server
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()


def _wait_until_ready(server: Server, patience_s: float) -> None:
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and server.process.poll() is None:
        try:
            if httpx.get(f"{server.url}/ready", timeout=5.0, trust_env=False).status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(0.1)
    text = server.log.read_text("utf-8", errors="replace")[-2000:]
    raise ArrFastError(f"the server did not become ready: {text}")


async def read_metric(client: httpx.AsyncClient, name: str) -> float:
    """One sample of /metrics by its name and labels; 0 before its first count."""
    text = (await client.get("/metrics")).text
    found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
    return float(found[1]) if found else 0.0


@dataclass(slots=True)
class Watch:
    """Samples of a server, taken while others load it.

    Attributes:
        at: Seconds since the watch began.
        rss: Resident bytes at those times.
        queued: Requests that waited at those times.
    """

    at: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)
    queued: list[float] = field(default_factory=list)

    async def run(self, server: Server, interval_s: float = 0.2) -> None:
        """Samples until it is cancelled."""
        process = psutil.Process(server.process.pid)
        begun = time.monotonic()
        async with httpx.AsyncClient(base_url=server.url, trust_env=False, timeout=30.0) as client:
            while True:
                self.queued.append(await read_metric(client, QUEUED))
                self.at.append(time.monotonic() - begun)
                self.rss.append(process.memory_info().rss)
                await asyncio.sleep(interval_s)

    def growth(self) -> float:
        """Median bytes of the last quarter of the time over those of the second quarter, less 1.

        The first quarter is left out: caches fill and the allocator settles then. NaN where there
        are too few samples to tell, which no limit admits.
        """
        if len(self.rss) < 8:
            return math.nan
        size = len(self.rss) // 4
        early = sorted(self.rss[size : 2 * size])[size // 2]
        late = sorted(self.rss[-size:])[size // 2]
        return late / early - 1.0
