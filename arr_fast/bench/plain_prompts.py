"""Conversations as token ids for the baselines, without the engine.

The strings and the chat template are the judge's own (`arr_fast.prompts`); how an image is written
in ids, and how many, is worked out here a second time from the checkpoint's config and processor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from arr_fast.images import CanonicalImage
from arr_fast.prompts import PAIR_LABELS, Part, PromptEncoder, criterion_leaf, pair_parts


class PlainPrompts:
    """Encodes prompts for one checkpoint.

    Args:
        tokenizer: Its tokenizer.
        config: Its config.
        image_processor: Its image processor.
    """

    def __init__(self, tokenizer: Any, config: Any, image_processor: Any) -> None:
        self.tokenizer = tokenizer
        self.config = config
        self.image_processor = image_processor
        self._image_id = int(config.image_token_id)
        self.encoder = PromptEncoder(
            tokenizer,
            image_token=tokenizer.convert_ids_to_tokens(self._image_id),
            expand_image=self._expand,
        )

    def ids(self, parts: Sequence[Part], images: Sequence[CanonicalImage]) -> np.ndarray:
        """int64 [T], image placeholders expanded.

        Args:
            parts: A whole conversation, criterion included.
            images: The images of its slots.
        """
        counts = [self.features(image) for image in images]
        return np.concatenate([run.ids for run in self.encoder.encode(parts, counts)])

    def pair_ids(
        self, caption: str, images: Sequence[CanonicalImage], criteria: Sequence[str]
    ) -> list[np.ndarray]:
        """One sequence per criterion of a text-to-image pair, first-shown image first."""
        shared = pair_parts("t2i", caption)
        return [self.ids([*shared, criterion_leaf(text)], images) for text in criteria]

    def text_tokens(self, text: str) -> int:
        """Number of tokens of a text that stands alone between control tokens."""
        return len(self.encoder._encode_text(text))

    def label_ids(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Token variants of "1" and "2" after a pairwise prompt."""
        first, second = self.encoder.label_ids(
            PAIR_LABELS, parts=[*pair_parts("t2i", "x"), criterion_leaf("x")]
        )
        return first, second

    def features(self, image: CanonicalImage) -> int:
        """Number of features, that is of placeholder ids, of one image."""
        kind, vision = self.config.model_type, self.config.vision_config
        height, width = image.pixels.shape[:2]
        if kind.startswith("qwen"):
            patches = self.image_processor.get_number_of_image_patches(height, width)
            return int(patches) // int(vision.spatial_merge_size) ** 2
        per_side = int(vision.image_size) // int(vision.patch_size)
        if kind == "llava_onevision":
            return per_side**2 + 1
        return per_side**2 // int(self.config.scale_factor) ** 2

    def _expand(self, features: int) -> list[tuple[list[int], bool]]:
        body = ([self._image_id] * features, True)
        if self.config.model_type not in ("smolvlm", "idefics3"):
            return [body]
        around = self.tokenizer.convert_tokens_to_ids("<fake_token_around_image>")
        view = self.tokenizer.convert_tokens_to_ids("<global-img>")
        return [([around, view], False), body, ([around], False)]
