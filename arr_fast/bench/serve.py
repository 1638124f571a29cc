"""`arr-fast bench serve`: a server under load, held to what it promises.

Three phases against one server process: one client alone, many clients (some of them malformed or
leaving), and a stop in the middle of work. Gates: nothing lost, nothing mixed up or scored
differently from a judge in process, malformed requests refused, the queue within its bound, memory
flat, batching at least twice as fast as one request at a time, and a drain that answers all that
was accepted.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from rich.table import Table

from arr_fast import __version__
from arr_fast.bench.rows import environment
from arr_fast.bench.serve_load import JSON, Query, Tally, ask, build_corpus, run_clients
from arr_fast.bench.serve_process import ACCEPTED, Server, Watch, read_metric, serving
from arr_fast.data.writing import plain
from arr_fast.judge import Judge

SCHEMA = "arr_fast.bench_serve/1"
SPEEDUP = 2.0
# Memory may grow by this share after the first quarter of the time.
GROWTH = 0.05

# uvicorn raises the signal again when it has drained, so the process ends by it.
ENDED = (0, -signal.SIGTERM)


@dataclass(frozen=True, slots=True)
class Load:
    """What the server is put through.

    Attributes:
        model: A model that loads alike in both processes.
        clients: Clients at once.
        seconds: How long they go on; a single client gets a quarter of that.
        malformed, leaving: Shares of requests.
        max_queue: Bound of the queue; under `clients`, so that it is met.
        corpus: Different requests.
        seed: Of corpus and choices.
    """

    model: str = "random:qwen3_vl-tiny"
    clients: int = 64
    seconds: float = 120.0
    malformed: float = 0.05
    leaving: float = 0.05
    max_queue: int = 48
    corpus: int = 48
    seed: int = 0


@dataclass(frozen=True, slots=True)
class Gate:
    """One promise: what was measured, what was allowed, and whether that holds."""

    name: str
    measured: float
    allowed: str
    passed: bool


@dataclass(slots=True)
class ServeBench:
    """A finished run.

    Attributes:
        load: What was asked.
        gates: Promises.
        counts: Requests by outcome, of the crowd.
        alone_rate, crowd_rate: Right answers per second.
        seconds: Percentiles of the crowd's waiting, in seconds.
        problems: The first failures, in words.
        drain_clients: Requests that were under way at SIGTERM.
        exit_status: Of the server.
    """

    load: Load
    gates: list[Gate] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)
    alone_rate: float = 0.0
    crowd_rate: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    drain_clients: int = 0
    exit_status: int | None = None

    @property
    def exit_code(self) -> int:
        """0 if every gate passed."""
        return 0 if all(gate.passed for gate in self.gates) else 1

    def to_json(self) -> dict[str, Any]:
        """One documented, versioned object."""
        return {
            "schema": SCHEMA,
            "arr_fast_version": __version__,
            "environment": environment(1),
            "load": {name: getattr(self.load, name) for name in self.load.__dataclass_fields__},
            "requests": self.counts,
            "answers_per_second": {"one_client": self.alone_rate, "crowd": self.crowd_rate},
            "seconds": self.seconds,
            "gates": [
                {name: getattr(gate, name) for name in gate.__dataclass_fields__}
                for gate in self.gates
            ],
            "problems": self.problems,
        }


def run_serve_bench(
    load: Load, *, json_path: Path | None = None, say: Callable[[str], None] = print
) -> ServeBench:
    """Runs the three phases.

    Args:
        load: What to do.
        json_path: Where to write the result.
        say: Told what goes on.

    Raises:
        ArrFastError: The server did not start.
    """
    say(f"judging {load.corpus} requests in process")
    judge = Judge.from_pretrained(load.model, device="cpu")
    corpus = build_corpus(judge, load.corpus, load.seed)
    result = ServeBench(load)
    arguments = ["--model", load.model, "--device", "cpu", "--max-queue", str(load.max_queue)]
    with serving(arguments) as server:
        asyncio.run(_phases(server, corpus, result, say))
    if json_path is not None:
        document = json.dumps(plain(result.to_json()), indent=2, allow_nan=False)
        json_path.write_text(document + "\n", encoding="utf-8")
    return result


async def _phases(
    server: Server, corpus: Sequence[Query], result: ServeBench, say: Callable[[str], None]
) -> None:
    load = result.load
    # Once through the corpus, so that neither phase pays for what is done only once.
    warm = await run_clients(server.url, corpus, clients=4, seconds=min(5.0, load.seconds / 4))
    say(f"one client, {load.seconds / 4:g} s")
    begun = time.monotonic()
    alone = await run_clients(server.url, corpus, clients=1, seconds=load.seconds / 4)
    result.alone_rate = alone.counts["ok"] / (time.monotonic() - begun)
    say(f"{load.clients} clients, {load.seconds:g} s")
    watch = Watch()
    watching = asyncio.create_task(watch.run(server))
    begun = time.monotonic()
    crowd = await run_clients(
        server.url,
        corpus,
        clients=load.clients,
        seconds=load.seconds,
        malformed_share=load.malformed,
        leaving_share=load.leaving,
        seed=load.seed,
    )
    result.crowd_rate = crowd.counts["ok"] / (time.monotonic() - begun)
    watching.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watching
    say("SIGTERM under load")
    result.drain_clients = min(load.clients, load.max_queue)
    drained, result.exit_status = await _drain(server, corpus, result.drain_clients)
    _hold(result, crowd, watch, drained, [warm, alone])


async def _drain(server: Server, corpus: Sequence[Query], clients: int) -> tuple[Tally, int]:
    """Stops the server while it works on accepted requests; returns its exit status as well."""
    # The largest requests, so that most are still waiting when the signal comes.
    heavy = sorted(corpus, key=lambda query: -len(str(query.answer)))[: max(1, len(corpus) // 4)]
    tally = Tally()
    limits = httpx.Limits(max_connections=clients + 1)
    async with httpx.AsyncClient(
        base_url=server.url, headers=JSON, timeout=120.0, limits=limits, trust_env=False
    ) as client:
        before = await read_metric(client, ACCEPTED)
        asked = [
            asyncio.create_task(ask(client, heavy[number % len(heavy)], tally))
            for number in range(clients)
        ]
        deadline = time.monotonic() + 60.0
        while await read_metric(client, ACCEPTED) < before + clients:
            if time.monotonic() > deadline:
                tally.fail("lost", "the server did not accept all requests within a minute")
                break
        status = await asyncio.to_thread(server.stop)
        await asyncio.gather(*asked)
    return tally, status


def _hold(
    result: ServeBench, crowd: Tally, watch: Watch, drained: Tally, others: Sequence[Tally]
) -> None:
    """Holds what was measured against what is promised."""
    tallies = [crowd, drained, *others]
    result.counts = dict(sorted(crowd.counts.items()))
    result.problems = [problem for tally in tallies for problem in tally.problems]
    if crowd.seconds:
        points = np.percentile(crowd.seconds, (50, 95, 99))
        result.seconds = {
            name: float(value) for name, value in zip(("p50", "p95", "p99"), points, strict=True)
        }

    def total(name: str) -> float:
        return float(sum(tally.counts[name] for tally in tallies))

    load = result.load
    speedup = result.crowd_rate / result.alone_rate if result.alone_rate else 0.0
    deepest = max(watch.queued, default=0.0)
    growth = watch.growth()
    result.gates = [
        Gate("requests lost", total("lost"), "0", total("lost") == 0),
        Gate("wrong or mixed-up answers", total("wrong"), "0", total("wrong") == 0),
        Gate("malformed requests accepted", total("accepted"), "0", total("accepted") == 0),
        Gate("deepest queue", deepest, f"<= {load.max_queue}", deepest <= load.max_queue),
        Gate("growth of memory", growth, f"<= {GROWTH:g}", growth <= GROWTH),
        Gate("crowd / one client", speedup, f">= {SPEEDUP:g}", speedup >= SPEEDUP),
        Gate(
            "answers after SIGTERM",
            float(drained.counts["ok"]),
            f"{result.drain_clients}, and an end by SIGTERM",
            drained.counts["ok"] == result.drain_clients and result.exit_status in ENDED,
        ),
    ]


def table_of(result: ServeBench) -> Table:
    """The result as a table for a terminal."""
    table = Table("promise", "measured", "allowed", "", title="a judge server under load")
    for gate in result.gates:
        mark = "[green]pass[/]" if gate.passed else "[red]FAIL[/]"
        table.add_row(gate.name, f"{gate.measured:.4g}", gate.allowed, mark)
    counts = ", ".join(f"{count} {name}" for name, count in result.counts.items())
    waits = ", ".join(f"{name} {value:.3f} s" for name, value in result.seconds.items())
    table.caption = (
        f"{result.crowd_rate:.1f} answers/s by {result.load.clients} clients ({counts}), "
        f"{result.alone_rate:.1f} by one; {waits}"
    )
    return table
