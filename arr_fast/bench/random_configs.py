"""Configs and image processors of the random checkpoints, one builder per family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arr_fast.bench.random_models import RandomModelSpec


def build_config(spec: RandomModelSpec, tokenizer: Any) -> Any:
    """The transformers config of a spec.

    Args:
        spec: Sizes of the model.
        tokenizer: Its tokenizer, which fixes the ids of the control tokens.

    Returns:
        A config of the family's own class.
    """
    if spec.family.startswith("qwen"):
        return _qwen_config(spec, tokenizer)
    if spec.family == "llava_onevision":
        return _llava_config(spec, tokenizer)
    return _idefics_config(spec, tokenizer)


def build_image_processor(spec: RandomModelSpec) -> Any:
    """The family's own PIL image processor (none of them needs torchvision)."""
    import transformers

    if spec.family.startswith("qwen"):
        return transformers.Qwen2VLImageProcessorPil(
            patch_size=spec.patch,
            merge_size=spec.merge,
            temporal_patch_size=2,
            size={"shortest_edge": spec.min_pixels, "longest_edge": spec.max_pixels},
        )
    side = spec.image_size
    if spec.family == "llava_onevision":
        return transformers.LlavaOnevisionImageProcessorPil(
            size={"height": side, "width": side}, image_grid_pinpoints=_pinpoints(side)
        )
    name = "SmolVLMImageProcessorPil" if spec.family == "smolvlm" else "Idefics3ImageProcessorPil"
    return getattr(transformers, name)(
        size={"longest_edge": side},
        max_image_size={"longest_edge": side},
        do_image_splitting=False,
    )


def _rotary(spec: RandomModelSpec) -> dict[str, Any]:
    # A quarter and a bit of the rotary pairs to time, the rest to height and width, as published.
    pairs = spec.head_dim // 2
    if spec.family.startswith("qwen3"):
        side = 5 * pairs // 16
        return {
            "rope_type": "default",
            "rope_theta": 500000.0,
            "mrope_section": [pairs - 2 * side, side, side],
            "mrope_interleaved": True,
        }
    side = 3 * pairs // 8
    return {
        "rope_type": "default",
        "rope_theta": 10000.0,
        "mrope_section": [pairs - 2 * side, side, side],
    }


def _qwen_config(spec: RandomModelSpec, tokenizer: Any) -> Any:
    import transformers

    names = {
        "qwen2_vl": "Qwen2VLConfig",
        "qwen2_5_vl": "Qwen2_5_VLConfig",
        "qwen3_vl": "Qwen3VLConfig",
        "qwen3_vl_moe": "Qwen3VLMoeConfig",
    }
    text: dict[str, Any] = {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "max_position_embeddings": spec.max_positions,
        "rope_parameters": _rotary(spec),
        "tie_word_embeddings": spec.tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }
    vision: dict[str, Any] = {
        "depth": spec.vision_depth,
        "num_heads": spec.vision_heads,
        "patch_size": spec.patch,
        "spatial_merge_size": spec.merge,
        "temporal_patch_size": 2,
        "in_channels": 3,
    }
    if spec.family == "qwen2_vl":
        ratio = spec.vision_mlp // spec.vision_hidden
        vision |= {"embed_dim": spec.vision_hidden, "hidden_size": spec.hidden, "mlp_ratio": ratio}
    else:
        vision |= {
            "hidden_size": spec.vision_hidden,
            "intermediate_size": spec.vision_mlp,
            "out_hidden_size": spec.hidden,
        }
    if spec.family == "qwen2_5_vl":
        # Windows of two merged patches a side, so that small images already span several.
        vision["window_size"] = spec.patch * spec.merge * 2
        vision["fullatt_block_indexes"] = [spec.vision_depth - 1]
    if spec.family.startswith("qwen3"):
        text["head_dim"] = spec.head_dim
        vision["num_position_embeddings"] = spec.vision_grid**2
        vision["deepstack_visual_indexes"] = list(spec.deepstack)
    if spec.family == "qwen3_vl_moe":
        text |= {
            "num_experts": spec.experts,
            "num_experts_per_tok": spec.experts_per_token,
            "moe_intermediate_size": spec.mlp,
        }
    ids = {
        "image_token_id": "<|image_pad|>",
        "video_token_id": "<|video_pad|>",
        "vision_start_token_id": "<|vision_start|>",
        "vision_end_token_id": "<|vision_end|>",
    }
    return getattr(transformers, names[spec.family])(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=spec.tied,
        **{key: tokenizer.convert_tokens_to_ids(token) for key, token in ids.items()},
    )


def _idefics_config(spec: RandomModelSpec, tokenizer: Any) -> Any:
    import transformers

    cls = transformers.SmolVLMConfig if spec.family == "smolvlm" else transformers.Idefics3Config
    return cls(
        text_config={"model_type": "llama", **_plain_text(spec, tokenizer, "<end_of_utterance>")},
        vision_config=_siglip(spec),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=spec.merge,
        tie_word_embeddings=spec.tied,
    )


def _llava_config(spec: RandomModelSpec, tokenizer: Any) -> Any:
    import transformers

    vision = {"model_type": "siglip_vision_model", "vision_use_head": False, **_siglip(spec)}
    return transformers.LlavaOnevisionConfig(
        text_config={"model_type": "qwen2", **_plain_text(spec, tokenizer, "<|im_end|>")},
        vision_config=vision,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        video_token_index=tokenizer.convert_tokens_to_ids("<video>"),
        image_grid_pinpoints=_pinpoints(spec.image_size),
        tie_word_embeddings=spec.tied,
    )


def _plain_text(spec: RandomModelSpec, tokenizer: Any, end: str) -> dict[str, Any]:
    return {
        "vocab_size": spec.vocab,
        "hidden_size": spec.hidden,
        "intermediate_size": spec.mlp,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim,
        "max_position_embeddings": spec.max_positions,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "tie_word_embeddings": spec.tied,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(end),
        "pad_token_id": tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


def _siglip(spec: RandomModelSpec) -> dict[str, Any]:
    return {
        "hidden_size": spec.vision_hidden,
        "intermediate_size": spec.vision_mlp,
        "num_hidden_layers": spec.vision_depth,
        "num_attention_heads": spec.vision_heads,
        "image_size": spec.image_size,
        "patch_size": spec.patch,
    }


def _pinpoints(side: int) -> list[list[int]]:
    return [[side * rows, side * columns] for rows in (1, 2, 3) for columns in (1, 2, 3)]
