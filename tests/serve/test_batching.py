"""Micro-batching, bounds, deadlines, cancellation and draining."""

from __future__ import annotations

import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations

import httpx
import pytest

from arr_fast.serve.batcher import Batcher
from arr_fast.serve.calls import CompareCall, PairOptions, RankCall, ScoreCall
from arr_fast.serve.failures import DeadlineError, DrainingError, QueueFullError
from arr_fast.serve.metrics import Metrics
from arr_fast.serve.settings import ServeSettings
from tests.engine import scenes
from tests.serve.running import SlowJudge, assert_close, compare_body, pair, running


def call(seed: int, criteria: int = 2, **options) -> CompareCall:
    a, b = pair(seed)
    rubrics = (scenes.rubric(criteria),)
    chosen = PairOptions(**options)
    return CompareCall((f"scene {seed}",), (a,), (b,), None, rubrics, chosen)


@pytest.fixture
def slow(judge):
    return SlowJudge(judge)


def batcher_of(judge, **settings) -> Batcher:
    return Batcher(judge, ServeSettings(**settings), Metrics(judge.stats))


def later(seconds: float = 60.0) -> float:
    return time.monotonic() + seconds


def occupy(batcher: Batcher, slow: SlowJudge):
    """Submits a call and waits until the engine thread is inside the judge with it."""
    ticket = batcher.submit(call(0), later())
    assert slow.entered.wait(10.0)
    return ticket


def test_waiting_requests_share_one_call_and_keep_their_own_answers(judge, slow):
    batcher = batcher_of(slow)
    first = occupy(batcher, slow)
    # Ragged rubrics, so that a mix-up of rows or columns would show.
    tickets = [batcher.submit(call(seed, criteria=1 + seed % 3), later()) for seed in range(1, 7)]
    slow.gate.set()
    answers = [ticket.future.result(60.0) for ticket in tickets]
    assert slow.calls == [1, 6]
    assert {ticket.batch_requests for ticket in tickets} == {6}
    for ticket, answer in zip([first, *tickets], [first.future.result(), *answers], strict=True):
        asked = ticket.call
        alone = judge.compare(
            asked.prompts, list(asked.images_a), list(asked.images_b), list(asked.rubrics)
        )
        assert_close(json.loads(json.dumps(answer)), json.loads(json.dumps(alone.to_json())))
    assert batcher.close(10.0)


def test_only_equal_options_share_a_call_and_order_is_kept(slow):
    batcher = batcher_of(slow)
    occupy(batcher, slow)
    tickets = [
        batcher.submit(call(1), later()),
        batcher.submit(call(2, orders="AB"), later()),
        batcher.submit(call(3), later()),
    ]
    slow.gate.set()
    for ticket in tickets:
        ticket.future.result(60.0)
    assert slow.calls == [1, 2, 1]
    assert [ticket.batch_requests for ticket in tickets] == [2, 1, 2]
    batcher.close(10.0)


def test_the_token_budget_bounds_a_batch_and_a_larger_request_runs_alone(slow):
    size = call(1).tokens
    batcher = batcher_of(slow, max_batch_tokens=2 * size)
    occupy(batcher, slow)
    tickets = [batcher.submit(call(seed), later()) for seed in range(1, 6)]
    slow.gate.set()
    for ticket in tickets:
        ticket.future.result(60.0)
    assert slow.calls[1:] == [2, 2, 1]
    batcher.close(10.0)
    tight = batcher_of(slow, max_batch_tokens=1)
    assert tight.submit(call(9), later()).future.result(60.0)["pairs"]
    tight.close(10.0)


def test_a_merged_call_that_fails_is_repeated_one_by_one(slow):
    slow.fail = 1
    batcher = batcher_of(slow)
    occupy(batcher, slow)
    tickets = [batcher.submit(call(seed), later()) for seed in (1, 2, 3)]
    slow.gate.set()
    assert all(ticket.future.result(60.0)["pairs"] for ticket in tickets)
    assert slow.calls == [1, 3, 1, 1, 1]
    batcher.close(10.0)


def test_a_group_weighs_as_much_as_all_of_its_pairs():
    sizes = (14, 14, 560, 280)
    images = tuple(scenes.image(size, size, seed) for seed, size in enumerate(sizes))
    rubrics, source = (scenes.rubric(3),), (scenes.image(140, 140, 9),)
    for orders, sources in (("both", None), ("AB", source)):
        options = PairOptions(orders=orders)
        pairs = [
            CompareCall(("a scene",), (a,), (b,), sources, rubrics, options).tokens
            for a, b in combinations(images, 2)
        ]
        group = RankCall(("a scene",), (images,), sources, rubrics, options).tokens
        # Each pair rounds on its own.
        assert group == pytest.approx(sum(pairs), abs=2 * len(pairs))


@pytest.mark.parametrize("kind", ["pair", "image", "group"])
def test_errors_of_a_shared_call_name_the_item_of_its_own_request(judge, monkeypatch, kind):
    def asked(*prompts: str):
        (a, b), rubrics = pair(1), (scenes.rubric(1),) * len(prompts)
        options = PairOptions()
        firsts, seconds = (a,) * len(prompts), (b,) * len(prompts)
        if kind == "pair":
            return CompareCall(prompts, firsts, seconds, None, rubrics, options)
        if kind == "image":
            return ScoreCall(prompts, firsts, None, rubrics)
        return RankCall(prompts, ((a, b, a),) * len(prompts), None, rubrics, options)

    limit = 300
    monkeypatch.setattr(judge.engine.adapter.text_config, "max_position_embeddings", limit)
    long = "word " * limit
    calls = [asked("fine", "also fine"), asked("fine", long), asked(long)]
    merged = calls[0].run(judge, calls)
    for call, together, number in zip(calls, merged, (None, 1, 0), strict=True):
        (alone,) = call.run(judge, [call])
        assert_close(json.loads(json.dumps(together)), json.loads(json.dumps(alone)))
        told = {verdict["error"] for verdict in verdicts_in(together)} - {None}
        assert len(told) == (number is not None)
        assert all(error.startswith(f"{kind} {number}: ") for error in told)


def verdicts_in(answer: dict) -> list[dict]:
    of_groups = [pair for group in answer.get("groups", ()) for pair in group["pairs"]]
    return [*of_groups, *answer.get("pairs", ()), *answer.get("images", ())]


class ShortCall:
    """A call that returns fewer results than it was asked for: a fault of ours, not a client's."""

    kind, merge_key, items, tokens = "compare", "short", 1, 1

    def run(self, judge, calls):
        return []


def test_a_fault_of_its_own_costs_a_batch_and_not_the_thread(slow):
    slow.gate.set()
    batcher = batcher_of(slow)
    with pytest.raises(ValueError, match="zip"):
        batcher.submit(ShortCall(), later()).future.result(30.0)
    assert batcher.is_alive
    assert batcher.submit(call(1), later()).future.result(60.0)["pairs"]
    batcher.close(10.0)


def test_the_first_request_waits_only_as_long_as_it_was_told(slow):
    slow.gate.set()
    batcher = batcher_of(slow, max_wait_ms=400.0)
    begun = time.monotonic()
    tickets = [batcher.submit(call(1), later())]
    time.sleep(0.1)
    tickets.append(batcher.submit(call(2), later()))
    for ticket in tickets:
        ticket.future.result(60.0)
    assert slow.calls == [2]
    assert tickets[0].queued_s >= 0.39
    assert time.monotonic() - begun < 30.0
    batcher.close(10.0)


def test_queue_bounds_hold(slow):
    batcher = batcher_of(slow, max_queued_requests=2)
    occupy(batcher, slow)
    kept = [batcher.submit(call(seed), later()) for seed in (1, 2)]
    with pytest.raises(QueueFullError, match="2 requests") as refused:
        batcher.submit(call(3), later())
    assert 1.0 <= refused.value.retry_after <= 60.0
    slow.gate.set()
    assert all(ticket.future.result(60.0) for ticket in kept)
    batcher.close(10.0)
    slow.gate.clear()
    slow.entered.clear()
    by_tokens = batcher_of(slow, max_queued_tokens=call(1).tokens)
    occupy(by_tokens, slow)
    by_tokens.submit(call(1), later())
    with pytest.raises(QueueFullError, match="tokens"):
        by_tokens.submit(call(2), later())
    slow.gate.set()
    by_tokens.close(10.0)


def test_expired_and_cancelled_requests_are_never_judged(slow):
    batcher = batcher_of(slow)
    occupy(batcher, slow)
    late = batcher.submit(call(1), time.monotonic() + 0.01)
    gone = batcher.submit(call(2), later())
    good = batcher.submit(call(3), later())
    assert gone.future.cancel()
    time.sleep(0.05)
    slow.gate.set()
    good.future.result(60.0)
    with pytest.raises(DeadlineError):
        late.future.result(60.0)
    assert slow.calls == [1, 1]
    batcher.close(10.0)


def test_draining_serves_what_was_accepted_and_refuses_the_rest(slow):
    batcher = batcher_of(slow)
    accepted = [occupy(batcher, slow), batcher.submit(call(1), later())]
    batcher.start_draining()
    with pytest.raises(DrainingError):
        batcher.submit(call(2), later())
    assert not batcher.is_alive
    slow.gate.set()
    assert batcher.close(30.0)
    assert all(ticket.future.result(0.0)["pairs"] for ticket in accepted)


def test_a_drain_that_takes_too_long_says_so(slow):
    batcher = batcher_of(slow)
    occupy(batcher, slow)
    dropped = batcher.submit(call(1), later())
    assert not batcher.close(0.05)
    with pytest.raises(DrainingError):
        dropped.future.result(1.0)
    slow.gate.set()


def test_over_http_concurrent_clients_share_calls_and_get_their_own(judge):
    slow = SlowJudge(judge)
    with running(slow) as server, ThreadPoolExecutor(9) as pool:
        sent = [pool.submit(server.http.post, "/v1/judge/compare", json=compare_body(100))]
        assert slow.entered.wait(10.0)
        bodies = [compare_body(seed, criteria=1 + seed % 3) for seed in range(8)]
        sent += [pool.submit(server.http.post, "/v1/judge/compare", json=b) for b in bodies]
        wait_for(lambda: server.metric("arr_fast_queue_requests") == 8)
        slow.gate.set()
        answers = [future.result() for future in sent][1:]
    assert slow.calls == [1, 8]
    for seed, answer in enumerate(answers):
        a, b = pair(seed)
        alone = judge.compare([f"scene {seed}"], [a], [b], scenes.rubric(1 + seed % 3))
        assert_close(answer.json(), json.loads(json.dumps(alone.to_json())))
        assert 'batch;desc="8"' in answer.headers["server-timing"]


def wait_for(condition, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.01)


def test_over_http_full_queue_is_429_with_retry_after(judge):
    slow = SlowJudge(judge)
    with running(slow, max_queued_requests=1) as server, ThreadPoolExecutor(2) as pool:
        first = pool.submit(server.http.post, "/v1/judge/compare", json=compare_body(1))
        assert slow.entered.wait(10.0)
        second = pool.submit(server.http.post, "/v1/judge/compare", json=compare_body(2))
        wait_for(lambda: server.gateway.batcher.is_full)
        refused = server.http.post("/v1/judge/compare", json=compare_body(3))
        assert refused.status_code == 429
        assert 1 <= int(refused.headers["retry-after"]) <= 60
        # Health checks are no requests: a full queue must not make the server look dead.
        assert server.http.get("/ready").status_code == 200
        slow.gate.set()
        assert {first.result().status_code, second.result().status_code} == {200}


def test_over_http_deadline_is_504_and_the_request_is_dropped(judge):
    slow = SlowJudge(judge)
    with running(slow) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.http.post, "/v1/judge/compare", json=compare_body(1))
        assert slow.entered.wait(10.0)
        late = server.http.post("/v1/judge/compare", json=compare_body(2, timeout_s=0.3))
        assert late.status_code == 504
        headers = {"X-Request-Timeout": "0.3"}
        late = server.http.post("/v1/judge/compare", json=compare_body(2), headers=headers)
        assert late.status_code == 504
        slow.gate.set()
        assert first.result().status_code == 200
    assert slow.calls == [1]


def test_over_http_a_client_that_leaves_is_not_judged(judge):
    slow = SlowJudge(judge)
    with running(slow) as server, ThreadPoolExecutor(1) as pool:
        first = pool.submit(server.http.post, "/v1/judge/compare", json=compare_body(1))
        assert slow.entered.wait(10.0)
        content = json.dumps(compare_body(2)).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as leaver:
            head = (
                f"POST /v1/judge/compare HTTP/1.1\r\nHost: x\r\nContent-Length: {len(content)}\r\n"
            )
            leaver.sendall(head.encode() + b"Content-Type: application/json\r\n\r\n" + content)
            wait_for(lambda: server.metric("arr_fast_queue_requests") == 1)
        refused = "arr_fast_refused_total"
        wait_for(lambda: server.metric(refused, reason="client_closed_request") == 1)
        slow.gate.set()
        assert first.result().status_code == 200
        assert server.http.post("/v1/judge/compare", json=compare_body(3)).status_code == 200
    assert slow.calls == [1, 1]


def test_over_http_stopping_serves_the_accepted(judge):
    slow = SlowJudge(judge)
    with running(slow) as server, ThreadPoolExecutor(1) as pool:
        accepted = pool.submit(server.http.post, "/v1/judge/compare", json=compare_body(1))
        assert slow.entered.wait(10.0)
        spare = httpx.Client(base_url=server.url, trust_env=False)
        assert spare.get("/ready").status_code == 200
        # The first half of what a SIGTERM does; a connection that is open still gets an answer.
        server.gateway.batcher.start_draining()
        assert spare.get("/ready").status_code == 503
        assert spare.post("/v1/judge/compare", json=compare_body(2)).status_code == 503
        server.server.should_exit = True
        threading.Timer(0.3, slow.gate.set).start()
        assert accepted.result().status_code == 200
        spare.close()
    assert slow.calls == [1]
