"""Randomly initialised pipelines, tiny, written to disk as diffusers writes real ones."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
import transformers
from diffusers import (
    AutoencoderKL,
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

from arr_fast.bench.random_models import build
from arr_fast.rpo.policies.qwen_processor import ImageOnlyQwenProcessor

LETTERS = string.ascii_lowercase + string.digits + ".,'"
DYNAMIC = {"use_dynamic_shifting": True, "shift": 3.0, "base_shift": 0.5, "max_shift": 1.15}


def write_flux(directory: Path) -> None:
    """FLUX.1-dev's layout: guidance embedding, CLIP and T5, 2x2 packing."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )
    clip, clip_tokenizer = _clip(transformers.CLIPTextModel, 20)
    t5, t5_tokenizer = _t5(24)
    FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC),
        vae=_vae(),
        text_encoder=clip,
        tokenizer=clip_tokenizer,
        text_encoder_2=t5,
        tokenizer_2=t5_tokenizer,
        transformer=_lively(transformer),
    ).save_pretrained(directory)


def write_sd3(directory: Path) -> None:
    """SD3's layout: two CLIPs with projections and T5, latents cut into patches by the network."""
    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        pos_embed_max_size=8,
        qk_norm="rms_norm",
    )
    first, first_tokenizer = _clip(transformers.CLIPTextModelWithProjection, 20)
    second, second_tokenizer = _clip(transformers.CLIPTextModelWithProjection, 20)
    t5, t5_tokenizer = _t5(40)
    StableDiffusion3Pipeline(
        transformer=_lively(transformer),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=_vae(),
        text_encoder=first,
        tokenizer=first_tokenizer,
        text_encoder_2=second,
        tokenizer_2=second_tokenizer,
        text_encoder_3=t5,
        tokenizer_3=t5_tokenizer,
    ).save_pretrained(directory)


def write_qwen_edit(directory: Path, *, plus: bool = False) -> None:
    """Qwen-Image-Edit's layout: Qwen2.5-VL reads instruction and source, the VAE is a video one."""
    torch.manual_seed(0)
    encoder_dir = directory.with_name(directory.name + "-encoder")
    build(
        "random:qwen2_5_vl-tiny[layers=1,vision_depth=1,min_pixels=784,max_pixels=3136]",
        encoder_dir,
    )
    encoder = transformers.Qwen2_5_VLForConditionalGeneration.from_pretrained(encoder_dir)
    tokenizer = transformers.AutoTokenizer.from_pretrained(encoder_dir)
    image_processor = transformers.AutoImageProcessor.from_pretrained(encoder_dir)
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2],
        num_res_blocks=1,
        temperal_downsample=[False],
        latents_mean=[0.1, -0.2, 0.3, 0.0],
        latents_std=[1.5, 0.8, 1.2, 1.0],
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=16,
        out_channels=4,
        num_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=encoder.config.text_config.hidden_size,
        axes_dims_rope=(4, 6, 6),
    )
    kind: Any = QwenImageEditPlusPipeline if plus else QwenImageEditPipeline
    pipeline = kind(
        scheduler=FlowMatchEulerDiscreteScheduler(**DYNAMIC, shift_terminal=0.02),
        vae=vae,
        text_encoder=encoder,
        tokenizer=tokenizer,
        processor=ImageOnlyQwenProcessor(image_processor, tokenizer),
        transformer=_lively(transformer),
    )
    for name in ("scheduler", "vae", "text_encoder", "tokenizer", "transformer"):
        getattr(pipeline, name).save_pretrained(directory / name)
    tokenizer.save_pretrained(directory / "processor")
    image_processor.save_pretrained(directory / "processor")
    index = dict(pipeline.config)
    index["processor"] = ("transformers", "Qwen2VLProcessor")
    index["_class_name"] = kind.__name__
    public = {k: v for k, v in index.items() if k != "_name_or_path"}
    (directory / "model_index.json").write_text(json.dumps(public))


def _lively(transformer: Any) -> Any:
    """Redraws the weights that start at zero or tiny, so that prompts and sigmas matter."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in transformer.parameters():
            if parameter.ndim >= 2:
                fan_in = parameter[0].numel()
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * fan_in**-0.5)
    return transformer


def _vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        scaling_factor=0.4,
        shift_factor=0.1,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _clip(model_class: Any, width: int) -> tuple[Any, Any]:
    alphabet = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: number for number, token in enumerate([*special, *alphabet])}
    tokenizer = transformers.CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)
    config = transformers.CLIPTextConfig(
        vocab_size=len(vocabulary),
        hidden_size=width,
        intermediate_size=32,
        projection_dim=width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return model_class(config), tokenizer


def _t5(width: int) -> tuple[Any, Any]:
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in LETTERS]
    tokenizer = transformers.T5TokenizerFast(vocab=pieces, extra_ids=0)
    config = transformers.T5Config(
        vocab_size=len(pieces),
        d_model=width,
        d_kv=8,
        d_ff=32,
        num_layers=1,
        num_heads=2,
        decoder_start_token_id=0,
    )
    return transformers.T5EncoderModel(config), tokenizer
