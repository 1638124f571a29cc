"""Load on a judge server: what is sent, by whom, and what must come back.

Every request is one of a fixed corpus whose answers were computed in process beforehand, so that a
lost, swapped or differently scored answer shows. Some requests are malformed and must be refused;
some clients leave before their answer.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import math
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
from PIL import Image

from arr_fast.bench.workloads import noise_image
from arr_fast.images import CanonicalImage
from arr_fast.judge import Judge
from arr_fast.rubric import Criterion, Rubric

# (kind, criteria, (height, width) of the images): small and large requests, of all three routes.
SIZES = (
    ("compare", 1, (56, 56)),
    ("compare", 3, (84, 112)),
    ("compare", 8, (56, 140)),
    ("compare", 20, (112, 112)),
    ("score", 2, (56, 84)),
    ("score", 12, (140, 84)),
    ("rank", 2, (56, 56)),
    ("rank", 5, (84, 84)),
)
TOLERANCE = 1e-4
PATH = "/v1/judge/"
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True, slots=True)
class Query:
    """One request of the corpus and its answer.

    Attributes:
        path: Route.
        body: JSON.
        answer: What an in-process judge says, as JSON.
    """

    path: str
    body: bytes
    answer: Any


@dataclass(slots=True)
class Tally:
    """What became of the requests.

    Attributes:
        counts: ok, refused (429), malformed, left, and the failures: lost, wrong, accepted.
        problems: The first failures, in words.
        seconds: Seconds of every answered request.
    """

    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def fail(self, kind: str, text: str) -> None:
        """Counts a failure, and keeps the text of the first few."""
        self.counts[kind] += 1
        if len(self.problems) < 10:
            self.problems.append(f"{kind}: {text}")


def build_corpus(judge: Judge, count: int, seed: int) -> list[Query]:
    """Queries of all sizes, no two alike, and their answers by a judge of this process."""
    rng = np.random.default_rng(seed)
    queries = []
    for number in range(count):
        kind, criteria, (height, width) = SIZES[number % len(SIZES)]
        prompt = f"scene {number}"
        rubric = Rubric(
            name=f"load {number}",
            task="t2i",
            criteria=tuple(
                Criterion(id=f"q{number}.{k}", text=f"Aspect {k} of scene {number} is right.")
                for k in range(criteria)
            ),
        )
        images = [
            noise_image(rng, height, width) for _ in range({"score": 1, "rank": 3}.get(kind, 2))
        ]
        body: dict[str, Any] = {"prompts": [prompt], "rubric": rubric.model_dump(mode="json")}
        encoded = [_base64(image) for image in images]
        found: Any
        if kind == "compare":
            body.update(images_a=encoded[:1], images_b=encoded[1:])
            found = judge.compare([prompt], images[:1], images[1:], rubric)
        elif kind == "score":
            body.update(images=encoded)
            found = judge.score([prompt], images, rubric)
        else:
            body.update(groups=[encoded])
            found = judge.rank([prompt], [images], rubric)
        answer = json.loads(json.dumps(found.to_json()))
        queries.append(Query(PATH + kind, json.dumps(body).encode(), answer))
    return queries


def malformed(query: Query, number: int) -> bytes:
    """A body that must be refused, in one of seven ways."""
    body = json.loads(query.body)
    image = next(name for name in ("images_a", "images", "groups") if name in body)
    changes: Sequence[Callable[[], Any]] = (
        lambda: body.update(prompts=[]),
        lambda: body.update(prompts=["a", "b"]),
        lambda: body.update({image: ["%%%"]}),
        lambda: body.update({image: [base64.b64encode(b"no image").decode()]}),
        lambda: body.update(colour="red"),
        lambda: body.pop(image),
    )
    way = number % (len(changes) + 1)
    if way == len(changes):
        return query.body[: len(query.body) // 2]
    changes[way]()
    return json.dumps(body).encode()


async def run_clients(
    url: str,
    corpus: Sequence[Query],
    *,
    clients: int,
    seconds: float,
    requests: int | None = None,
    malformed_share: float = 0.0,
    leaving_share: float = 0.0,
    seed: int = 0,
) -> Tally:
    """Lets clients send requests of the corpus, each one after the other, for some time.

    Args:
        url: Of the server.
        corpus: What they send.
        clients: How many there are.
        seconds: How long new requests are begun; those under way are waited for.
        requests: How many each client sends at most.
        malformed_share, leaving_share: Shares of requests that make no sense, and of those whose
            client does not wait for the answer.
        seed: Of the choices.
    """
    tally = Tally()
    end = time.monotonic() + seconds
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(
        base_url=url, headers=JSON, timeout=120.0, limits=limits, trust_env=False
    ) as client:

        async def one(number: int) -> None:
            rng = np.random.default_rng([seed, number])
            sent = 0
            while time.monotonic() < end and (requests is None or sent < requests):
                sent += 1
                query = corpus[int(rng.integers(len(corpus)))]
                dice = rng.random()
                if dice < malformed_share:
                    await _send_malformed(client, query, int(rng.integers(1000)), tally)
                elif dice < malformed_share + leaving_share:
                    await _leave(client, query, float(rng.random()), tally)
                else:
                    await ask(client, query, tally)

        await asyncio.gather(*(one(number) for number in range(clients)))
    return tally


async def ask(client: httpx.AsyncClient, query: Query, tally: Tally) -> None:
    """Sends a request until it is taken, and holds the answer against the one in process."""
    while True:
        begun = time.monotonic()
        try:
            response = await client.post(query.path, content=query.body)
        except httpx.HTTPError as error:
            tally.fail("lost", f"{query.path}: {type(error).__name__}: {error}")
            return
        if response.status_code == 429:
            tally.counts["refused"] += 1
            # The server asks for a second or more; a load test does not wait that long.
            await asyncio.sleep(0.05)
            continue
        if response.status_code != 200:
            tally.fail("lost", f"{query.path}: {response.status_code}: {response.text[:200]}")
            return
        tally.seconds.append(time.monotonic() - begun)
        where = difference(response.json(), query.answer)
        if where is None:
            tally.counts["ok"] += 1
        else:
            tally.fail("wrong", f"{query.path}: {where}")
        return


async def _send_malformed(
    client: httpx.AsyncClient, query: Query, number: int, tally: Tally
) -> None:
    try:
        response = await client.post(query.path, content=malformed(query, number))
    except httpx.HTTPError as error:
        tally.fail("lost", f"malformed: {type(error).__name__}: {error}")
        return
    if response.status_code in (400, 422):
        tally.counts["malformed"] += 1
    elif response.status_code == 429:
        tally.counts["refused"] += 1
    else:
        tally.fail("accepted", f"malformed request {number}: {response.status_code}")


async def _leave(client: httpx.AsyncClient, query: Query, fraction: float, tally: Tally) -> None:
    """Sends a part of a request, or all of it, and closes the connection."""
    reader, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
    head = f"POST {query.path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    data = f"{head}Content-Length: {len(query.body)}\r\n\r\n".encode() + query.body
    with contextlib.suppress(OSError):
        writer.write(data[: math.ceil(len(data) * min(1.0, 2 * fraction))])
        await writer.drain()
        await asyncio.sleep(0.05 * fraction)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    del reader
    tally.counts["left"] += 1


def difference(found: Any, wanted: Any, where: str = "$") -> str | None:
    """Where two JSON objects differ, numbers by more than the tolerance; None if they do not."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        if found.keys() != wanted.keys():
            return f"{where}: keys {sorted(found)} for {sorted(wanted)}"
        pairs = [(f"{where}.{key}", found[key], wanted[key]) for key in wanted]
    elif isinstance(wanted, list) and isinstance(found, list):
        if len(found) != len(wanted):
            return f"{where}: {len(found)} items for {len(wanted)}"
        pairs = [
            (f"{where}[{n}]", a, b) for n, (a, b) in enumerate(zip(found, wanted, strict=True))
        ]
    elif isinstance(wanted, float) and isinstance(found, int | float):
        near = abs(found - wanted) <= TOLERANCE
        return None if near else f"{where}: {found} for {wanted}"
    else:
        return None if found == wanted else f"{where}: {found!r} for {wanted!r}"
    return next((text for place, a, b in pairs if (text := difference(a, b, place))), None)


def _base64(image: CanonicalImage) -> str:
    buffer = io.BytesIO()
    Image.fromarray(image.pixels).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode()
