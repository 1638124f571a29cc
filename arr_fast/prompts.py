"""Conversations: what a judge reads, which part of it is shared, and which labels are read.

A conversation is one user turn (texts and image slots) plus the generation prompt, rendered by the
checkpoint's own chat template. The task, the images and the caption come first and the criterion
last, so that all criteria of a pair share one long prefix. The caption follows the images because a
causal model's tokens see only what comes before them: so every word of it can look for what it
names in the pictures.

User text can never become a control token. The template is rendered once with private-use
sentinels in place of every text; the rendering is split at the control tokens that the template
itself wrote; only then are captions and criteria put in, and each text is encoded alone by a
tokenizer that knows no added token at all. So a criterion's ids do not depend on its caption.
"""

from __future__ import annotations

import json
import re
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from tokenizers import Tokenizer

from arr_fast.errors import BadPromptError, UnsupportedModelError

TEMPLATE_VERSION = 2

# Ids of short texts are kept: criteria and captions return. An ASCII text and its ids hold 2 KiB at
# most, so all hold 32 MiB; encoding a long text costs little beside its forward.
_CACHED_TEXTS = 16384
_CACHED_CHARACTERS = 1024

PAIR_T2I = (
    "Compare two images made from a caption by the criterion given last, and by nothing else. "
    "Answer 1 if Image 1 is better, 2 if Image 2 is better."
)
PAIR_EDIT = (
    "Compare two edits of a source image by the criterion given last, and by nothing else. "
    "Answer 1 if Image 1 is better, 2 if Image 2 is better."
)
POINT_T2I = (
    "Check an image made from a caption against the criterion given last, and nothing else. "
    "Answer Yes if the image meets it, No if not."
)
POINT_EDIT = (
    "Check an edit of a source image against the criterion given last, and nothing else. "
    "Answer Yes if the edited image meets it, No if not."
)

PAIR_LABELS: tuple[tuple[str, ...], tuple[str, ...]] = (("1",), ("2",))
POINT_LABELS: tuple[tuple[str, ...], tuple[str, ...]] = (("Yes",), ("No",))

Task = Literal["t2i", "edit"]


@dataclass(frozen=True, slots=True)
class ImageSlot:
    """A place for image number `index` of the item (source, first, second: in that order)."""

    index: int


Part = str | ImageSlot
# Neighbouring texts, or an image slot.
Group = tuple[str, ...] | ImageSlot
# Stands for the leaf while the shared part is encoded.
_LEAF = "\ue002"


@dataclass(frozen=True, slots=True)
class TokenRun:
    """A maximal piece of an encoded conversation: some text ids, or the features of one image.

    Attributes:
        ids: int64 [n]; read-only.
        image: Index of the image in the item, or -1 for text. A run of an image holds exactly one
            id per image feature.
    """

    ids: np.ndarray
    image: int = -1


def check_text(text: str, name: str) -> None:
    """Raises a BadPromptError for text that is not Unicode: tokenizers take no lone surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        where = f"{text[error.start]!r} at character {error.start}"
        raise BadPromptError(f"{name} holds a lone surrogate: {where}") from None


def pair_parts(task: Task, caption: str) -> list[Part]:
    """The shared part of a pairwise conversation; images are numbered in order of appearance."""
    if task == "t2i":
        head, tail = f"{PAIR_T2I}\nImage 1: ", f"\nCaption: {caption}"
        return [head, ImageSlot(0), "\nImage 2: ", ImageSlot(1), tail]
    head, tail = f"{PAIR_EDIT}\nSource image: ", f"\nInstruction: {caption}"
    return [head, ImageSlot(0), "\nImage 1: ", ImageSlot(1), "\nImage 2: ", ImageSlot(2), tail]


def point_parts(task: Task, caption: str) -> list[Part]:
    """The shared part of a pointwise conversation; images are numbered in order of appearance."""
    if task == "t2i":
        return [f"{POINT_T2I}\nImage: ", ImageSlot(0), f"\nCaption: {caption}"]
    head, tail = f"{POINT_EDIT}\nSource image: ", f"\nInstruction: {caption}"
    return [head, ImageSlot(0), "\nImage: ", ImageSlot(1), tail]


def criterion_leaf(text: str) -> str:
    """What one criterion adds to the shared part."""
    return f"\nCriterion: {text}"


def holistic_leaf(texts: Sequence[str]) -> str:
    """The whole rubric as one leaf."""
    lines = "".join(f"\n{i}. {text}" for i, text in enumerate(texts, 1))
    return f"\nCriteria:{lines}"


def plain_backend(tokenizer: Any) -> Tokenizer:
    """A copy of a fast tokenizer's backend that knows no added token and adds none.

    Args:
        tokenizer: A transformers fast tokenizer.

    Returns:
        A `tokenizers.Tokenizer`; what it encodes is text, whatever the text says.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UnsupportedModelError(
            f"{type(tokenizer).__name__} has no tokenizers backend; a fast tokenizer is needed"
        )
    spec = json.loads(backend.to_str())
    added = {token["content"] for token in spec["added_tokens"]}
    spec["added_tokens"] = []
    spec["post_processor"] = None
    spec["truncation"] = spec["padding"] = None
    vocab = spec["model"].get("vocab")
    if isinstance(vocab, dict):
        for content in added & vocab.keys():
            del vocab[content]
    return Tokenizer.from_str(json.dumps(spec))


class PromptEncoder:
    """Turns conversations into token runs under one checkpoint's template and tokenizer.

    Args:
        tokenizer: The checkpoint's fast tokenizer, with a chat template.
        image_token: The string that the template writes once for an image.
        expand_image: Maps a number of image features to the token runs that stand for the image:
            pairs (ids, holds_features); the one run that holds features has exactly that many ids.
        chat_template: A template to use in place of the tokenizer's own.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_token: str,
        expand_image: Callable[[int], list[tuple[list[int], bool]]],
        chat_template: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.image_token = image_token
        self._expand_image = expand_image
        self._chat_template = chat_template
        self._plain = plain_backend(tokenizer)
        self._added: dict[str, int] = dict(tokenizer.get_added_vocab())
        if image_token not in self._added:
            raise UnsupportedModelError(f"image token {image_token!r} is not an added token")
        by_length = sorted(self._added, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(re.escape(t) for t in by_length) + ")")
        self._rendered = lru_cache(maxsize=256)(self._render)
        self._encode_short = lru_cache(maxsize=_CACHED_TEXTS)(self._encode_uncached)

    def encode(self, parts: Sequence[Part], image_features: Sequence[int]) -> list[TokenRun]:
        """Encodes one user turn and the generation prompt.

        Args:
            parts: Texts and image slots of the user turn.
            image_features: Number of features of each image of the item.

        Returns:
            The token runs of the whole conversation, in order.
        """
        groups = _group_texts(parts)
        runs, tail = self._runs(self._skeleton(groups), groups, image_features)
        return [*runs, TokenRun(_frozen(tail))] if tail else runs

    def encode_leaves(
        self, parts: Sequence[Part], leaves: Sequence[str], image_features: Sequence[int]
    ) -> tuple[list[TokenRun], list[np.ndarray]]:
        """Encodes conversations that differ only in a last text.

        Args:
            parts: The shared part; at least one image slot.
            leaves: The text that each conversation adds.
            image_features: Number of features of each image of the item.

        Returns:
            (runs of the shared part, int64 ids of the rest of each conversation).
        """
        if not any(isinstance(part, ImageSlot) for part in parts):
            raise ValueError("the shared part needs an image slot")
        groups = _group_texts([*parts, _LEAF])
        pieces = self._skeleton(groups)
        last_image = max(i for i, piece in enumerate(pieces) if piece == self.image_token)
        runs, shared = self._runs(pieces[: last_image + 1], groups, image_features)
        texts = [group for group in groups if isinstance(group, tuple)]
        chunks = [c for piece in pieces[last_image + 1 :] for c in self._chunks(piece, texts)]
        # A caption may hold the mark as well; the leaf comes after every caption.
        at = max(i for i, c in enumerate(chunks) if isinstance(c, str) and _LEAF in c)
        for chunk in chunks[:at]:
            shared += self._chunk_ids(chunk)
        if shared:
            runs.append(TokenRun(_frozen(shared)))
        before, after = str(chunks[at]).split(_LEAF)
        end = [token for chunk in chunks[at + 1 :] for token in self._chunk_ids(chunk)]
        tails = [_frozen([*self._encode_text(before + leaf + after), *end]) for leaf in leaves]
        return runs, tails

    def _runs(
        self, pieces: Sequence[str], groups: Sequence[Group], image_features: Sequence[int]
    ) -> tuple[list[TokenRun], list[int]]:
        """Runs of the pieces, and the ids after the last image."""
        slots = iter([group for group in groups if isinstance(group, ImageSlot)])
        texts = [group for group in groups if isinstance(group, tuple)]
        runs: list[TokenRun] = []
        pending: list[int] = []
        for piece in pieces:
            if piece != self.image_token:
                for chunk in self._chunks(piece, texts):
                    pending += self._chunk_ids(chunk)
                continue
            slot = next(slots)
            for ids, holds_features in self._expand_image(image_features[slot.index]):
                if not holds_features:
                    pending += ids
                    continue
                if pending:
                    runs.append(TokenRun(_frozen(pending)))
                    pending = []
                runs.append(TokenRun(_frozen(ids), slot.index))
        return runs, pending

    def _chunks(self, piece: str, texts: Sequence[tuple[str, ...]]) -> list[str | int]:
        """A piece of the template as control ids and texts that are each encoded alone."""
        if piece in self._added:
            return [self._added[piece]]
        literal, *rest = _SENTINEL.split(piece)
        chunks = [literal]
        for number, following in zip(rest[::2], rest[1::2], strict=True):
            first, *others = texts[int(number)]
            chunks[-1] += first
            chunks += others
            chunks[-1] += following
        return [chunk for chunk in chunks if chunk]

    def _chunk_ids(self, chunk: str | int) -> Sequence[int]:
        return (chunk,) if isinstance(chunk, int) else self._encode_text(chunk)

    def label_ids(
        self, labels: Sequence[Sequence[str]], *, parts: Sequence[Part]
    ) -> tuple[tuple[int, ...], ...]:
        """Token ids of each label's variants, as they follow the actual prompt.

        Args:
            labels: For each label its variants.
            parts: A conversation after which the labels are read.

        Raises:
            UnsupportedModelError: A variant is not exactly one token after the prompt, or two
                labels share a token.
        """
        groups = _group_texts(parts)
        texts = [group for group in groups if isinstance(group, tuple)]
        last = self._chunks(self._skeleton(groups)[-1], texts)[-1]
        tail = last if isinstance(last, str) else ""
        before = self._encode_text(tail)
        found: list[tuple[int, ...]] = []
        for variants in labels:
            ids: list[int] = []
            for variant in variants:
                after = self._encode_text(tail + variant)
                if len(after) != len(before) + 1 or after[:-1] != before:
                    extra = after[len(before) :] if after[: len(before)] == before else after
                    raise UnsupportedModelError(
                        f"label {variant!r} must be one token after the prompt; "
                        f"this tokenizer makes it {len(extra)}: {list(extra)}"
                    )
                ids.append(after[-1])
            found.append(tuple(dict.fromkeys(ids)))
        seen: dict[int, int] = {}
        for number, tokens in enumerate(found):
            for token in tokens:
                if seen.setdefault(token, number) != number:
                    raise UnsupportedModelError(
                        f"labels {labels[seen[token]]} and {labels[number]} share token {token}"
                    )
        return tuple(found)

    def _encode_text(self, text: str) -> Sequence[int]:
        encode = self._encode_short if len(text) <= _CACHED_CHARACTERS else self._encode_uncached
        return encode(text)

    def _encode_uncached(self, text: str) -> Sequence[int]:
        return array("i", self._plain.encode(text, add_special_tokens=False).ids)

    def _skeleton(self, groups: Sequence[Group]) -> list[str]:
        """The rendered template as control tokens and text pieces that still hold sentinels."""
        shape = "".join("t" if isinstance(group, tuple) else "i" for group in groups)
        return self._rendered(shape)

    def _render(self, shape: str) -> list[str]:
        content: list[dict[str, str]] = []
        for kind in shape:
            if kind == "t":
                number = sum(c["type"] == "text" for c in content)
                content.append({"type": "text", "text": _sentinel(number)})
            else:
                content.append({"type": "image"})
        rendered = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            add_generation_prompt=True,
            tokenize=False,
            enable_thinking=False,
            **({"chat_template": self._chat_template} if self._chat_template else {}),
        )
        rendered = self._close_thinking(rendered)
        order = [int(n) for n in _SENTINEL.findall(rendered)]
        if order != list(range(shape.count("t"))):
            raise UnsupportedModelError(
                "the chat template drops, repeats or reorders the texts of a user turn"
            )
        if rendered.count(self.image_token) != shape.count("i"):
            raise UnsupportedModelError(
                f"the chat template writes {rendered.count(self.image_token)} image tokens "
                f"for {shape.count('i')} images"
            )
        return [piece for piece in self._control.split(rendered) if piece]

    def _close_thinking(self, rendered: str) -> str:
        """Closes a reasoning block that the template leaves open before the readout."""
        opened = rendered.rfind("<think>")
        if opened < 0 or "</think>" in rendered[opened:]:
            return rendered
        if "</think>" not in self._added:
            raise UnsupportedModelError(
                "the chat template opens <think> before the answer and the tokenizer has no "
                "</think> token to close it"
            )
        return rendered.rstrip("\n") + "\n\n</think>\n\n"


def _group_texts(parts: Sequence[Part]) -> list[Group]:
    """Joins neighbouring texts: one text of the template, each member encoded alone."""
    groups: list[Group] = []
    for part in parts:
        if isinstance(part, ImageSlot):
            groups.append(part)
        elif groups and isinstance(groups[-1], tuple):
            groups[-1] = (*groups[-1], part)
        else:
            groups.append((part,))
    return groups


_SENTINEL = re.compile("\ue000([0-9]+)\ue001")


def _sentinel(number: int) -> str:
    return f"\ue000{number}\ue001"


def _frozen(ids: Sequence[int]) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64)
    array.flags.writeable = False
    return array
