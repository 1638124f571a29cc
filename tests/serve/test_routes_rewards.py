"""Flow-Factory, flow_grpo, verl-omni and Edit-R1 payloads, as their own clients build them."""

from __future__ import annotations

import base64
import io
import pickle
import threading

import httpx
import msgpack
import numpy as np
import pytest

from arr_fast.images import to_image
from arr_fast.integrations.groups import group_rewards
from arr_fast.rubric import Criterion, Rubric
from arr_fast.serve import routes_rewards
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.settings import ServeSettings
from tests.engine import scenes
from tests.serve.running import b64, png, running


def jpeg(image) -> bytes:
    buffer = io.BytesIO()
    image.to_pil().save(buffer, format="JPEG")
    return buffer.getvalue()


def images(count: int, seed: int = 0) -> list:
    return [scenes.image(56, 56, seed + n) for n in range(count)]


@pytest.fixture(scope="module")
def group_server(judge):
    with running(judge, reward_mode="group") as run:
        yield run


def test_flow_factory_compute_is_pointwise_by_default(server, judge):
    pictures = images(3)
    # my_reward_remote.py of Flow-Factory (a0b2bc5): absent fields are null.
    payload = {
        "prompt": ["a", "b", "a"],
        "image": [base64.b64encode(png(i)).decode() for i in pictures],
        "video": None,
        "condition_images": None,
        "condition_videos": None,
    }
    answer = server.http.post("/compute", json=payload, timeout=60.0)
    expected = judge.score(["a", "b", "a"], pictures).score
    np.testing.assert_allclose(answer.json()["rewards"], expected, atol=1e-4)
    assert server.http.get("/health").is_success


def test_flow_factory_compute_by_group_never_mixes_prompts(group_server, judge):
    pictures = images(5)
    prompts = ["a", "b", "a", "b", "a"]
    payload = {"prompt": prompts, "image": [b64(i) for i in pictures]}
    rewards = group_server.http.post("/compute", json=payload).json()["rewards"]
    np.testing.assert_allclose(rewards, group_rewards(judge, prompts, pictures), atol=1e-4)
    alone = group_server.http.post(
        "/compute", json={"prompt": ["a", "a"], "image": [b64(pictures[0]), b64(pictures[2])]}
    )
    assert alone.status_code == 200
    lonely = group_server.http.post("/compute", json={"prompt": ["a"], "image": [b64(pictures[0])]})
    assert lonely.status_code == 400 and "needs 2" in lonely.json()["error"]["message"]


def test_flow_factory_condition_images_are_sources(server, judge):
    pictures, sources = images(2), images(2, seed=50)
    payload = {
        "prompt": ["make it red"] * 2,
        "image": [b64(i) for i in pictures],
        "condition_images": [[b64(s)] for s in sources],
    }
    rewards = server.http.post("/compute", json=payload).json()["rewards"]
    expected = judge.score(["make it red"] * 2, pictures, sources=sources).score
    np.testing.assert_allclose(rewards, expected, atol=1e-4)
    bad = {**payload, "condition_images": [[b64(sources[0])] * 2] * 2}
    assert server.http.post("/compute", json=bad).status_code == 400
    assert server.http.post("/compute", json={**payload, "video": [["x"]]}).status_code == 400


def test_verl_omni_http_scorer(server, judge):
    picture = images(1)[0]
    # http_scorer_client.py of verl-omni (a1139ba): one image, JPEG, POST to the bare address.
    payload = pickle.dumps({"images": [jpeg(picture)], "prompts": ["a cat"], "metadata": {}})
    answer = server.http.post("/", content=payload)
    assert answer.status_code == 200
    expected = judge.score(["a cat"], [to_image(jpeg(picture), name="x")]).score
    np.testing.assert_allclose(pickle.loads(answer.content)["scores"], expected, atol=1e-4)


def test_flow_grpo_geneval_dialect(server):
    payload = {
        "images": [jpeg(i) for i in images(2)],
        "meta_datas": [{"prompt": "a", "tag": "counting"}, {"prompt": "b", "include": [{"n": 1}]}],
        "only_strict": True,
    }
    answer = pickle.loads(server.http.post("/", content=pickle.dumps(payload)).content)
    assert set(answer) == {
        "scores", "rewards", "strict_rewards", "group_rewards", "group_strict_rewards",
    }  # fmt: skip
    assert len(answer["scores"]) == 2 and answer["scores"] == answer["strict_rewards"]


def test_edit_r1_dialect_adds_the_requirement(server, judge):
    pictures, sources = images(2), images(2, seed=30)
    payload = {
        "ref_images": [jpeg(s) for s in sources],
        "images": [jpeg(i) for i in pictures],
        "prompts": ["make it red", "add a dog"],
        "metadatas": [{"requirement": "The cube is red."}, {"requirement": ""}],
    }
    answer = server.http.post("/mode/logits_non_cot", content=pickle.dumps(payload))
    rubric = Rubric.default("edit")
    extra = Criterion(id="request.requirement", text="The cube is red.")
    longer = rubric.model_copy(update={"criteria": (*rubric.criteria, extra)})
    read = [to_image(jpeg(i), name="x") for i in pictures]
    expected = judge.score(
        payload["prompts"], read, [longer, rubric], sources=[jpeg(s) for s in sources]
    ).score
    np.testing.assert_allclose(pickle.loads(answer.content)["scores"], expected, atol=1e-4)


def test_msgpack_is_the_same(server, judge):
    pictures = images(2)
    payload = {"images": [png(i) for i in pictures], "prompts": ["a", "b"], "metadata": {}}
    answer = server.http.post("/v1/reward/msgpack", content=msgpack.packb(payload))
    expected = judge.score(["a", "b"], pictures).score
    np.testing.assert_allclose(msgpack.unpackb(answer.content)["scores"], expected, atol=1e-4)


@pytest.mark.parametrize(
    "payload",
    [
        b"\xc1",
        msgpack.packb([1]),
        msgpack.packb({"images": "x", "prompts": ["a"]}),
        msgpack.packb({"images": [b"x"], "prompts": [1]}),
        msgpack.packb({"images": [b"x"], "prompts": ["a"]}),
        msgpack.packb({"images": [], "prompts": []}),
        msgpack.packb({"images": [b"x"]}),
        b"\xdd\xff\xff\xff\xff",
    ],
)
def test_msgpack_refusals(server, payload):
    answer = server.http.post("/v1/reward/msgpack", content=payload)
    assert answer.status_code == 400 and answer.json()["error"]["message"]


def test_pickle_errors_come_as_pickles_with_their_status(server):
    class Evil:
        def __reduce__(self):
            return (print, ("executed",))

    answer = server.http.post("/", content=pickle.dumps({"images": [Evil()], "prompts": ["a"]}))
    assert answer.status_code == 400
    assert "not plain data" in pickle.loads(answer.content)["error"]


def test_payloads_are_read_beside_the_event_loop(server, monkeypatch):
    threads = []

    def seen(data):
        threads.append(threading.current_thread().name)
        raise BadRequestError("seen")

    monkeypatch.setattr(routes_rewards, "load_plain", seen)
    monkeypatch.setattr(routes_rewards, "_unpack", seen)
    for route in ("/", "/v1/reward/msgpack"):
        assert server.http.post(route, content=b"x").status_code == 400
    assert [name.rpartition("_")[0] for name in threads] == ["arr-fast-decode"] * 2


def test_pickle_is_off_by_default_and_stays_on_loopback(group_server):
    for path in ("/", "/v1/reward/pickle", "/mode/logits_non_cot"):
        assert group_server.http.post(path, content=pickle.dumps({})).status_code == 404
    with pytest.raises(ValueError, match="loopback only"):
        ServeSettings(host="0.0.0.0", pickle=True)


def test_pickle_from_another_machine_is_refused(judge):
    """Asked over ASGI, where the client's address can be chosen."""
    import asyncio

    from arr_fast.serve.app import create_app

    app = create_app(judge, ServeSettings(pickle=True))

    async def post(host: str) -> httpx.Response:
        transport = httpx.ASGITransport(app=app, client=(host, 1234))
        async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
            return await client.post("/", content=pickle.dumps({"images": 1}))

    assert asyncio.run(post("192.0.2.7")).status_code == 403
    assert asyncio.run(post("127.0.0.1")).status_code == 400
    app.state.gateway.close()
