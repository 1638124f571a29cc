"""Tokenizers of the random checkpoints: a small byte-level BPE under each family's control tokens.

The BPE is trained on the spot from the corpus below, so it needs no network and never changes.
Every character is covered by the byte alphabet; "1", "2", "Yes" and "No" are single tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer

# The split pattern of the Qwen tokenizers (transformers, models/qwen2/tokenization_qwen2.py).
_QWEN_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

_QWEN_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
_QWEN_PLAIN = ("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>")
_THINK = ("<think>", "</think>")
_SMOLVLM_SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<fake_token_around_image>",
    "<image>",
    "<global-img>",
    "<row_1_col_1>",
    "<end_of_utterance>",
)
_LLAVA_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<image>", "<video>")

_IMAGE_OF = {
    "chatml": "<|vision_start|><|image_pad|><|vision_end|>",
    "llava": "<image>",
    "smolvlm": "<image>",
}

_CHATML = """\
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\\n' -}}
{%- if message.content is string -%}{{- message.content -}}
{%- else -%}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- 'IMAGE' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

_USER_COLON = """\
{{- '<|im_start|>' -}}
{%- for message in messages -%}
{{- message.role | capitalize -}}
{%- if message.content is string -%}{{- ': ' + message.content -}}
{%- else -%}
{{- ':' if message.content[0].type == 'image' else ': ' -}}
{%- for part in message.content -%}
{%- if part.type == 'image' -%}{{- 'IMAGE' -}}
{%- elif part.type == 'text' -%}{{- part.text -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '<end_of_utterance>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant:' -}}{%- endif -%}
"""

_SENTENCES = (
    "Compare two images made from a caption by the criterion given last, and by nothing else.",
    "Answer 1 if Image 1 is better, 2 if Image 2 is better. Answer Yes if the image meets it,",
    "No if not. Check an edit of a source image against the criterion given last.",
    "Compare two edits of a source image. Instruction: Source image: Caption: Criterion:",
    "Criteria: Image 1: Image 2: system user assistant User Assistant You are a helpful assistant.",
    "The objects named in the caption are all present and none is missing from the picture.",
    "Colours match what the caption asks for, with no tint that spills over to other objects.",
    "The number of people, animals and things is exactly what the text says.",
    "Spatial relations such as left of, right of, above, below, behind and in front are correct.",
    "Faces and hands look natural, without extra fingers, broken limbs or twisted joints.",
    "Light and shadow are consistent; the sun, the lamp and the window agree with each other.",
    "The composition is balanced and the main subject stands out from the background.",
    "Written words in the image can be read and are spelled as the caption requires.",
    "The style, medium and mood follow the request: photo, painting, sketch, poster or cartoon.",
    "There is no blur, noise, watermark, border, banding or other artefact of generation.",
    "The edited region changes as instructed while everything else stays as it was.",
    "The identity of the person or object is kept and the geometry of the scene is preserved.",
    "Materials and textures such as wood, glass, metal, cloth and skin look real and detailed.",
    "A red cube on a green table next to a small blue sphere and a large yellow cone.",
    "A quiet street in the rain at night with bright signs and a black cat under an umbrella.",
    "An old sailor mends a net in the harbour while two children watch the white boats.",
    "Three birds fly over the mountain lake at sunrise; a wooden house stands on the shore.",
    "A plate with bread, cheese, grapes and a glass of water on a checked cloth.",
    "Is the picture sharp, pleasant, plausible and free of visible errors? Yes or No.",
    "Which image would a careful person prefer, and how certain is that choice? 1 or 2.",
    '{"theme": "text alignment", "tip": "count every object", "rank": [1, 2], "better": "Image 1"}',
    "It is better when more of the request is satisfied and worse when something is invented.",
    "The sky, the ground, the water and the trees keep their usual size, shape and position.",
    "Do not judge length, order, file name or format; judge only what can be seen.",
    "0 1 2 3 4 5 6 7 8 9 10 20 100 first second third one two three four five six seven eight",
)


# Plain words of the corpus, for prompts of exact length.
WORDS = tuple(
    sorted(
        {word for line in _SENTENCES for word in line.split() if word.isalpha() and word.islower()}
    )
)


def chat_template(family: str) -> str:
    """The family's public turn format, as jinja, with image parts in the order of the content."""
    if family in ("smolvlm", "idefics3"):
        return _USER_COLON.replace("IMAGE", _IMAGE_OF["smolvlm"])
    kind = "llava" if family == "llava_onevision" else "chatml"
    return _CHATML.replace("IMAGE", _IMAGE_OF[kind])


def build_tokenizer(family: str, merges: int) -> Any:
    """Trains the tokenizer of one family.

    Args:
        family: A family of `random_models.FAMILIES`.
        merges: Vocabulary size to aim for, before control tokens; the corpus yields about 1,100.

    Returns:
        A transformers fast tokenizer of the class that AutoTokenizer loads for the family, with
        its control tokens (special, and for the Qwens also not special) and chat template.
    """
    import transformers

    core = _train(family, merges)
    special: tuple[str, ...] = _QWEN_SPECIAL
    plain: tuple[str, ...] = _QWEN_PLAIN
    if family in ("smolvlm", "idefics3"):
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_object=core,
            bos_token="<|im_start|>",
            eos_token="<end_of_utterance>",
            unk_token="<|endoftext|>",
            pad_token="<|im_end|>",
        )
        special, plain = _SMOLVLM_SPECIAL, ()
    else:
        import json

        model = json.loads(core.to_str())["model"]
        merge_list: Any = [tuple(pair) for pair in model["merges"]]
        tokenizer = transformers.Qwen2Tokenizer(vocab=model["vocab"], merges=merge_list)
        if family == "llava_onevision":
            special, plain = _LLAVA_SPECIAL, ()
        elif family.startswith("qwen3"):
            plain = _QWEN_PLAIN + _THINK
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in special])
    tokenizer.add_tokens([AddedToken(t, special=False, normalized=False) for t in plain])
    if family not in ("smolvlm", "idefics3"):
        tokenizer.eos_token = "<|im_end|>"
    tokenizer.chat_template = chat_template(family)
    return tokenizer


def save_tokenizer(tokenizer: Any, directory: Path) -> None:
    """Writes tokenizer.json, tokenizer_config.json and the chat template file."""
    tokenizer.save_pretrained(directory)


def _train(family: str, merges: int) -> Tokenizer:
    core = Tokenizer(models.BPE())
    if family in ("smolvlm", "idefics3"):
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
    else:
        core.normalizer = normalizers.NFC()
        core.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_QWEN_SPLIT), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
    core.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=merges,
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    # Words that must end up whole, also at the start of a run, are repeated on lines of their own.
    whole = "Yes\nNo\nassistant\nAssistant\nuser\nUser\nsystem\nCriterion\nCaption\nImage"
    lines = [*_SENTENCES, *[whole] * 8]
    core.train_from_iterator(lines, trainer)
    return core
