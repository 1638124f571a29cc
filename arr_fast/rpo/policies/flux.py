"""FLUX.1-dev text-to-image (and its siblings on `FluxPipeline`).

Latents are packed tokens [S, 4 C]: S = height / 16 * width / 16 cells of 2 x 2 latent pixels.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.policies.diffusers_policy import DiffusersPolicy


class FluxPolicy(DiffusersPolicy):
    """FLUX with its guidance embedding, and true CFG where asked for.

    Args:
        pipeline: A `FluxPipeline`.
        max_sequence_length: Tokens of T5.
        **options: See `DiffusersPolicy`.
    """

    name: ClassVar[str] = "flux"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("FluxPipeline",)
    # The attention projections that the ARR reference trains (train_rpo_flux.py).
    lora_targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any, *, max_sequence_length: int = 512, **options: Any) -> None:
        super().__init__(pipeline, max_sequence_length=max_sequence_length, **options)
        rows, columns = self.grid
        self.latent_shape = (rows * columns, int(self.transformer.config.in_channels))
        self._image_ids = pipeline._prepare_latent_image_ids(
            1, rows, columns, self.device, self.dtype
        )
        self._text_ids = torch.zeros(max_sequence_length, 3, device=self.device, dtype=self.dtype)
        self._negative: Conditions | None = None
        if self.true_cfg > 1:
            self._negative = self.encode([self.negative_prompt])

    def _encode(self, prompts: list[str], sources: list[Image.Image] | None) -> Conditions:
        embeds, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        to = {"device": self.device, "dtype": self.dtype}
        return {"prompt_embeds": embeds.to(**to), "pooled": pooled.to(**to)}

    def _predict(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, *, negative: bool
    ) -> Tensor:
        if negative:
            assert self._negative is not None
            conditions = {k: v.expand_as(conditions[k]) for k, v in self._negative.items()}
        velocity: Tensor = self.module(
            hidden_states=latents.to(self.dtype),
            timestep=sigma,
            guidance=self._guidance_input(latents.shape[0]),
            pooled_projections=conditions["pooled"],
            encoder_hidden_states=conditions["prompt_embeds"],
            txt_ids=self._text_ids,
            img_ids=self._image_ids,
            return_dict=False,
        )[0]
        return velocity

    def _decode_pixels(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        unpacked = self.pipeline._unpack_latents(
            latents, self.height, self.width, self.pipeline.vae_scale_factor
        )
        unpacked = unpacked / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(unpacked, return_dict=False)[0]
        return pixels
