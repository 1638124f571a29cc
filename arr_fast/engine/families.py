"""Family adapters: what differs between supported vision-language models, and nothing else.

An adapter knows where the decoder, its embeddings and norms live, how images become features, how
an image is written in token ids, and how positions run. The runner owns everything else.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from arr_fast.errors import UnsupportedModelError
from arr_fast.images import CanonicalImage
from arr_fast.prompts import TokenRun


@dataclass(frozen=True, slots=True)
class ImageFeatures:
    """One image after the vision tower.

    Attributes:
        embeds: [n, H], what replaces the image's placeholder embeddings.
        deepstack: [n, H] each; added to the hidden state after the first decoder layers.
        grid: (height, width) in features; (1, n) where the family has no grid.
    """

    embeds: Tensor
    deepstack: tuple[Tensor, ...]
    grid: tuple[int, int]

    @property
    def count(self) -> int:
        """Number of features."""
        return int(self.embeds.shape[0])

    @property
    def nbytes(self) -> int:
        """Bytes held by the tensors."""
        return sum(t.numel() * t.element_size() for t in (self.embeds, *self.deepstack))


class FamilyAdapter:
    """The interface; the base class is a Llama-shaped decoder with one position per token.

    Args:
        model: A transformers image-text-to-text model.
        tokenizer: Its tokenizer.
        image_processor: Its image processor.
    """

    position_rows = 1
    vision_attention: str | None = None

    def __init__(self, model: Any, tokenizer: Any, image_processor: Any) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.text_config = model.config.get_text_config()
        self.image_token_id = int(self._image_token_id())
        self.image_token: str = tokenizer.convert_ids_to_tokens(self.image_token_id)
        refuse_unsupported_text(model.config.model_type, self.text_config)

    def _image_token_id(self) -> int:
        return int(self.model.config.image_token_id)

    @property
    def decoder(self) -> Any:
        """The text model: embed_tokens, layers, norm, rotary_emb."""
        return self.model.model.language_model

    @property
    def head_dim(self) -> int:
        """Head dimension of the decoder."""
        config = self.text_config
        dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return int(dim)

    @property
    def layers(self) -> nn.ModuleList:
        """Decoder layers, first to last."""
        layers: nn.ModuleList = self.decoder.layers
        return layers

    def output_weight(self) -> Tensor:
        """[V, H], the output embedding."""
        head = self.model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise UnsupportedModelError(self.model.config.model_type, reason="lm_head has a bias")
        weight: Tensor = head.weight
        return weight

    def settings_hash(self) -> str:
        """Hash of the image processor's settings; part of every image cache key."""
        settings = json.dumps(self.image_processor.to_dict(), sort_keys=True, default=str)
        return hashlib.sha256(settings.encode()).hexdigest()

    def expand_image(self, features: int) -> list[tuple[list[int], bool]]:
        """Token runs that stand for one image: (ids, whether they hold the features)."""
        return [([self.image_token_id] * features, True)]

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [P, T]; each [1, T, D]."""
        cos, sin = self.decoder.rotary_emb(hidden, positions)
        return cos, sin

    def positions(self, runs: Sequence[TokenRun], grids: Sequence[tuple[int, int]]) -> np.ndarray:
        """Positions int64 [P, T] of a conversation; `grids` are the item's images in features."""
        total = sum(len(run.ids) for run in runs)
        return np.arange(total, dtype=np.int64)[None]

    def encode_images(self, images: Sequence[CanonicalImage]) -> list[ImageFeatures]:
        """Runs processor and vision tower on some images, in one call."""
        raise NotImplementedError

    def vision_tokens(self, image: CanonicalImage) -> int:
        """Estimate of vision patches of an image; used to size batches of images."""
        return 1024

    def _process(self, images: Sequence[CanonicalImage], **kwargs: Any) -> dict[str, Tensor]:
        pil = [image.to_pil() for image in images]
        return dict(self.image_processor(images=pil, return_tensors="pt", **kwargs))

    def _to_device(self, tensor: Tensor) -> Tensor:
        device = next(self.model.parameters()).device
        dtype = self.model.dtype if tensor.is_floating_point() else tensor.dtype
        return tensor.to(device=device, dtype=dtype)


class QwenVLAdapter(FamilyAdapter):
    """Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen3-VL-MoE: M-RoPE and variable-size images."""

    position_rows = 3
    vision_attention = "arr_fast_flash_varlen"

    @property
    def _merge(self) -> int:
        return int(self.model.config.vision_config.spatial_merge_size)

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin for positions [3, T]."""
        cos, sin = self.decoder.rotary_emb(hidden, positions.unsqueeze(1))
        if cos.ndim == 4:
            cos, sin = self._select_sections(cos), self._select_sections(sin)
        return cos, sin

    def _select_sections(self, table: Tensor) -> Tensor:
        """[3, 1, T, D] -> [1, T, D], each channel section from its axis (time, height, width)."""
        sections = list(self.text_config.rope_parameters["mrope_section"]) * 2
        pieces = torch.split(table, sections, dim=-1)
        return torch.cat([piece[i % 3] for i, piece in enumerate(pieces)], dim=-1)

    def positions(self, runs: Sequence[TokenRun], grids: Sequence[tuple[int, int]]) -> np.ndarray:
        """Text advances all three axes; an image spans its grid, then advances by its longer side.

        Source: `get_rope_index` of the transformers Qwen-VL models.
        """
        pieces = []
        start = 0
        for run in runs:
            if run.image < 0:
                count = len(run.ids)
                pieces.append(np.broadcast_to(np.arange(start, start + count), (3, count)))
                start += count
            else:
                height, width = grids[run.image]
                rows, columns = np.divmod(np.arange(height * width), width)
                pieces.append(np.stack([np.zeros_like(rows), rows, columns]) + start)
                start += max(height, width)
        return np.ascontiguousarray(np.concatenate(pieces, axis=1), dtype=np.int64)

    def encode_images(self, images: Sequence[CanonicalImage]) -> list[ImageFeatures]:
        """One vision forward over all images; attention stays inside each image."""
        batch = self._process(images)
        grid = batch["image_grid_thw"]
        output = self.model.model.get_image_features(
            self._to_device(batch["pixel_values"]), self._to_device(grid), return_dict=True
        )
        deepstack = list(getattr(output, "deepstack_features", None) or [])
        merged = [(int(h) // self._merge, int(w) // self._merge) for _, h, w in grid.tolist()]
        return [
            ImageFeatures(_owned(embeds), tuple(_owned(level[i]) for level in deepstack), merged[i])
            for i, embeds in enumerate(output.pooler_output)
        ]

    def vision_tokens(self, image: CanonicalImage) -> int:
        """Patches after the processor's own resizing."""
        height, width = image.pixels.shape[:2]
        return int(self.image_processor.get_number_of_image_patches(height, width))


class SmolVLMAdapter(FamilyAdapter):
    """SmolVLM and Idefics3, one global view per image (image splitting off)."""

    @property
    def decoder(self) -> Any:
        """The text model of the Idefics line."""
        return self.model.model.text_model

    def expand_image(self, features: int) -> list[tuple[list[int], bool]]:
        """`<fake_token_around_image><global-img>` features `<fake_token_around_image>`."""
        fake, view = (
            int(self.tokenizer.convert_tokens_to_ids(token))
            for token in ("<fake_token_around_image>", "<global-img>")
        )
        return [([fake, view], False), ([self.image_token_id] * features, True), ([fake], False)]

    def encode_images(self, images: Sequence[CanonicalImage]) -> list[ImageFeatures]:
        """Each image as one global view."""
        batch = self._process([*images], do_image_splitting=False)
        pixels = batch["pixel_values"].flatten(0, 1)[:, None]
        mask = batch["pixel_attention_mask"].flatten(0, 1)[:, None]
        output = self.model.model.get_image_features(
            self._to_device(pixels), self._to_device(mask), return_dict=True
        )
        return [ImageFeatures(_owned(e), (), (1, len(e))) for e in output.pooler_output]


class LlavaOnevisionAdapter(FamilyAdapter):
    """LLaVA-OneVision in its multi-image mode: the base view and one newline per image."""

    def encode_images(self, images: Sequence[CanonicalImage]) -> list[ImageFeatures]:
        """Each image as its base view, padded to a square.

        The model crops an image that stands alone into tiles; judged images are always treated as
        members of a multi-image conversation, so a lone image is encoded beside itself.
        """
        shown = [*images, *images] if len(images) == 1 else [*images]
        nested = [[image.to_pil() for image in shown]]
        batch = self.image_processor(images=nested, return_tensors="pt")
        output = self.model.model.get_image_features(
            self._to_device(batch["pixel_values"]),
            batch["image_sizes"],
            batch_num_images=torch.tensor([len(shown)]),
            return_dict=True,
        )
        found = output.pooler_output[: len(images)]
        return [ImageFeatures(_owned(e), (), (1, len(e))) for e in found]


def _owned(features: Tensor) -> Tensor:
    """Features in memory of their own: a view would keep those of its whole batch alive."""
    features = features.contiguous()
    is_view = features.untyped_storage().nbytes() > features.nbytes
    return features.clone() if is_view else features


FAMILIES: dict[str, type[FamilyAdapter]] = {
    "qwen2_vl": QwenVLAdapter,
    "qwen2_5_vl": QwenVLAdapter,
    "qwen3_vl": QwenVLAdapter,
    "qwen3_vl_moe": QwenVLAdapter,
    "smolvlm": SmolVLMAdapter,
    "idefics3": SmolVLMAdapter,
    "llava_onevision": LlavaOnevisionAdapter,
}


def adapter_for(model: Any, tokenizer: Any, image_processor: Any) -> FamilyAdapter:
    """The adapter of a loaded model.

    Raises:
        UnsupportedModelError: The model's type is not supported; lists what is.
    """
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise UnsupportedModelError(kind, FAMILIES)
    return FAMILIES[kind](model, tokenizer, image_processor)


def refuse_unsupported_text(kind: str, config: Any) -> None:
    """Refuses decoders whose attention the prefix tree does not express.

    Raises:
        UnsupportedModelError: Sliding-window or recurrent layers, or soft-capped logits.
    """
    layer_types = set(getattr(config, "layer_types", None) or ["full_attention"])
    odd = layer_types - {"full_attention"}
    if odd:
        reason = f"its text layers of type {', '.join(sorted(odd))} are not full attention"
        raise UnsupportedModelError(kind, FAMILIES, reason)
    for name in ("attn_logit_softcapping", "final_logit_softcapping"):
        if getattr(config, name, None):
            raise UnsupportedModelError(kind, FAMILIES, f"{name} is not expressible")
