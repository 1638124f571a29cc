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
            "num_hidden_layers": 5,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "max_position_embeddings": 8192,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [12, 10, 10],
                "mrope_interleaved": True,
            },
            "pad_token_id": ids["<|endoftext|>"],
            "eos_token_id": ids["<|im_end|>"],
            "bos_token_id": None,
            "tie_word_embeddings": True,
        },
        vision_config={
            "depth": 3,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 2,
            "out_hidden_size": 192,
            "num_position_embeddings": (SIDE // PATCH) ** 2,
            "deepstack_visual_indexes": [0, 1],
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
    model.config.text_config._attn_implementation = "sdpa"
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table.copy_(torch.nn.functional.normalize(torch.randn_like(table), dim=-1))
        for merger in model.model.visual.deepstack_merger_list:
            merger.linear_fc2.weight.zero_()
            merger.linear_fc2.bias.zero_()
    return model


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
    tokenizer.save_pretrained(directory)
    image_processor().save_pretrained(directory)
