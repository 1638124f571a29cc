"""The typed routes over a running server: the same numbers as in process, and clear refusals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from arr_fast.rubric import Rubric
from arr_fast.serve.calls import CompareCall, PairOptions
from tests.engine import scenes
from tests.serve.running import assert_close, b64, compare_body, pair


def clean(value):
    """What JSON makes of an object: tuples become lists."""
    return json.loads(json.dumps(value))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"orders": "AB", "label_mass": True},
        {"mode": "both", "aggregation": "veto", "margin": 0.25, "temperature": 2.0},
        {"mode": "holistic", "inconsistent": "keep"},
    ],
    ids=lambda o: "-".join(o) or "defaults",
)
def test_compare_equals_the_judge(server, judge, options):
    rubrics = [scenes.rubric(3), scenes.rubric(5, seed=2)]
    (a, b), (c, d) = pair(1), pair(2)
    answer = server.http.post(
        "/v1/judge/compare",
        json={
            "prompts": ["a red cube", "two dogs"],
            "images_a": [b64(a), {"url": f"data:image/png;base64,{b64(c)}"}],
            "images_b": [{"type": "image_url", "image_url": {"url": b64(b)}}, b64(d)],
            "rubric": [r.model_dump(mode="json") for r in rubrics],
            **options,
        },
    )
    assert answer.status_code == 200, answer.text
    expected = judge.compare(["a red cube", "two dogs"], [a, c], [b, d], rubrics, **options)
    assert_close(answer.json(), clean(expected.to_json()))
    timing = answer.headers["server-timing"]
    assert all(f"{stage};dur=" in timing for stage in ("read", "decode", "queue", "engine"))


def test_edits_take_sources(server, judge):
    (a, b), (source, _) = pair(3), pair(4)
    body = {"prompts": ["make it blue"], "images_a": [b64(a)], "images_b": [b64(b)]}
    answer = server.http.post("/v1/judge/compare", json={**body, "sources": [b64(source)]})
    expected = judge.compare(["make it blue"], [a], [b], sources=[source])
    assert_close(answer.json(), clean(expected.to_json()))
    assert answer.json()["provenance"]["rubric_hashes"] == [Rubric.default("edit").content_hash]


def test_score_equals_the_judge(server, judge):
    images = [scenes.image(60, 60, seed) for seed in (7, 8, 9)]
    answer = server.http.post(
        "/v1/judge/score",
        json={"prompts": ["x", "y", "z"], "images": [b64(i) for i in images], "rubric": "t2i"},
    )
    expected = judge.score(["x", "y", "z"], images, Rubric.builtin("t2i"))
    assert_close(answer.json(), clean(expected.to_json()))


def test_rank_equals_the_judge(server, judge):
    groups = [
        [scenes.image(56, 56, 10 * n + i) for i in range(size)] for n, size in ((1, 3), (2, 2))
    ]
    rubric = scenes.rubric(2)
    answer = server.http.post(
        "/v1/judge/rank",
        json={
            "prompts": ["p", "q"],
            "groups": [[b64(i) for i in group] for group in groups],
            "rubric": rubric.model_dump(mode="json"),
        },
    )
    expected = clean(judge.rank(["p", "q"], groups, rubric).to_json())
    assert_close(answer.json(), expected)
    assert sorted(expected["groups"][0]["ranking"]) == [0, 1, 2]


def test_a_fitted_temperature_is_applied_as_in_process(server, judge):
    rubric = scenes.rubric(2).with_calibration(
        judge.engine.loaded.revision, "log_odds_mean", temperature=3.0, margin=0.125
    )
    a, b = pair(5)
    body = compare_body(5, rubric=rubric.model_dump(mode="json"), prompts=["p"])
    answer = server.http.post("/v1/judge/compare", json=body).json()
    assert (answer["temperature"], answer["margin"]) == (3.0, 0.125)
    assert_close(answer, clean(judge.compare(["p"], [a], [b], rubric).to_json()))


def test_fits_of_several_rubrics_are_each_applied_alone_and_in_company(judge):
    """Pairs with fits of their own, in one request and merged with another."""
    plain = scenes.rubric(2)
    hot = plain.with_calibration(
        judge.engine.loaded.revision, "log_odds_mean", temperature=3.0, margin=0.125
    )

    def asked(*rubrics):
        columns = zip(*(pair(5 + n) for n in range(len(rubrics))), strict=True)
        return CompareCall(("p",) * len(rubrics), *columns, None, rubrics, PairOptions())

    calls = [asked(hot), asked(plain, hot), asked(plain)]
    assert len({call.merge_key for call in calls}) == 1
    merged = calls[0].run(judge, calls)
    for call, answer in zip(calls, merged, strict=True):
        alone = judge.compare(call.prompts, call.images_a, call.images_b, list(call.rubrics))
        assert_close(json.loads(json.dumps(answer)), clean(alone.to_json()))
    assert [answer["temperature"] for answer in merged] == [3.0, None, 1.0]
    assert [each["margin"] for each in merged[1]["pairs"]] == [0.0, 0.125]


BAD = {
    "no body": (None, 422, "body"),
    "unknown field": ({"colour": 1}, 422, "colour"),
    "empty prompt": ({"prompts": [" "]}, 400, "prompts[0] is empty"),
    "no prompts": ({"prompts": []}, 422, "prompts"),
    "two prompts": ({"prompts": ["a", "b"]}, 400, "images_a has 1 items, prompts has 2"),
    "not base64": ({"images_a": ["%%%"]}, 400, "images_a[0]"),
    "not an image": ({"images_b": ["aGVsbG8="]}, 400, "images_b[0]"),
    "a number": ({"images_a": [{"url": 3}]}, 400, "images_a[0]"),
    "a URL": ({"images_a": ["http://127.0.0.1:9/x.png"]}, 400, "not fetched"),
    "a file": ({"images_a": ["file:///etc/passwd"]}, 400, "not fetched"),
    "a path": ({"images_a": ["/etc/passwd"]}, 400, "images_a[0]"),
    "unknown rubric": ({"rubric": "../../secret.yaml"}, 400, "no packaged rubric"),
    "rubric of edits": ({"rubric": "edit"}, 400, "needs sources"),
    "rubric without criteria": ({"rubric": {"criteria": []}}, 400, "criteria"),
    "rubric that is self": ({"rubric": {"self": 1}}, 400, "rubric"),
    "odd order": ({"orders": "CD"}, 422, "orders"),
    "zero temperature": ({"temperature": 0}, 422, "temperature"),
    "learned without weights": ({"aggregation": "learned"}, 400, "learned_weights"),
    "weights of another rule": (
        {"aggregation": "majority", "learned_weights": [1.0]},
        400,
        "learned_weights",
    ),
    "weights without a rule": (
        {"mode": "holistic", "learned_weights": [1.0, 1.0]},
        400,
        "learned_weights",
    ),
    "holistic without a leaf": ({"aggregation": "holistic"}, 400, "holistic"),
    "lone surrogate": ({"prompts": ["\ud800"]}, 400, "surrogate"),
    "long prompt": ({"prompts": ["x" * 20_001]}, 400, "20001 characters"),
}


@pytest.mark.parametrize("name", BAD)
def test_refusals_name_the_item(server, name):
    change, status, words = BAD[name]
    # json.dumps keeps a lone surrogate as an escape, which httpx itself would refuse to encode.
    content = b"" if change is None else json.dumps({**compare_body(), **change}).encode()
    answer = server.http.post(
        "/v1/judge/compare", content=content, headers={"content-type": "application/json"}
    )
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("text", ["{", "[" * 100_000, '{"prompts": NaN}', "null", '"x"'])
def test_malformed_json_is_a_client_error(server, text):
    answer = server.http.post(
        "/v1/judge/compare", content=text.encode(), headers={"content-type": "application/json"}
    )
    assert 400 <= answer.status_code < 500
    assert answer.json()["error"]["message"]


def test_a_prompt_beyond_the_context_is_an_error_of_its_item_alone(server, judge):
    limit = judge.engine.adapter.text_config.max_position_embeddings
    (a, b), (c, d) = pair(1), pair(2)
    body = compare_body(criteria=1)
    body |= {"images_a": [b64(a), b64(c)], "images_b": [b64(b), b64(d)]}
    answer = server.http.post("/v1/judge/compare", json={**body, "prompts": ["fine", "é ü" * 6000]})
    statuses = [p["status"] for p in answer.json()["pairs"]]
    if limit < 12_000:
        assert statuses[1] == "error" and statuses[0] != "error"
    else:
        assert "error" not in statuses


def test_service_routes(server):
    assert server.http.get("/health").json() == {"status": "ok"}
    ready = server.http.get("/ready")
    assert ready.status_code == 200 and ready.json()["revision"] == server.gateway.revision
    assert server.http.get("/limits").json()["max_items"] == 64
    assert "token" not in server.http.get("/limits").json()
    paths = server.http.get("/openapi.json").json()["paths"]
    assert {"/v1/judge/compare", "/v1/score", "/v1/systemone", "/compute"} <= paths.keys()
    assert server.http.get("/docs").status_code == 200
    assert server.http.get("/nothing").json()["error"]["code"] == 404


def test_a_sleeping_judge_is_not_ready_and_its_requests_may_come_again(server, judge):
    image = b64(scenes.image(28, 28, 1))
    requests = {
        "/v1/judge/score": {"prompts": ["p"], "images": [image], "rubric": "t2i"},
        "/v1/score": {"query": "q", "items": ["a"], "label_token_ids": [1]},
    }
    judge.sleep()
    try:
        ready = server.http.get("/ready")
        assert (ready.status_code, ready.json()["status"]) == (503, "asleep")
        for route, body in requests.items():
            answer = server.http.post(route, json=body)
            assert answer.status_code == 503 and answer.json()["error"]["type"] == "asleep"
            assert int(answer.headers["retry-after"]) >= 1
    finally:
        judge.wake()
    assert server.http.get("/ready").json()["status"] == "ready"
    for route, body in requests.items():
        assert server.http.post(route, json=body).status_code == 200


def test_metrics_count_verdicts_and_caches(server):
    name = "arr_fast_verdicts_total"
    kinds = [{"kind": "compare", "status": s} for s in ("ok", "tie")]
    before = sum(server.metric(name, **labels) for labels in kinds)
    assert server.http.post("/v1/judge/compare", json=compare_body(77)).status_code == 200
    assert sum(server.metric(name, **labels) for labels in kinds) == before + 1
    text = server.http.get("/metrics").text
    for metric in ("arr_fast_queue_requests", "arr_fast_engine_rows_total", "_image_features_"):
        assert metric in text
    assert np.isfinite(server.metric("arr_fast_stage_seconds_sum", stage="engine"))
