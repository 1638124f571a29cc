"""Differentiable forwards for training, over the modules of a transformers Qwen3-VL model.

Every picture has the same size here, so the vision tower runs as one dense batch; the decoder is
transformers' own layers under branch attention. Tests hold both equal to plain forwards.

Letters: N pictures, P = 64 patches, M = 16 merged tokens, B packed rows of T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb_vision
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
)

from arr_fast.shapes.branch_attention import NAME, Group
from arr_fast.shapes.model import IMAGE_TOKENS, MERGE, PATCH, SIDE


@dataclass(frozen=True, slots=True)
class VisionFeatures:
    """What the tower gives the decoder.

    Attributes:
        merged: [N, M, hidden] image tokens.
        deepstack: One [N, M, hidden] per deepstack layer.
    """

    merged: Tensor
    deepstack: tuple[Tensor, ...]


def patchify(images: Sequence[Image.Image]) -> Tensor:
    """What the checkpoint's image processor makes of pictures, as [N, P, patch values].

    Pictures of another size are scaled to 64 x 64 as the processor does (bicubic, anti-aliased).
    """
    arrays = []
    for image in images:
        if image.size != (SIDE, SIDE):
            image = image.resize((SIDE, SIDE), Image.Resampling.BICUBIC)
        arrays.append(np.asarray(image, dtype=np.uint8))
    pixels = np.stack(arrays).astype(np.float32) * np.float32(1 / 127.5) - np.float32(1)
    count, blocks = len(arrays), SIDE // PATCH // MERGE
    grid = pixels.reshape(count, blocks, MERGE, PATCH, blocks, MERGE, PATCH, 3)
    patches = grid.transpose(0, 1, 4, 2, 5, 7, 3, 6)[:, :, :, :, :, :, None]
    twice = np.broadcast_to(patches, (*patches.shape[:6], 2, PATCH, PATCH))
    return torch.from_numpy(twice.reshape(count, (SIDE // PATCH) ** 2, -1).copy())


class VisionForward:
    """The vision tower as a dense batch over equal pictures; holds only constant tables."""

    def __init__(self, model: Qwen3VLForConditionalGeneration) -> None:
        visual = model.model.visual
        grid = torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]])
        self.visual = visual
        indices, weights = get_vision_interpolation_indices_and_weights(
            grid,
            num_grid_per_side=visual.num_grid_per_side,
            mode=visual.interpolation_mode,
            align_corners=visual.interpolation_align_corners,
            spatial_merge_size=MERGE,
            kwargs={},
        )
        nearest = weights.argmax(1)
        self._rows = indices.gather(1, nearest[:, None])[:, 0]
        positions = get_vision_position_ids(grid, MERGE, kwargs={})
        self._cos, self._sin = visual.rotary_pos_emb(torch.zeros(1), positions)

    def __call__(self, patches_NPV: Tensor, deepstack: bool = True) -> VisionFeatures:
        """Patches [N, P, values] to image tokens; deepstack can be left out where unused."""
        visual = self.visual
        count, places = patches_NPV.shape[:2]
        proj = visual.patch_embed.proj
        hidden = F.linear(patches_NPV, proj.weight.flatten(1), proj.bias)
        hidden = hidden + visual.pos_embed.weight[self._rows]
        levels = []
        for number, block in enumerate(visual.blocks):
            hidden = hidden + self._attend(block.attn, block.norm1(hidden))
            hidden = hidden + block.mlp(block.norm2(hidden))
            if deepstack and number in visual.deepstack_visual_indexes:
                index = visual.deepstack_visual_indexes.index(number)
                merger = visual.deepstack_merger_list[index]
                levels.append(merger(hidden.flatten(0, 1)).view(count, IMAGE_TOKENS, -1))
        merged = visual.merger(hidden.reshape(count * places, -1))
        return VisionFeatures(merged.view(count, IMAGE_TOKENS, -1), tuple(levels))

    def _attend(self, attn: torch.nn.Module, hidden: Tensor) -> Tensor:
        count, places, width = hidden.shape
        heads: int = attn.num_heads  # type: ignore[assignment]
        q, k, v = attn.qkv(hidden).view(count, places, 3, heads, -1).unbind(2)  # type: ignore[operator]
        q, k = apply_rotary_pos_emb_vision(q, k, self._cos, self._sin)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        return attn.proj(out.transpose(1, 2).reshape(count, places, width))  # type: ignore[operator,no-any-return]


@dataclass(frozen=True, slots=True)
class DecoderStates:
    """Hidden states of packed rows.

    Attributes:
        early: [B, T, hidden] after layer `early_layer`, before any norm.
        probe: [B, T, hidden] after layer `probe_layer`, before any norm.
        final: [B, T, hidden] after the final norm.
    """

    early: Tensor
    probe: Tensor
    final: Tensor


def decode(
    model: Qwen3VLForConditionalGeneration,
    ids_BT: Tensor,
    positions_3BT: Tensor,
    groups: Sequence[Group],
    feature_BT: Tensor,
    features: VisionFeatures,
    early_layer: int,
    probe_layer: int,
) -> DecoderStates:
    """Transformers' decoder layers over packed branches.

    Args:
        model: The judge.
        ids_BT: Token ids.
        positions_3BT: M-RoPE positions.
        groups: Who attends to whom.
        feature_BT: Row of the flat image features for image tokens, -1 for text.
        features: What the vision tower gave.
        early_layer: After how many layers `DecoderStates.early` is taken.
        probe_layer: After how many layers `DecoderStates.probe` is taken.
    """
    text = model.model.language_model
    text.config._attn_implementation = NAME
    is_image = (feature_BT >= 0)[..., None]
    rows = feature_BT.clamp(min=0)
    hidden = torch.where(is_image, features.merged.flatten(0, 1)[rows], text.embed_tokens(ids_BT))
    positions = text.rotary_emb(hidden, positions_3BT)
    early = probe = hidden
    for number, layer in enumerate(text.layers):
        hidden = layer(hidden, position_embeddings=positions, groups=groups)
        if number < len(features.deepstack):
            hidden = hidden + features.deepstack[number].flatten(0, 1)[rows] * is_image
        if number + 1 == early_layer:
            early = hidden
        if number + 1 == probe_layer:
            probe = hidden
    return DecoderStates(early, probe, text.norm(hidden))
