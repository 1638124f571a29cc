"""Conversations: what a judge reads, which part of it is shared, and which labels are read.

A conversation is one user turn (texts and image slots) plus the generation prompt, rendered by the
checkpoint's own chat template. The task, the caption and the images come first and the criterion
last, so that all criteria of a pair share one long prefix.

User text can never become a control token. The template is rendered once with private-use
sentinels in place of every text; the rendering is split at the control tokens that the template
itself wrote; only then are captions and criteria put in, and each run of text between two control
tokens is encoded alone by a tokenizer that knows no added token at all.
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

from arr_fast.errors import UnsupportedModelError

TEMPLATE_VERSION = 1

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


def pair_parts(task: Task, caption: str) -> list[Part]:
    """The shared part of a pairwise conversation; images are numbered in order of appearance."""
    if task == "t2i":
        head = f"{PAIR_T2I}\nCaption: {caption}\nImage 1: "
        return [head, ImageSlot(0), "\nImage 2: ", ImageSlot(1)]
    head = f"{PAIR_EDIT}\nInstruction: {caption}\nSource image: "
    return [head, ImageSlot(0), "\nImage 1: ", ImageSlot(1), "\nImage 2: ", ImageSlot(2)]


def point_parts(task: Task, caption: str) -> list[Part]:
    """The shared part of a pointwise conversation; images are numbered in order of appearance."""
    if task == "t2i":
        return [f"{POINT_T2I}\nCaption: {caption}\nImage: ", ImageSlot(0)]
    head = f"{POINT_EDIT}\nInstruction: {caption}\nSource image: "
    return [head, ImageSlot(0), "\nImage: ", ImageSlot(1)]


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
        merged = _merge_texts(parts)
        runs, tail = self._runs(self._skeleton(merged), merged, image_features)
        return [*runs, TokenRun(_frozen(tail))] if tail else runs

    def encode_leaves(
        self, parts: Sequence[Part], leaves: Sequence[str], image_features: Sequence[int]
    ) -> tuple[list[TokenRun], list[np.ndarray]]:
        """Encodes conversations that differ only in the text after their last image.

        Args:
            parts: The shared part; it ends with an image slot.
            leaves: The text that each conversation adds.
            image_features: Number of features of each image of the item.

        Returns:
            (runs up to the last image's features, int64 ids of the rest of each conversation).
        """
        if not isinstance(parts[-1], ImageSlot):
            raise ValueError("the shared part must end with an image slot")
        shared = _merge_texts([*parts, ""])
        pieces = self._skeleton(shared)
        last_image = max(i for i, piece in enumerate(pieces) if piece == self.image_token)
        runs, after = self._runs(pieces[: last_image + 1], shared, image_features)
        texts = [p for p in shared if isinstance(p, str)]
        tails = []
        for leaf in leaves:
            tail = [*after]
            for piece in pieces[last_image + 1 :]:
                tail += self._piece_ids(piece, [*texts[:-1], leaf])
            tails.append(_frozen(tail))
        return runs, tails

    def _runs(
        self, pieces: Sequence[str], parts: Sequence[Part], image_features: Sequence[int]
    ) -> tuple[list[TokenRun], list[int]]:
        """Runs of the pieces, and the ids after the last image."""
        slots = iter([p for p in parts if isinstance(p, ImageSlot)])
        texts = [p for p in parts if isinstance(p, str)]
        runs: list[TokenRun] = []
        pending: list[int] = []
        for piece in pieces:
            if piece != self.image_token:
                pending += self._piece_ids(piece, texts)
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

    def _piece_ids(self, piece: str, texts: Sequence[str]) -> Sequence[int]:
        if piece in self._added:
            return (self._added[piece],)
        return self._encode_text(_fill(piece, texts))

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
        merged = _merge_texts(parts)
        pieces = self._skeleton(merged)
        texts = [p for p in merged if isinstance(p, str)]
        last = pieces[-1]
        tail = "" if last in self._added else _fill(last, texts)
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

    def _skeleton(self, parts: Sequence[Part]) -> list[str]:
        """The rendered template as control tokens and text pieces that still hold sentinels."""
        shape = "".join("t" if isinstance(p, str) else "i" for p in parts)
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


def _merge_texts(parts: Sequence[Part]) -> list[Part]:
    """Joins neighbouring texts, so that a run of text is encoded as one."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        else:
            merged.append(part)
    return merged


_SENTINEL = re.compile("\ue000([0-9]+)\ue001")


def _sentinel(number: int) -> str:
    return f"\ue000{number}\ue001"


def _fill(piece: str, texts: Sequence[str]) -> str:
    return _SENTINEL.sub(lambda match: texts[int(match.group(1))], piece)


def _frozen(ids: Sequence[int]) -> np.ndarray:
    array = np.asarray(ids, dtype=np.int64)
    array.flags.writeable = False
    return array
