"""The bundled judge's tokenizer: byte-level BPE in which every word of the domain is one token."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path
from typing import Any, cast

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from arr_fast.prompts import PAIR_EDIT, PAIR_T2I, POINT_EDIT, POINT_T2I
from arr_fast.shapes.captions import NUMBERS, PLURALS, RELATION_WORDS
from arr_fast.shapes.grammar import PHRASINGS
from arr_fast.shapes.scene import BACKGROUNDS, COLOURS, RADII, SHAPES

# Qwen's control tokens, in Qwen's order; the ids follow the plain vocabulary.
CONTROL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
VOCABULARY_SIZE = 2048

# Qwen2Tokenizer splits text by this pattern before it merges bytes.
PRETOKENIZE = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' }}"
    "{%- if message.content is string %}{{- message.content }}"
    "{%- else %}{%- for part in message.content %}"
    "{%- if part.type == 'image' or 'image' in part or 'image_url' in part %}"
    "{{- '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{%- elif 'text' in part %}{{- part.text }}{%- endif %}"
    "{%- endfor %}{%- endif %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)

WORDS_FILE = "data/words.txt"


def domain_words() -> list[str]:
    """Every word that is one token, sorted, as it stands (case kept).

    Beside the words of the domain's own texts: those of easy-VQA's questions, of the dense captions
    of training, of the default rubrics, and of writing criteria (data/words.txt).
    """
    extra = (resources.files("arr_fast.shapes") / WORDS_FILE).read_text(encoding="utf-8")
    texts = [form for forms in PHRASINGS.values() for form in forms]
    texts += [PAIR_T2I, PAIR_EDIT, POINT_T2I, POINT_EDIT]
    texts += [*SHAPES, *COLOURS, *BACKGROUNDS, *RADII, *NUMBERS, *PLURALS.values()]
    texts += [word for ways in RELATION_WORDS.values() for word in ways]
    texts += ["Make Change Add Put Turn Replace Remove Take the away put a an A An into size"]
    words = set(extra.split())
    for text in texts:
        words |= set(re.findall(r"[A-Za-z]+", re.sub(r"\{\w\}", " ", text)))
    words |= {"a", "an", "with", "against", "of", "on", "to", "and", "As", "In"}
    return sorted(words)


def train_backend() -> Tokenizer:
    """Merges bytes until every domain word, with and without a space before it, is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = domain_words()
    bare = {"Yes", "No", "Caption", "Image", "Criterion", "Criteria", "Instruction", "Source"}
    bare |= {"user", "assistant", "system", "Describe", "Write", "Theme", "Tip", "Compare", "Check"}
    starts = {w.capitalize() for w in words if w.islower()}
    corpus = [f" {word}" for word in words] + sorted(bare)
    common = {"The", "There", "Every", "All", "No", "Is", "Does", "Nothing", "Exactly", "A", "An"}
    corpus += [f" {word}" for word in sorted(starts & common)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(CONTROL_TOKENS),
        min_frequency=1,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def build_tokenizer() -> Any:
    """The tokenizer as a Qwen2Tokenizer with control tokens and the ChatML template."""
    from transformers import AddedToken, Qwen2Tokenizer

    model = json.loads(train_backend().to_str())["model"]
    tokenizer = Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=cast(Any, [tuple(merge) for merge in model["merges"]]),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=list(CONTROL_TOKENS[1:]),
        model_max_length=8192,
    )
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in CONTROL_TOKENS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def save_tokenizer(directory: Path) -> Any:
    """Builds the tokenizer, saves it into a directory and returns it."""
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(directory)
    return tokenizer
