"""The load test of the server: what it sends, that its gates can fail, and a short run of all."""

from __future__ import annotations

import asyncio
import json
import math
from collections import Counter
from dataclasses import replace

import pytest

from arr_fast.bench.serve import Load, ServeBench, _hold, run_serve_bench, table_of
from arr_fast.bench.serve_load import (
    JSON,
    SIZES,
    Tally,
    build_corpus,
    difference,
    malformed,
    run_clients,
)
from arr_fast.bench.serve_process import Watch
from arr_fast.judge import Judge
from tests.serve.running import MODEL, running


@pytest.fixture(scope="module")
def judge() -> Judge:
    return Judge.from_pretrained(MODEL, device="cpu")


@pytest.fixture(scope="module")
def corpus(judge):
    return build_corpus(judge, len(SIZES), seed=3)


def load_of(run, corpus, **options) -> Tally:
    options = {"clients": 6, "seconds": 120.0, "requests": 8, **options}
    return asyncio.run(run_clients(run.url, corpus, **options))


def test_right_answers_are_told_from_wrong_ones(judge, corpus):
    # An answer that is off by more than the tolerance, in one number, of one query.
    query = corpus[1]
    answer = json.loads(json.dumps(query.answer))
    answer["pairs"][0]["criteria"][2]["preference"] += 1e-2
    with running(judge) as run:
        good = load_of(run, corpus, malformed_share=0.2, leaving_share=0.1)
        bad = load_of(run, [replace(query, answer=answer)], clients=2, requests=1)
    assert good.counts["ok"] and good.counts["malformed"] and good.counts["left"]
    assert not good.problems and set(good.counts) <= {"ok", "malformed", "left", "refused"}
    assert bad.counts["wrong"] and not bad.counts["ok"]
    assert "criteria[2].preference" in bad.problems[0]
    # Nobody answers any more.
    gone = load_of(run, corpus, clients=1, requests=1)
    assert gone.counts["lost"] and "ConnectError" in gone.problems[0]


def test_every_kind_of_malformed_body_is_refused(judge, corpus):
    with running(judge) as run:
        # The same without the change is accepted, so it is the change that is refused.
        assert run.http.post(corpus[0].path, content=corpus[0].body, headers=JSON).is_success
        for number, query in ((n, q) for n in range(7) for q in (corpus[0], corpus[4], corpus[6])):
            answer = run.http.post(query.path, content=malformed(query, number), headers=JSON)
            assert answer.status_code in (400, 422), (number, query.path)


def test_differences_are_found_wherever_they_are():
    wanted = {"a": [1.0, None, {"b": "x"}], "c": True}
    assert difference(json.loads(json.dumps(wanted)), wanted) is None
    assert difference({**wanted, "c": False}, wanted) == "$.c: False for True"
    assert difference({"a": [1.0, 2.0, {"b": "x"}], "c": True}, wanted) == "$.a[1]: 2.0 for None"
    assert "2 items for 3" in (difference({"a": [1.0, None], "c": True}, wanted) or "")
    assert "keys" in (difference({"a": []}, wanted) or "")
    assert difference({"a": [None, None, {"b": "x"}], "c": True}, wanted) == "$.a[0]: None for 1.0"


def test_growth_leaves_the_first_quarter_out():
    watch = Watch(rss=[10, 10, 100, 100, 101, 101, 110, 110])
    assert watch.growth() == pytest.approx(0.1)
    assert math.isnan(Watch(rss=[1] * 7).growth())


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"lost": 1}, "requests lost"),
        ({"wrong": 1}, "wrong or mixed-up answers"),
        ({"accepted": 1}, "malformed requests accepted"),
        ({"queued": [9.0]}, "deepest queue"),
        ({"rss": [100] * 6 + [110] * 2}, "growth of memory"),
        ({"rss": [100] * 7}, "growth of memory"),
        ({"crowd_rate": 1.9}, "crowd / one client"),
        ({"drained": 3}, "answers after SIGTERM"),
        ({"status": -9}, "answers after SIGTERM"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_each_gate_fails_alone(change, name):
    result = ServeBench(Load(clients=4, max_queue=8), alone_rate=1.0, drain_clients=4)
    result.crowd_rate = change.get("crowd_rate", 2.5)
    result.exit_status = change.get("status", 0)
    counts = {kind: change[kind] for kind in ("lost", "wrong", "accepted") if kind in change}
    watch = Watch(rss=change.get("rss", [100] * 8), queued=change.get("queued", [8.0]))
    drained = Tally(Counter(ok=change.get("drained", 4)))
    _hold(result, Tally(Counter(ok=9, **counts), seconds=[0.1]), watch, drained, [])
    assert [gate.name for gate in result.gates if not gate.passed] == [name]
    assert result.exit_code == 1


def test_a_short_run_against_a_real_process_holds_and_drains_on_sigterm(tmp_path):
    load = Load(model=MODEL, clients=8, seconds=2.0, max_queue=6, corpus=8)
    result = run_serve_bench(load, json_path=tmp_path / "out.json", say=lambda _: None)
    # Rates and memory need a longer run on a quiet machine; the rest holds in any.
    timed = ("crowd / one client", "growth of memory")
    assert all(gate.passed for gate in result.gates if gate.name not in timed), result
    assert result.counts["ok"] > 0 and not result.problems
    document = json.loads((tmp_path / "out.json").read_text())
    assert document["schema"] == "arr_fast.bench_serve/1"
    assert [gate["name"] for gate in document["gates"]] == [gate.name for gate in result.gates]
    assert table_of(result).row_count == 7
