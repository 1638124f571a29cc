"""The ARR reference's prompts through the real openai client."""

from __future__ import annotations

import json
import threading
import time

import openai
import pytest

from arr_fast.rubric import Rubric
from arr_fast.rubric_text import parse_themes
from arr_fast.serve import routes_chat
from arr_fast.serve.arr_prompt import parse
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.settings import ServeSettings
from tests.engine import scenes
from tests.serve.running import b64

RUBRICS = (
    "1. Theme: Prompt fidelity\n- Tip 1: Every named object is there.\n- Tip 2: Counts agree.\n"
    "2. Theme: Quality\n- Tip 1: No artefacts."
)
# Frame of the reference's messages (f8aa504, query_rubric_generator.py and utils/vision.py): the
# marks that a server can rely on, with the prose between them left out.
LISTWISE_EN = (
    "\nRank the {n} {what} using the evaluation rubrics.\n{description}\nEvaluation Rubrics:\n"
    "{rubrics}\n\n{sample}\n\n## Requirements\n- ...\n\n## Output Format\n"
    '{{\n    "rank": [...],\n    "reason": "..."\n}}\n'
)
LISTWISE_ZH = (
    "\n请根据评估标准，对输入的 {n} 张生成图片进行 Pairwise 排序。\n{description}\n"
    "评估标准:\n{rubrics}\n\n"
    "{sample}\n\n## 任务要求\n- ...\n"
)
POINTWISE_EN = (
    "\nScore the generated image using the evaluation rubrics.\n{description}\n"
    "Evaluation Rubrics:\n{rubrics}\n\n{sample}\n\nScore range: 1 to 9. The score must be an "
    "integer.\n\n## Output Format\n"
)
DESCRIPTION = "\n## Task Description\nCompare two outputs.\n"


def image_block(image) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{b64(image)}"}}


def message(template: str, caption: str, images, *, source=None, rubrics: str = RUBRICS) -> list:
    """A user message as the reference builds it."""
    blocks = []
    edit = source is not None
    if edit:
        blocks += [{"type": "text", "text": "Image BASE (original image):"}, image_block(source)]
    for n, image in enumerate(images, 1):
        label = f"Edited Image {n}:" if edit else f"Image {n}:"
        blocks += [{"type": "text", "text": label}, image_block(image)]
    head, kind = ("Editing instruction", "edited") if edit else ("Caption", "generated")
    sample = f"{head}: {caption}\nNumber of {kind} candidate images: {len(images)}"
    if edit:
        sample += "\nImage BASE is provided as the original/reference image."
    what = "edited results" if edit else "generated images"
    fields = {"n": len(images), "what": what, "description": DESCRIPTION, "rubrics": rubrics}
    text = template.format(**fields, sample=sample)
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="EMPTY", max_retries=0) as found:
        yield found


def ask(client, messages) -> dict:
    """The call that the reference makes for a Qwen judge."""
    reply = client.chat.completions.create(
        model="Qwen/Qwen3-VL-8B-Instruct",
        messages=messages,
        temperature=0,
        stream=False,
        response_format={"type": "json_object"},
        extra_body={"enable_thinking": False},
    )
    return json.loads(reply.choices[0].message.content)


@pytest.mark.parametrize("template", [LISTWISE_EN, LISTWISE_ZH], ids=["en", "zh"])
@pytest.mark.parametrize("count", [2, 3])
def test_rank_is_the_judges_ranking(client, judge, template, count):
    images = [scenes.image(56, 70, seed) for seed in range(count)]
    caption = "a cat\nCaption: not this one"
    found = ask(client, message(template, caption, images))
    verdicts = judge.rank([caption], [images], Rubric.from_text(RUBRICS, name="request"))
    ranking = verdicts.ranking[0]
    assert [found["rank"][candidate] for candidate in ranking] == list(range(1, count + 1))
    assert "Win rates" in found["reason"]
    # Exchanging the images exchanges their ranks: no first place is preferred.
    back = ask(client, message(template, caption, images[::-1]))
    assert back["rank"] == found["rank"][::-1]


def test_edits_rank_against_their_source(client, judge):
    images = [scenes.image(56, 56, seed) for seed in (4, 5)]
    source = scenes.image(56, 56, 6)
    found = ask(client, message(LISTWISE_EN, "make it red", images, source=source))
    rubric = Rubric.from_text(RUBRICS, name="request", task="edit")
    (winner,) = judge.compare(
        ["make it red"], [images[0]], [images[1]], rubric, sources=[source]
    ).score
    assert found["rank"] == ([1, 2] if winner > 0 else [2, 1])


def test_scores_use_the_range_of_the_prompt(client, judge):
    image = scenes.image(56, 56, 9)
    found = ask(client, message(POINTWISE_EN, "a dog", [image], rubrics="1. Sharp edges\n2. A dog"))
    rubric = Rubric.from_text("1. Sharp edges\n2. A dog", name="request")
    score = judge.score(["a dog"], [image], rubric).score[0]
    assert found["score"] == round(1 + 8 * score)


def test_models_are_listed(client, server):
    assert [m.id for m in client.models.list()] == [server.gateway.model]
    assert client.models.retrieve("Qwen/anything").id == server.gateway.model


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"messages": [{"role": "user", "content": "hello"}]}, "must hold images"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}, "only the"),
        ({"messages": message(LISTWISE_EN, "x", [scenes.image(32, 32, 1)])}, "2 candidate images"),
        ({"messages": message(LISTWISE_EN, "x", [], rubrics="")}, "2 candidate"),
        ({"stream": True}, "stream"),
    ],
)
def test_other_prompts_are_refused(client, change, words):
    images = [scenes.image(32, 32, seed) for seed in (1, 2)]
    call = {"model": "m", "messages": message(LISTWISE_EN, "x", images), **change}
    with pytest.raises(openai.BadRequestError, match=words):
        client.chat.completions.create(**call)


def test_an_image_that_cannot_be_read_is_an_error_and_no_rank(client):
    images = [scenes.image(32, 32, seed) for seed in (1, 2)]
    messages = message(LISTWISE_EN, "x", images)
    messages[0]["content"][1]["image_url"]["url"] = "data:image/png;base64,AAAA"
    with pytest.raises(openai.BadRequestError, match="image 1"):
        ask(client, messages)


def test_prompts_are_parsed_beside_the_event_loop(client, monkeypatch):
    threads = []

    def seen(*arguments):
        threads.append(threading.current_thread().name)
        return parse(*arguments)

    monkeypatch.setattr(routes_chat, "parse", seen)
    ask(client, message(LISTWISE_EN, "x", [scenes.image(32, 32, seed) for seed in (1, 2)]))
    assert [name.rpartition("_")[0] for name in threads] == ["arr-fast-decode"]


@pytest.mark.parametrize("line", ["*" * 16_000, "Tip" + " " * 16_000, "Rubric" + " " * 16_000])
def test_a_long_run_of_marks_costs_no_more_than_its_length(line):
    begun = time.process_time()
    themes = parse_themes(f"Theme: Light\n{line} x")
    assert time.process_time() - begun < 0.5
    assert themes == [(f"Light {' '.join(line.split())} x", [])]


def test_long_prompts_are_refused_unread_and_many_criteria_unbuilt(monkeypatch):
    images = [scenes.image(32, 32, seed) for seed in (1, 2)]
    settings = ServeSettings(max_text=3000, max_criteria=3)
    numbered = "\n".join(f"{n}. a" for n in range(1, 5))
    assert (
        len(parse(message(LISTWISE_EN, "x", images, rubrics=numbered[:-5]), settings).rubric) == 3
    )
    monkeypatch.setattr(Rubric, "from_text", None)
    for rubrics, words in (("1. a\n" * 1500, "the limit is 6000"), (numbered, "4 criteria")):
        with pytest.raises(BadRequestError, match=words):
            parse(message(LISTWISE_EN, "x", images, rubrics=rubrics), settings)


@pytest.mark.parametrize("digits", [7, 400, 5000])
def test_a_range_that_no_score_needs_is_refused(client, digits):
    template = POINTWISE_EN.replace("1 to 9.", f"1 to {'9' * digits}.")
    with pytest.raises(openai.BadRequestError, match="score range"):
        ask(client, message(template, "a dog", [scenes.image(32, 32, 1)]))
