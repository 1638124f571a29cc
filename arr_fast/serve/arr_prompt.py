"""Reads the evaluation prompts of the ARR reference, so that its code can talk to this server.

The reference (OpenEnvision/AutoRubric-as-Reward at f8aa504: rubric_pipeline/generator/
iterative_rubric/query_rubric_generator.py and utils/vision.py) sends one user message of labelled
images and a text with rubrics, caption and output format, in English or Chinese.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Literal

from arr_fast.errors import RubricError
from arr_fast.rubric import Criterion, Rubric, Task
from arr_fast.rubric_text import parse_themes
from arr_fast.serve.failures import BadRequestError
from arr_fast.serve.settings import ServeSettings

# Characters of a bound of the score range.
MAX_BOUND = 6

_LISTWISE = re.compile(
    r"Rank the \d+ (?:generated images|edited results) using the evaluation rubrics"
    r"|对输入的 \d+ (?:张生成图片|个编辑结果)进行"
)
_POINTWISE = re.compile(
    r"Score the (?:generated|edited) image using the evaluation rubrics|进行 pointwise 评分"
)
_RANGE = re.compile(r"(?:Score range|评分范围): (-?\d+) (?:to|到) (-?\d+)")
_RUBRICS = re.compile(r"(?:Evaluation Rubrics|评估标准):\n")
_CAPTION = re.compile(r"\n(?:Caption|Editing instruction|Instruction): ")
_AFTER_CAPTION = re.compile(
    r"\nNumber of (?:generated|edited) candidate images:|\n\n## |\n\n(?:Score range|评分范围):"
)


@dataclass(frozen=True, slots=True)
class ArrPrompt:
    """What one message of the reference asks.

    Attributes:
        kind: "rank" or "score".
        caption: Caption or editing instruction.
        images: The candidates as they were sent, in order.
        source: The original image of an edit, or None.
        rubric: The rubrics of the message; its task is "edit" only with a source.
        low, high: Range of an integer score.
    """

    kind: Literal["rank", "score"]
    caption: str
    images: tuple[Any, ...]
    source: Any | None
    rubric: Rubric
    low: int = 1
    high: int = 5


def parse(messages: list[dict[str, Any]], settings: ServeSettings) -> ArrPrompt:
    """Finds images, caption and rubrics.

    Args:
        messages: Chat messages; the last one is the user's.
        settings: Limits. A caption may have `max_text` characters, and so may all around it.

    Raises:
        BadRequestError: It is not one of the reference's evaluation prompts, or is over a limit.
    """
    texts, images, source = _blocks(messages[-1])
    text = texts[-1] if texts else ""
    limit = 2 * settings.max_text
    if len(text) > limit:
        raise BadRequestError(f"the prompt has {len(text)} characters, the limit is {limit}")
    kind: Literal["rank", "score"]
    if _LISTWISE.search(text):
        kind = "rank"
    elif _POINTWISE.search(text):
        kind = "score"
    else:
        raise BadRequestError(
            "this route answers only the evaluation prompts of the ARR reference; "
            "use /v1/judge or /v1/systemone for others"
        )
    rubrics, caption = _sections(text)
    task: Task = "edit" if source is not None else "t2i"
    low, high = _range(text) if kind == "score" else (1, len(images))
    if kind == "score" and len(images) != 1:
        raise BadRequestError(f"a score prompt needs 1 candidate image, got {len(images)}")
    if kind == "rank" and len(images) < 2:
        raise BadRequestError(f"a rank prompt needs 2 candidate images or more, got {len(images)}")
    rubric = _rubric(rubrics, task, settings.max_criteria)
    return ArrPrompt(kind, caption, tuple(images), source, rubric, low, high)


def _blocks(message: dict[str, Any]) -> tuple[list[str], list[Any], Any | None]:
    """Texts, candidate images and the source image of a message."""
    content = message.get("content")
    if not isinstance(content, list):
        raise BadRequestError("the last message must hold images; expected a list of parts")
    texts: list[str] = []
    images: list[Any] = []
    source = None
    for number, block in enumerate(content):
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "text" and isinstance(block.get("text"), str):
            texts.append(block["text"])
        elif kind == "image_url":
            if texts and texts[-1].startswith("Image BASE") and source is None:
                source = block
            else:
                images.append(block)
        else:
            raise BadRequestError(f"part {number} must be a text or an image_url, got {kind!r}")
    return texts, images, source


def _sections(text: str) -> tuple[str, str]:
    """The rubrics and the caption."""
    head = _RUBRICS.search(text)
    begin = _CAPTION.search(text, head.end()) if head else None
    if head is None or begin is None:
        raise BadRequestError("the prompt has no rubrics section or no caption")
    # A caption may hold these very words, so it ends at the last of the nearest kind.
    ends = [m.start() for m in _AFTER_CAPTION.finditer(text, begin.end())]
    numbered = [e for e in ends if text.startswith("\nNumber of ", e)]
    end = numbered[-1] if numbered else (ends[0] if ends else len(text))
    caption = text[begin.end() : end].strip()
    if not caption:
        raise BadRequestError("the caption is empty")
    return text[head.end() : begin.start()].strip(), caption


def _range(text: str) -> tuple[int, int]:
    found = _RANGE.findall(text)
    if found and max(map(len, found[-1])) > MAX_BOUND:
        raise BadRequestError(f"a bound of the score range has over {MAX_BOUND} characters")
    low, high = (int(part) for part in found[-1]) if found else (1, 5)
    if low >= high:
        raise BadRequestError(f"score range {low} to {high} is empty")
    return low, high


def _rubric(text: str, task: Task, limit: int) -> Rubric:
    """The rubrics as criteria; text without a list in it is one criterion."""
    if not text:
        raise BadRequestError("the rubrics section is empty")
    try:
        count = len(parse_themes(text))
        if count > limit:
            raise BadRequestError(f"the prompt has {count} criteria, the limit is {limit}")
        return Rubric.from_text(text, name="request", task=task)
    except RubricError:
        return Rubric(name="request", task=task, criteria=(Criterion(id="rubric", text=text),))
