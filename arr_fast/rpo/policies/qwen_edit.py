"""Qwen-Image-Edit, and -Edit-2509 on its own pipeline: an instruction and a source image.

Latents are packed tokens [S, 4 C], as in FLUX; the source's latents follow them in the sequence and
are never noised. Sources are resized to one size, so that all items have one shape.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from arr_fast.errors import PromptTooLongError
from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.policies.diffusers_policy import DiffusersPolicy
from arr_fast.rpo.policies.qwen_processor import processor_components


class QwenEditPolicy(DiffusersPolicy):
    """Qwen-Image-Edit with classifier-free guidance and its norm correction.

    Args:
        pipeline: A `QwenImageEditPipeline` or `QwenImageEditPlusPipeline`.
        source_height, source_width: To which sources are resized; None takes the output's.
        max_sequence_length: Tokens of instruction and source image together.
        **options: See `DiffusersPolicy`.
    """

    name: ClassVar[str] = "qwen_edit"
    pipeline_classes: ClassVar[tuple[str, ...]] = (
        "QwenImageEditPipeline",
        "QwenImageEditPlusPipeline",
    )
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")
    edits: ClassVar[bool] = True

    def __init__(
        self,
        pipeline: Any,
        *,
        source_height: int | None = None,
        source_width: int | None = None,
        max_sequence_length: int = 1024,
        **options: Any,
    ) -> None:
        super().__init__(pipeline, max_sequence_length=max_sequence_length, **options)
        cell = self.pixels_per_cell(pipeline)
        self.source_height = source_height or self.height
        self.source_width = source_width or self.width
        if self.source_height % cell or self.source_width % cell:
            raise ValueError(
                f"source_height and source_width must be multiples of {cell}, got "
                f"{self.source_height}, {self.source_width}"
            )
        rows, columns = self.grid
        self.latent_shape = (rows * columns, int(self.transformer.config.in_channels))
        source_grid = (self.source_height // cell, self.source_width // cell)
        self._image_shapes = [(1, rows, columns), (1, *source_grid)]
        self._is_plus = type(pipeline).__name__ == "QwenImageEditPlusPipeline"

    @classmethod
    def components(cls, model: str | Path, revision: str | None) -> dict[str, Any]:
        """The processor, where transformers cannot build its own."""
        return processor_components(model, revision)

    def _encode(self, prompts: list[str], sources: list[Image.Image] | None) -> Conditions:
        assert sources is not None
        items = [self._encode_one(*pair) for pair in zip(prompts, sources, strict=True)]
        return {name: torch.cat([item[name] for item in items]) for name in items[0]}

    def _encode_one(self, prompt: str, source: Image.Image) -> Conditions:
        processor = self.pipeline.image_processor
        size = (self.source_height, self.source_width)
        image = processor.resize(source.convert("RGB"), *size)
        read_image = self._image_for_the_encoder(source.convert("RGB"), image)
        conditions = self._encode_text(prompt, read_image)
        if self.true_cfg > 1:
            negative = self._encode_text(self.negative_prompt or " ", read_image)
            conditions |= {f"negative_{name}": tensor for name, tensor in negative.items()}
        vae = self.pipeline.vae
        pixels = processor.preprocess(image, *size).unsqueeze(2).to(vae.device, vae.dtype)
        latents = self.pipeline._encode_vae_image(image=pixels, generator=None)
        packed = self.pipeline._pack_latents(latents, 1, latents.shape[1], *latents.shape[3:])
        conditions["source_latents"] = packed.to(self.device, self.dtype)
        return conditions

    def _image_for_the_encoder(self, source: Image.Image, resized: Image.Image) -> Image.Image:
        """-Edit reads the source at its own size, -Edit-2509 at about 384 x 384 pixels."""
        if not self._is_plus:
            return resized
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as plus

        width, height = plus.calculate_dimensions(
            plus.CONDITION_IMAGE_SIZE, source.width / source.height
        )
        image: Image.Image = self.pipeline.image_processor.resize(source, height, width)
        return image

    def _encode_text(self, prompt: str, image: Image.Image) -> Conditions:
        embeds, mask = self.pipeline.encode_prompt(
            prompt=[prompt], image=[image], device=self.pipeline.text_encoder.device
        )
        tokens, limit = embeds.shape[1], self.max_sequence_length
        if tokens > limit:
            raise PromptTooLongError(
                f"prompt {prompt[:60]!r} and its image are {tokens} tokens, "
                f"max_sequence_length is {limit}"
            )
        if mask is None:
            mask = torch.ones(1, tokens, device=embeds.device)
        padding = limit - tokens
        embeds = torch.nn.functional.pad(embeds, (0, 0, 0, padding))
        mask = torch.nn.functional.pad(mask.bool(), (0, padding))
        return {
            "prompt_embeds": embeds.to(self.device, self.dtype),
            "prompt_mask": mask.to(self.device),
        }

    def _predict(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, *, negative: bool
    ) -> Tensor:
        prefix = "negative_" if negative else ""
        rows, tokens = latents.shape[:2]
        sequence = torch.cat([latents.to(self.dtype), conditions["source_latents"]], dim=1)
        velocity: Tensor = self.module(
            hidden_states=sequence,
            timestep=sigma,
            guidance=self._guidance_input(rows),
            encoder_hidden_states=conditions[f"{prefix}prompt_embeds"],
            encoder_hidden_states_mask=conditions[f"{prefix}prompt_mask"],
            img_shapes=[self._image_shapes] * rows,
            return_dict=False,
        )[0]
        return velocity[:, :tokens]

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Guided, then brought back to the conditional prediction's norm per token."""
        guided = super()._guide(conditional, unconditional)
        norm = torch.linalg.vector_norm(conditional, dim=-1, keepdim=True)
        corrected: Tensor = guided * (norm / torch.linalg.vector_norm(guided, dim=-1, keepdim=True))
        return corrected

    def _decode_pixels(self, latents: Tensor) -> Tensor:
        vae, pipeline = self.pipeline.vae, self.pipeline
        unpacked = pipeline._unpack_latents(
            latents, self.height, self.width, pipeline.vae_scale_factor
        )
        per_channel = (1, vae.config.z_dim, 1, 1, 1)
        mean, std = (
            torch.tensor(values, device=latents.device, dtype=latents.dtype).view(per_channel)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        frames: Tensor = vae.decode(unpacked * std + mean, return_dict=False)[0]
        return frames[:, :, 0]
