"""Qwen2-VL's processor without its video half, for machines without torchvision.

transformers builds the whole processor or none, and its video half needs torchvision even where no
video is ever read. This one is the same for text with images.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor, AutoTokenizer, BatchFeature, Qwen2VLProcessor


class ImageOnlyQwenProcessor(Qwen2VLProcessor):
    """Tokenises text and prepares images; every image placeholder becomes as many as its patches.

    Args:
        image_processor: Of the Qwen2-VL family.
        tokenizer: With its `<|image_pad|>` token.
    """

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        # Not super().__init__: it insists on the video half.
        self.image_processor = image_processor
        self.tokenizer = tokenizer
        self.image_token = getattr(tokenizer, "image_token", None) or "<|image_pad|>"

    def __call__(
        self,
        images: Any = None,
        text: Any = None,
        *,
        padding: bool = True,
        return_tensors: str = "pt",
    ) -> BatchFeature:
        """Inputs of the model for texts and the images of their placeholders, in order.

        Raises:
            ValueError: The texts have another number of placeholders than there are images.
        """
        texts = [text] if isinstance(text, str) else list(text)
        features: dict[str, Any] = {}
        counts: list[int] = []
        if images is not None:
            features = dict(self.image_processor(images=images, return_tensors=return_tensors))
            patches = features["image_grid_thw"].prod(-1)
            counts = (patches // self.image_processor.merge_size**2).tolist()
        placeholders = sum(each.count(self.image_token) for each in texts)
        if placeholders != len(counts):
            raise ValueError(f"texts have {placeholders} image placeholders, images {len(counts)}")
        remaining = iter(counts)
        expanded = []
        for each in texts:
            first, *rest = each.split(self.image_token)
            parts = [first, *(self.image_token * next(remaining) + part for part in rest)]
            expanded.append("".join(parts))
        tokens = self.tokenizer(expanded, padding=padding, return_tensors=return_tensors)
        return BatchFeature({**tokens, **features})


def processor_components(model: str | Path, revision: str | None = None) -> dict[str, Any]:
    """What to pass to a pipeline's from_pretrained in place of its own processor.

    Returns:
        {} where torchvision is installed (the pipeline's own processor loads), else a processor.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return {}
    place = {"subfolder": "processor", "revision": revision}
    return {
        "processor": ImageOnlyQwenProcessor(
            AutoImageProcessor.from_pretrained(str(model), **place),
            AutoTokenizer.from_pretrained(str(model), **place),
        )
    }
