"""The tokenizer: domain words are one token, labels too, and any text survives."""

from __future__ import annotations

import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from arr_fast.prompts import PAIR_LABELS, POINT_LABELS, criterion_leaf, pair_parts, point_parts
from arr_fast.shapes.pairs import sample_edit_pair, sample_pair
from arr_fast.shapes.rows import describe_picture, make_encoder
from arr_fast.shapes.tokenizer import CONTROL_TOKENS, build_tokenizer, domain_words

TOKENIZER = build_tokenizer()


def test_every_domain_word_is_one_token():
    split = [w for w in domain_words() if len(TOKENIZER.tokenize(" " + w)) != 1]
    assert not split


def test_texts_of_the_domain_take_one_token_per_word():
    for number in range(100):
        rng = np.random.default_rng([5, number])
        example = (sample_pair, sample_edit_pair)[number % 2](rng, "held_out", 14)
        texts = [c.text for c in example.criteria]
        texts += [example.caption, *map(describe_picture, example.scenes)]
        for text in texts:
            text = " " + text.strip()
            words = text.replace(".", " .").replace(",", " ,").split()
            assert len(TOKENIZER.tokenize(text)) == len(words), TOKENIZER.tokenize(text)


@pytest.mark.parametrize(
    ("labels", "parts"),
    [(PAIR_LABELS, pair_parts("t2i", "x")), (POINT_LABELS, point_parts("t2i", "x"))],
)
def test_labels_are_one_token_after_the_prompt(labels, parts):
    encoder = make_encoder(TOKENIZER)
    ids = encoder.label_ids(labels, parts=[*parts, criterion_leaf("x")])
    assert [len(variants) for variants in ids] == [1, 1]


def test_control_tokens_are_added_tokens():
    added = TOKENIZER.get_added_vocab()
    assert set(CONTROL_TOKENS) == set(added)
    for token in CONTROL_TOKENS:
        assert TOKENIZER.encode(token) == [added[token]]


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_any_unicode_survives(text: str):
    plain = text.encode("utf-8", "ignore").decode("utf-8")
    if any(token in plain for token in CONTROL_TOKENS):
        return
    ids = TOKENIZER.encode(plain)
    assert TOKENIZER.decode(ids) == unicodedata.normalize("NFC", plain)
    assert all(i < len(TOKENIZER) for i in ids)


def test_chat_template_has_qwens_shape():
    content = [{"type": "text", "text": "See "}, {"type": "image"}, {"type": "text", "text": "?"}]
    text = TOKENIZER.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    assert text == (
        "<|im_start|>user\nSee <|vision_start|><|image_pad|><|vision_end|>?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
