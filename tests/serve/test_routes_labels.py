"""/v1/systemone and /v1/score against plain transformers forwards."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from arr_fast.prompts import ImageSlot
from arr_fast.replay import Replayer
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.label_calls import LabelCall, LabelReading
from arr_fast.serve.systemone import (
    ChoiceQuestion,
    ScoreQuestion,
    SystemOneRequest,
    answer,
    chat_question,
    shared_text,
)
from arr_fast.trace import VerdictTrace
from tests.engine import scenes
from tests.serve.running import b64

QUESTIONS = {
    "match": {"type": "noul", "instructions": "Do the images show a cube?"},
    "which": {
        "type": "choice",
        "instructions": "Which is sharper?",
        "criteria": {"first": "the left one", "second": None, "neither": None},
    },
    "grade": {"type": "score", "criteria": ["bad", "fair", {"level": "good"}]},
}


@pytest.fixture(scope="module")
def plain(judge):
    """log-softmax over the vocabulary after some token ids, by transformers alone."""
    replayer = Replayer.from_pretrained(judge.engine.loaded.path)

    def log_probs(ids: list[int]) -> np.ndarray:
        with torch.no_grad():
            logits = replayer.model(input_ids=torch.tensor([ids])).logits[0, -1]
        return torch.log_softmax(logits.double(), -1).numpy()

    return log_probs


def ids_of(judge, text: str) -> list[int]:
    return judge.engine.adapter.tokenizer(text)["input_ids"]


def rendered(judge, text: str) -> list[int]:
    """What the chat template makes of one user turn of text."""
    turn = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    tokenizer = judge.engine.adapter.tokenizer
    whole = tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
    return tokenizer(whole)["input_ids"]


def test_systemone_text_equals_a_plain_forward(server, judge, plain):
    body = {"model": "any", "state": {"mood": "dark"}, "questions": QUESTIONS, "ignored": 1}
    sent = server.http.post("/v1/systemone", json=body)
    assert sent.status_code == 200, sent.text
    reply = sent.json()
    request = SystemOneRequest(**body)
    total = 0
    for name, question in request.questions.items():
        asked = chat_question(name, question)
        ids = rendered(judge, shared_text(request) + asked.text)
        total += len(ids)
        row = plain(ids)[[ids_of(judge, label)[0] for label in asked.labels]]
        expected = np.exp(row) / np.exp(row).sum()
        found = reply["answers"][name]
        np.testing.assert_allclose(list(found["probabilities"].values()), expected, atol=1e-5)
        assert found["x_label_mass"] == pytest.approx(np.exp(row).sum(), rel=1e-4)
        assert found["type"] == question.type
    answers = reply["answers"]
    assert answers["match"]["noul"] == answers["match"]["probabilities"]["yes"]
    best = max(answers["which"]["probabilities"].items(), key=lambda item: item[1])[0]
    assert answers["which"]["choice"] == best
    levels = answers["grade"]["probabilities"]
    assert answers["grade"]["score"] == pytest.approx(levels["1"] + 2 * levels["2"])
    assert answers["grade"]["legend"]["2"] == {"level": "good"}
    assert reply["usage"] == {"input_tokens": total, "output_tokens": 0}
    assert reply["object"] == "structured_decision"
    assert reply["diagnostics"]["match"]["label_mass"] == answers["match"]["x_label_mass"]


def test_systemone_images_equal_the_replay(server, judge):
    images = [scenes.image(56, 84, 1), scenes.image(84, 56, 2)]
    body = {
        "state": "two pictures",
        "questions": {"match": QUESTIONS["match"]},
        "images": [
            {"url": b64(images[0])},
            {"type": "image_url", "image_url": {"url": b64(images[1])}},
        ],
    }
    found = server.http.post("/v1/systemone", json=body).json()["answers"]["match"]["noul"]
    request = SystemOneRequest(**body)
    asked = chat_question("match", request.questions["match"])
    engine = judge.engine
    features = engine.image_features(images)
    counts = [features[image.content_hash].count for image in images]
    parts = [shared_text(request), "\nImage 1: ", ImageSlot(0), "\nImage 2: ", ImageSlot(1)]
    ids = np.concatenate([run.ids for run in engine.prompts.encode([*parts, asked.text], counts)])
    yes, no = (tuple(ids_of(judge, label)) for label in asked.labels)
    trace = VerdictTrace(
        0, "match", "point", ids, np.zeros((3, len(ids))), tuple(images), (yes, no), 0.0
    )
    log_odds = Replayer.from_pretrained(engine.loaded.path).log_odds(trace)
    assert np.log(found / (1 - found)) == pytest.approx(log_odds, abs=1e-4)


def test_label_reads_of_several_requests_keep_apart(judge):
    calls = [
        LabelCall(parts=(f"State {n}",), questions=(chat_question("q", question),))
        for n, question in enumerate(
            SystemOneRequest(state="", questions=QUESTIONS).questions.values()
        )
    ]
    bad = LabelCall(sequences=((10**9,),), label_ids=((1,),))
    merged = calls[0].run(judge, [calls[0], bad, *calls[1:]])
    assert "not one of" in str(merged.pop(1))
    for call, together in zip(calls, merged, strict=True):
        (alone,) = call.run(judge, [call])
        np.testing.assert_allclose(together[0].log_probs, alone[0].log_probs, atol=1e-4)


def test_a_prompt_beyond_the_context_is_a_refusal_of_its_request_alone(server, judge, monkeypatch):
    monkeypatch.setattr(judge.engine.adapter.text_config, "max_position_embeddings", 60)
    long = "word " * 60
    scoring = {"query": "q", "items": ["a", long], "label_token_ids": [1]}
    asked = {"q": {"type": "noul", "instructions": "Is it?"}, "long": {**QUESTIONS["match"]}}
    asked["long"]["instructions"] = long
    for route, body, name in (
        ("/v1/score", scoring, "items[1]"),
        ("/v1/systemone", {"state": "s", "questions": asked}, "question 'long'"),
        (
            "/v1/systemone",
            {"state": long, "questions": asked, "images": [b64(scenes.image(28, 28, 1))]},
            "the request",
        ),
    ):
        sent = server.http.post(route, json=body)
        assert sent.status_code == 400, sent.text
        message = sent.json()["error"]["message"]
        assert message.startswith(f"{name}: the prompt has") and message.endswith("holds 60")
    calls = [LabelCall(sequences=((7,) * n,), label_ids=((1,),)) for n in (5, 61)]
    fine, refused = calls[0].run(judge, calls)
    assert isinstance(refused, BadRequestError) and fine[0].tokens == 5


def test_confidence_rules():
    question = ChoiceQuestion(type="choice", criteria={"a": None, "b": None, "c": None})
    reading = LabelReading(np.log([0.35, 0.1, 0.05]), 7)
    assert answer(question, reading, "margin")["confidence"] == pytest.approx((3 * 0.7 - 1) / 2)
    assert answer(question, reading, "label_mass")["confidence"] == pytest.approx(0.7 * 0.5)
    scale = ScoreQuestion(type="score", criteria=["x", "y", "z"])
    # Mean distance to the top level is 0.2 + 2 * 0.1; of an even spread to the middle 2 / 3.
    assert answer(scale, reading, "margin")["confidence"] == pytest.approx(1 - 0.4 / (2 / 3))
    even = LabelReading(np.log([0.2, 0.2]), 7)
    two = ChoiceQuestion(type="choice", criteria={"a": None, "b": None})
    assert answer(two, even, "margin")["confidence"] == pytest.approx(0.0)


@pytest.mark.parametrize("softmax", [False, True], ids=["vocabulary", "labels"])
@pytest.mark.parametrize("form", ["text", "ids", "item-first"])
def test_score_equals_a_plain_forward(server, judge, plain, softmax, form):
    query, items = "The image shows", [" a red cube", " two dogs", ""]
    labels = [5, 9, 300]
    body = {"items": items, "query": query, "label_token_ids": labels, "apply_softmax": softmax}
    texts = [query + item for item in items]
    if form == "item-first":
        texts = [item + query for item in items]
        body["item_first"] = True
    sequences = [ids_of(judge, text) for text in texts]
    if form == "ids":
        body |= {"query": ids_of(judge, query), "items": [ids_of(judge, i) for i in items]}
        sequences = [body["query"] + item for item in body["items"]]
    sent = server.http.post("/v1/score", json={**body, "temperature": 2.0 if softmax else 1.0})
    assert sent.status_code == 200, sent.text
    reply = sent.json()
    for ids, scores in zip(sequences, reply["scores"], strict=True):
        row = plain(ids)[labels]
        if softmax:
            weights = np.exp(row / 2.0)
            np.testing.assert_allclose(scores, weights / weights.sum(), atol=1e-5)
        else:
            np.testing.assert_allclose(scores, np.exp(row), rtol=1e-3)
    assert reply["object"] == "scoring"
    assert reply["usage"]["prompt_tokens"] == sum(map(len, sequences))


def test_score_takes_labels_per_item_and_single_tokens(server, plain):
    body = {"query": [], "items": [[7], [8, 9]], "label_token_ids": [[1], [2, 3]]}
    scores = server.http.post("/v1/score", json=body).json()["scores"]
    np.testing.assert_allclose(scores[0], np.exp(plain([7])[[1]]), rtol=1e-3)
    np.testing.assert_allclose(scores[1], np.exp(plain([8, 9])[[2, 3]]), rtol=1e-3)


BAD = {
    "no items": ({"items": []}, "items is empty"),
    "label out of range": ({"label_token_ids": [10**7]}, "label_token_ids[0]"),
    "repeated label": ({"label_token_ids": [1, 1]}, "repeats"),
    "mixed": ({"query": [1]}, "both"),
    "lists of labels": ({"label_token_ids": [[1]]}, "has 1 lists, items has 2"),
    "nothing": ({"query": "", "items": ["", "x"]}, "hold no token"),
}


@pytest.mark.parametrize("name", BAD)
def test_score_refusals(server, name):
    change, words = BAD[name]
    body = {"query": "q", "items": ["a", "b"], "label_token_ids": [1, 2], **change}
    sent = server.http.post("/v1/score", json=body)
    assert sent.status_code == 400 and words in sent.json()["error"]["message"], sent.text


def test_an_image_token_in_raw_ids_is_refused(server, judge):
    token = judge.engine.adapter.image_token_id
    body = {"query": [1], "items": [[token]], "label_token_ids": [1]}
    assert server.http.post("/v1/score", json=body).status_code == 400


@pytest.mark.parametrize(
    "change",
    [
        {"state": {"mood": float("nan")}},
        {"questions": {"q": {"type": "score", "criteria": ["low", float("inf")]}}},
        {"questions": {"q": {"type": "noul", "instructions": [float("-inf")]}}},
        {"questions": {"q": {"type": "choice", "criteria": {"a": {"x": float("nan")}}}}},
        {"questions": {"\ud800": QUESTIONS["match"]}},
    ],
    ids=["state", "level", "instructions", "option", "name"],
)
def test_what_no_answer_could_echo_is_refused(server, change):
    body = json.dumps({"state": "s", "questions": {"q": QUESTIONS["match"]}, **change})
    sent = server.http.post(
        "/v1/systemone", content=body.encode(), headers={"content-type": "application/json"}
    )
    assert sent.status_code == 400, sent.text


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ({"type": "noul"}, "needs instructions"),
        ({"type": "choice", "criteria": {}}, "criteria"),
        ({"type": "choice", "criteria": {str(n): None for n in range(27)}}, "criteria"),
        ({"type": "score", "criteria": []}, "criteria"),
        ({"type": "maybe"}, "type"),
        ({"type": "noul", "instructions": "x", "extra": 1}, "extra"),
    ],
)
def test_systemone_refusals(server, question, words):
    sent = server.http.post("/v1/systemone", json={"state": "s", "questions": {"q": question}})
    assert sent.status_code == 422 and words in sent.json()["error"]["message"]
