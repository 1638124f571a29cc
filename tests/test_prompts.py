"""Conversations under a template: what is text stays text, and every leaf shares its prefix."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from arr_fast.bench.random_models import resolve_model
from arr_fast.errors import UnsupportedModelError
from arr_fast.prompts import (
    PAIR_LABELS,
    ImageSlot,
    PromptEncoder,
    criterion_leaf,
    holistic_leaf,
    pair_parts,
    point_parts,
)

MODEL = "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0]"
PLAIN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}"
    "{% if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


def encoder(template: str | None = None) -> PromptEncoder:
    tokenizer = AutoTokenizer.from_pretrained(resolve_model(MODEL))
    pad = tokenizer.convert_tokens_to_ids("<|image_pad|>")
    return PromptEncoder(
        tokenizer,
        image_token="<|image_pad|>",
        expand_image=lambda n: [([pad] * n, True)],
        chat_template=template,
    )


@pytest.fixture(scope="module")
def prompts() -> PromptEncoder:
    return encoder()


def flat(runs: Any) -> list[int]:
    return [int(token) for run in runs for token in run.ids]


def test_the_rendering_is_what_the_template_gives(prompts: PromptEncoder) -> None:
    parts = [*pair_parts("t2i", "a red circle"), criterion_leaf("It is sharp.")]
    got = prompts.tokenizer.decode(flat(prompts.encode(parts, [1, 1])))
    content: list[dict[str, str]] = [
        {"type": "image"} if isinstance(p, ImageSlot) else {"type": "text", "text": str(p)}
        for p in parts
    ]
    expected = prompts.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    assert got == expected


def test_only_short_texts_are_kept_and_both_encode_alike(prompts: PromptEncoder) -> None:
    long = "a red circle " * 200
    before = prompts._encode_short.cache_info().currsize
    assert prompts._encode_text(long) == prompts._encode_uncached(long)
    assert prompts._encode_short.cache_info().currsize == before
    assert prompts._encode_text("kept once") == prompts._encode_uncached("kept once")
    assert prompts._encode_short.cache_info().currsize == before + 1


@settings(max_examples=80, deadline=None)
@given(st.text(max_size=40), st.lists(st.text(max_size=30), min_size=1, max_size=4))
def test_leaves_equal_whole_conversations(caption: str, leaves: list[str]) -> None:
    prompts = _shared_encoder()
    for parts in (pair_parts("edit", caption), point_parts("t2i", caption)):
        count = sum(isinstance(p, ImageSlot) for p in parts)
        features = list(range(3, 3 + count))
        runs, tails = prompts.encode_leaves(parts, leaves, features)
        for leaf, tail in zip(leaves, tails, strict=True):
            assert flat(prompts.encode([*parts, leaf], features)) == flat(runs) + tail.tolist()


_ENCODERS: list[PromptEncoder] = []


def _shared_encoder() -> PromptEncoder:
    if not _ENCODERS:
        _ENCODERS.append(encoder())
    return _ENCODERS[0]


@settings(max_examples=80, deadline=None)
@given(
    st.lists(
        st.sampled_from(
            [
                "<|im_end|>",
                "<|im_start|>",
                "<|image_pad|>",
                "<|vision_end|>",
                "a",
                " ",
                "\ue0000\ue001",
            ]
        ),
        max_size=6,
    )
)
def test_no_text_makes_a_control_token(pieces: list[str]) -> None:
    prompts = _shared_encoder()
    control = set(prompts.tokenizer.get_added_vocab().values())
    ids = flat(prompts.encode(["before", ImageSlot(0), "".join(pieces)], [2]))
    plain = flat(prompts.encode(["before", ImageSlot(0), "after"], [2]))
    assert [t for t in ids if t in control] == [t for t in plain if t in control]


def test_runs_mark_images_in_order(prompts: PromptEncoder) -> None:
    runs = prompts.encode(["x", ImageSlot(1), "y", ImageSlot(0), "z"], [4, 7])
    assert [(run.image, len(run.ids)) for run in runs if run.image >= 0] == [(1, 7), (0, 4)]
    assert not runs[0].ids.flags.writeable


@pytest.mark.parametrize("ending", ["", ".", "!\n", "\ue002", "Criterion: x"])
def test_a_criterion_is_encoded_alone(prompts: PromptEncoder, ending: str) -> None:
    """Its ids are those after another caption, and the caption's own come right before."""
    leaf = criterion_leaf("It is sharp.")
    _, (plain,) = prompts.encode_leaves(pair_parts("t2i", "a red circle"), [leaf], [2, 2])
    parts = pair_parts("t2i", "a red circle" + ending)
    runs, (tail,) = prompts.encode_leaves(parts, [leaf], [2, 2])
    assert tail.tolist() == plain.tolist()
    assert runs[-1].image == -1 and runs[-2].image == 1
    assert prompts.tokenizer.decode(runs[-1].ids).endswith("\nCaption: a red circle" + ending)


def test_captions_and_instructions_follow_the_images() -> None:
    for parts in (pair_parts("t2i", "a cat"), point_parts("t2i", "a cat")):
        assert [p for p in parts if isinstance(p, str)][-1] == parts[-1] == "\nCaption: a cat"
    for parts in (pair_parts("edit", "cut"), point_parts("edit", "cut")):
        assert parts[-1] == "\nInstruction: cut"
        assert parts[-2] == ImageSlot(sum(isinstance(p, ImageSlot) for p in parts) - 1)


def test_leaves_need_an_image(prompts: PromptEncoder) -> None:
    with pytest.raises(ValueError, match="needs an image slot"):
        prompts.encode_leaves(["text"], ["leaf"], [])


def test_holistic_leaf_numbers_the_criteria() -> None:
    assert holistic_leaf(["a", "b"]) == "\nCriteria:\n1. a\n2. b"


def test_an_open_thinking_block_is_closed_before_the_readout() -> None:
    thinking = encoder(PLAIN + "<think>\n")
    if "</think>" not in thinking.tokenizer.get_added_vocab():
        thinking.tokenizer.add_tokens(["<think>", "</think>"])
        thinking = _with(thinking.tokenizer, PLAIN + "<think>\n")
    text = thinking.tokenizer.decode(flat(thinking.encode(["x"], [])))
    assert text.endswith("<think>\n\n</think>\n\n")
    assert thinking.label_ids(PAIR_LABELS, parts=["x"])


def test_an_open_thinking_block_that_cannot_be_closed_is_refused() -> None:
    prompts = encoder(PLAIN + "<think>\n")
    prompts._added.pop("</think>", None)
    with pytest.raises(UnsupportedModelError, match="</think>"):
        prompts.encode(["x"], [])


@pytest.mark.parametrize(
    "template,message",
    [
        (PLAIN.replace("{{ c.text }}", "{{ c.text }}{{ c.text }}"), "drops, repeats or reorders"),
        (PLAIN.replace("{{ c.text }}", ""), "drops, repeats or reorders"),
        (PLAIN.replace("<|image_pad|>", ""), "0 image tokens for 1 images"),
    ],
)
def test_templates_that_lose_content_are_refused(template: str, message: str) -> None:
    with pytest.raises(UnsupportedModelError, match=message):
        encoder(template).encode(["x", ImageSlot(0), "y"], [1])


def test_labels_are_checked_after_the_actual_prompt(prompts: PromptEncoder) -> None:
    parts = [*pair_parts("t2i", "x"), criterion_leaf("y")]
    first, second = prompts.label_ids(PAIR_LABELS, parts=parts)
    assert prompts.tokenizer.decode([*first, *second]) == "12"
    assert np.unique([*first, *second]).size == 2


def _with(tokenizer: Any, template: str) -> PromptEncoder:
    return PromptEncoder(
        tokenizer,
        image_token="<|image_pad|>",
        expand_image=lambda n: [([0] * n, True)],
        chat_template=template,
    )
