"""The bundled judge's architecture: a small Qwen3-VL in the standard checkpoint format."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    Qwen2VLImageProcessorPil,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

SIDE = 64
PATCH = 8
MERGE = 2
IMAGE_TOKENS = (SIDE // PATCH // MERGE) ** 2
VOCABULARY_ROWS = 2048
MATCHING_SCALE = 0.28
MATCHING_SHARPNESS = 1.25


def build_config(tokenizer: Any) -> Qwen3VLConfig:
    """The config that goes with a tokenizer; rows beyond its tokens are spare.

    Args:
        tokenizer: The tokenizer of `arr_fast.shapes.tokenizer`.
    """
    ids = tokenizer.get_added_vocab()
    return Qwen3VLConfig(
        text_config={
            "vocab_size": VOCABULARY_ROWS,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1000000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": None,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 192,
            "intermediate_size": 384,
            "num_heads": 3,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "num_position_embeddings": (SIDE // PATCH) ** 2,
            "deepstack_visual_indexes": [1, 2],
        },
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )


def build_model(tokenizer: Any, seed: int) -> Qwen3VLForConditionalGeneration:
    """A freshly initialised model.

    Word embeddings start with unit norm, so that sums of a few of them are what the vision tower
    can be taught to emit; deepstack starts at zero and is learned with the verdicts.
    """
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(build_config(tokenizer))
    model.config.get_text_config()._attn_implementation = "sdpa"
    _start_by_matching(model, seed)
    with torch.no_grad():
        table: Any = model.get_input_embeddings().weight
        table.copy_(torch.nn.functional.normalize(torch.randn_like(table), dim=-1))
        model.model.visual.pos_embed.weight.copy_(grid_waves(SIDE // PATCH, 192))
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
    return model


def grid_waves(side: int, width: int) -> torch.Tensor:
    """Sines and cosines of row and column, [side * side, width]: a patch knows its place at once.

    Args:
        side: Patches per side.
        width: Hidden size, a multiple of 4.
    """
    periods = 2 * side * 0.9 ** torch.arange(width // 4)
    angles = 2 * torch.pi * torch.arange(side)[:, None] / periods
    waves = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows, columns = waves.repeat_interleave(side, 0), waves.repeat(side, 1)
    return torch.cat([rows, columns], dim=1)


def picture_space(hidden: int, seed: int) -> torch.Tensor:
    """A rotation [hidden, hidden]: image tokens hold rotated words, text holds plain ones."""
    generator = torch.Generator().manual_seed(seed + 5)
    rotation: torch.Tensor = torch.linalg.qr(torch.randn(hidden, hidden, generator=generator))[0]
    return rotation


def turn_pictures(model: Qwen3VLForConditionalGeneration, seed: int) -> None:
    """Rotates what the vision tower emits into the picture space; done once, after stage 1.

    A word of a criterion would otherwise attend first of all to itself and to the same word in the
    caption, and hardly to image tokens, in which it is one of ten.
    """
    output = model.model.visual.merger.linear_fc2
    turn = picture_space(output.out_features, seed)
    with torch.no_grad():
        output.weight.copy_(turn @ output.weight)
        output.bias.copy_(turn @ output.bias)


def _start_by_matching(model: Qwen3VLForConditionalGeneration, seed: int) -> None:
    """Lets attention begin as a search for like content, and its output as a copy of it.

    Queries and keys of a head share one random projection, values and output another (mimetic
    initialisation, arXiv 2305.09828). The first key/value head offers image tokens to text, and
    turns their words into plain ones; the second one offers text to image tokens and to text.
    """
    text: Any = model.config.get_text_config()
    hidden, size = text.hidden_size, text.head_dim
    generator = torch.Generator().manual_seed(seed)
    back = picture_space(hidden, seed).T

    def projections() -> torch.Tensor:
        square = torch.randn(hidden, 2 * size, generator=generator)
        basis: torch.Tensor = torch.linalg.qr(square)[0].T
        return basis.reshape(2, size, hidden) * MATCHING_SCALE

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator) * 0.01

    with torch.no_grad():
        for layer in model.model.language_model.layers:
            attention = layer.self_attn
            match, copy = projections(), projections()
            key = torch.cat([match[0] @ back, match[1]])
            query = torch.cat([match[0], match[0], match[1] @ back, match[1]])
            attention.k_proj.weight.copy_(key + noise(*key.shape))
            attention.q_proj.weight.copy_(query + noise(*query.shape))
            attention.v_proj.weight.copy_(torch.cat([copy[0] @ back, copy[1]]))
            attention.o_proj.weight.copy_(copy.repeat_interleave(2, 0).flatten(0, 1).T)
            attention.q_norm.weight.fill_(MATCHING_SHARPNESS)
            attention.k_norm.weight.fill_(MATCHING_SHARPNESS)


def image_processor() -> Qwen2VLImageProcessorPil:
    """Scales every picture to about 64 x 64 pixels: 16 image tokens for a square one."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=2,
        size={"shortest_edge": SIDE * SIDE, "longest_edge": SIDE * SIDE},
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.5, 0.5, 0.5],
    )


def save_checkpoint(
    model: Qwen3VLForConditionalGeneration, tokenizer: Any, directory: Path, dtype: torch.dtype
) -> None:
    """Writes a directory that AutoModelForImageTextToText and AutoProcessor load.

    Args:
        model: The trained model; left as it is.
        tokenizer: Its tokenizer.
        directory: Created where missing.
        dtype: What the weights are stored in.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = {k: v.to(dtype) for k, v in model.state_dict().items() if k != "lm_head.weight"}
    model.config.dtype = "float32"
    model.save_pretrained(directory, state_dict=state)
    (directory / "model.safetensors").chmod(0o644)
    tokenizer.save_pretrained(directory)
    image_processor().save_pretrained(directory)
