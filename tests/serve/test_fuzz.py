"""What the schema allows and what it does not: no request makes the server fail or fall."""

from __future__ import annotations

import base64
import json
import os
import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from tests.engine import scenes
from tests.serve.running import b64, compare_body
from tests.serve.test_routes_chat import LISTWISE_EN, message
from tests.serve.test_routes_labels import QUESTIONS

pytestmark = pytest.mark.fuzz

# Examples per route; a night's run asks for more.
EXAMPLES = int(os.environ.get("ARR_FAST_FUZZ_EXAMPLES", "20"))
FUZZ = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    suppress_health_check=list(HealthCheck),
    database=None,
)
# And 504, where a request asks for a deadline of its own that is too short.
LEGAL = {200, 400, 401, 403, 404, 405, 413, 415, 422, 429}

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["both", "learned", "holistic", "t2i", "http://x/", "data:,", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)


def routes(schema) -> list[tuple[str, str]]:
    return [
        (path, method.upper())
        for path, item in schema["paths"].items()
        for method in item
        if method in ("get", "post")
    ]


def test_schemathesis_finds_no_500_on_any_route(server):
    schemathesis = pytest.importorskip("schemathesis")
    document = server.http.get("/openapi.json").json()
    schema = schemathesis.openapi.from_dict(document)
    found = routes(document)
    assert ("/v1/judge/compare", "POST") in found and ("/compute", "POST") in found
    for path, method in found:

        @FUZZ
        @given(case=schema[path][method].as_strategy())
        def no_500(case):
            answer = case.call(base_url=server.url, timeout=60)
            hasty = isinstance(case.body, dict) and (case.body.get("timeout_s") or 60) < 5
            legal = {*LEGAL, 504} if hasty else LEGAL
            assert answer.status_code in legal, (case.method, case.path, answer.text)

        no_500()
    assert server.http.post("/v1/judge/compare", json=compare_body()).status_code == 200


def valid_bodies() -> dict[str, dict]:
    """A good request of every JSON route, so that what is changed in it is reached."""
    image = b64(scenes.image(28, 28, 1))
    body = compare_body(1)
    return {
        "/v1/judge/compare": body,
        "/v1/judge/score": {"prompts": ["p"], "images": [image], "rubric": body["rubric"]},
        "/v1/judge/rank": {"prompts": ["p"], "groups": [[image, image]], "rubric": body["rubric"]},
        "/compute": {"prompt": ["p"], "image": [image], "condition_images": None},
        "/v1/chat/completions": {
            "model": "m",
            "messages": message(LISTWISE_EN, "a dog", [scenes.image(28, 28, n) for n in (1, 2)]),
        },
        "/v1/score": {"query": "q", "items": ["a"], "label_token_ids": [1, 2], "model": "m"},
        "/v1/systemone": {"model": "m", "state": {"mood": "dark"}, "questions": QUESTIONS},
    }


def places(value, path=()):
    """Every place of a JSON value, as a path of keys."""
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from places(inner, (*path, key))


def replaced(value, path, new):
    if not path:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    copy[path[0]] = replaced(copy[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize("route", sorted(valid_bodies()))
def test_one_wrong_value_anywhere_is_a_refusal(server, route):
    good = valid_bodies()[route]
    # Accepted as it is: else nothing behind the first check would be reached.
    assert server.http.post(route, json=good).status_code == 200
    anywhere = list(places(good))

    @FUZZ
    @given(st.sampled_from(anywhere), JSON)
    def no_500(path, new):
        body = json.dumps(replaced(good, path, new)).encode("utf-8", "surrogatepass")
        answer = server.http.post(route, content=body, headers={"Content-Type": "application/json"})
        assert answer.status_code in LEGAL, (path, new, answer.text)

    no_500()


@FUZZ
@given(st.binary(max_size=300), st.sampled_from(["/v1/reward/msgpack", "/v1/reward/pickle", "/"]))
def bytes_are_refused(server, data, route):
    assert server.http.post(route, content=data).status_code in LEGAL


def test_any_bytes_on_the_binary_routes_are_refused(server):
    bytes_are_refused(server)


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_a_corpus_of_damaged_images_never_takes_the_server_down(server, form, tmp_path):
    rng = random.Random(form)
    path = tmp_path / "x"
    Image.fromarray(scenes.image(40, 48, 3).pixels).save(path, format=form)
    good = path.read_bytes()
    statuses = set()
    for number in range(2 * EXAMPLES):
        data = bytearray(good if number % 3 else good[: rng.randrange(1, len(good))])
        for _ in range(rng.randrange(1, 8)):
            data[rng.randrange(min(len(data), 200) if number % 2 else len(data))] = rng.randrange(
                256
            )
        body = {"prompts": ["p"], "images": [base64.b64encode(bytes(data)).decode()]}
        body["rubric"] = scenes.rubric(1).model_dump(mode="json")
        answer = server.http.post("/v1/judge/score", json=body)
        assert answer.status_code in (200, 400), answer.text
        statuses.add(answer.status_code)
    assert 400 in statuses
    assert server.http.get("/ready").status_code == 200
