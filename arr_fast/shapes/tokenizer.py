"""The bundled judge's tokenizer: byte-level BPE in which every word of the domain is one token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

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

# Words that easy-VQA asks with, that the dense captions of training use, and that general rubrics
# and rubric writing need.
EXTRA_WORDS = """
user assistant system Yes No yes no Caption Image Criterion Criteria Instruction Source Describe
what does not shape shapes present contain rectangle teal black brown gray grey pink
left right top bottom center middle corner half side upper lower row column front behind between
next near far inside outside around over under beside touching apart overlap overlapping close
large small medium big tiny huge size sizes larger smaller same different equal
sharp blurry blur clean noisy noise grain whole cut covered hidden clear visible invisible free
object objects thing things item items element elements colour colours color colors background
red green blue yellow purple orange white beige navy dark light bright pale plain uniform
all every each any some none nothing something everything only exactly at least most more less
than fewer many few first second third last other another both neither either one zero
is are was were be been has have had do did done can could should must may will would shall
the a an of in on at to from with without for by as and or but if then that this these those it
its there here which who when where why how into onto against beyond between within
caption instruction image images picture pictures scene scenes photo frame edge edges border
match matches matching follow follows show shows shown depict depicts describe describes
described faithful correct correctly wrong right true false missing extra added removed changed
unchanged kept preserved original edited edit edits change changes made asked requested
count number position positions placement layout arrangement relation relations spatial
arranged placed located appear appears look looks fits fit
quality detail details artifact artifacts defect defects distortion distortions distorted
realistic natural coherent consistent plausible lighting shadow shadows texture textures
contrast saturation exposure composition balanced balance focus style aesthetic aesthetics
appealing pleasing beautiful anatomy hands hand face faces body people person human text
letters legible readable spelled attributes attribute subject subjects main action actions
materials material seams seam blending blended artefact artefacts identity pose perspective
viewpoint unrelated regions region area areas content contents overall whole part parts
complete completely fully partly clearly well better best good bad poor high low
theme Theme Tip tip tips criterion criteria rubric weight essential fine coarse mid level
reason because therefore compare compared comparing preferred judge check checks verify
write Write writes written list List lists answer Answer question Question general specific
name names named state states mention mentions mentioned say says said contain contains
color colored coloured tinted shade hue tone tones mood atmosphere intent requested user
crisp smooth rough jagged aliasing compression banding watermark logo signature cropped crop
accurate accurately exact exactness proportion proportions scale orientation rotated upright
accident agree alone altered angle animal animals applied ask asks belongs bend binding blocked
blocks bodies buildings built cartoon checked clipped competes connected consistency counts craft
day depth direction editing expected extras eye eyes fabric faint field fingers floating focal
formed framed framing fur garish generation gives glance hair halos harmony highlights implies
interactions joins joints keep kind led lettering limbs markings melted merged met metal moved nor
notice outline pairs patterns photograph place point poses prominent purpose recognised reflection
reflections relative removal removes repeated replaces result season sensible setting sharpened
sharpness skin smears so soundly space straight strength stronger structure such surroundings
survives target task them throughout time too undistorted undone unimportant unless untouched
watercolour waxy weather wood each Each Where
symmetry symmetric centered centred aligned alignment spacing even evenly spread crowded empty
""".split()


def domain_words() -> list[str]:
    """Every word that the domain's texts use, sorted, as they stand (case kept)."""
    texts = [form for forms in PHRASINGS.values() for form in forms]
    texts += [PAIR_T2I, PAIR_EDIT, POINT_T2I, POINT_EDIT]
    texts += [*SHAPES, *COLOURS, *BACKGROUNDS, *RADII, *NUMBERS, *PLURALS.values()]
    texts += [word for ways in RELATION_WORDS.values() for word in ways]
    texts += ["Make Change Add Put Turn Replace Remove Take the away put a an A An into size"]
    words = set(EXTRA_WORDS)
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
        merges=[tuple(merge) for merge in model["merges"]],
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
