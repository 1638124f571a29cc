"""Stable Diffusion 3 and 3.5 text-to-image; latents are [C, height / 8, width / 8]."""

from __future__ import annotations

from typing import Any, ClassVar

from PIL import Image
from torch import Tensor

from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.policies.diffusers_policy import DiffusersPolicy


class SD3Policy(DiffusersPolicy):
    """SD3 with classifier-free guidance; skip-layer guidance is not used.

    Args:
        pipeline: A `StableDiffusion3Pipeline`.
        **options: See `DiffusersPolicy`; max_sequence_length counts the tokens of T5.
    """

    name: ClassVar[str] = "sd3"
    pipeline_classes: ClassVar[tuple[str, ...]] = ("StableDiffusion3Pipeline",)
    # The layers that flow_grpo trains (scripts/train_sd3.py).
    lora_targets: ClassVar[tuple[str, ...]] = (
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_k",
        "attn.to_out.0",
        "attn.to_q",
        "attn.to_v",
    )

    def __init__(self, pipeline: Any, **options: Any) -> None:
        super().__init__(pipeline, **options)
        scale = pipeline.vae_scale_factor
        channels = int(self.transformer.config.in_channels)
        self.latent_shape = (channels, self.height // scale, self.width // scale)
        self._negative: Conditions | None = None
        if self.true_cfg > 1:
            self._negative = self.encode([self.negative_prompt])

    @staticmethod
    def pixels_per_cell(pipeline: Any) -> int:
        """The transformer cuts latents into patches itself."""
        return int(pipeline.vae_scale_factor) * int(pipeline.patch_size)

    def _schedule_arguments(self, steps: int) -> dict[str, Any]:
        return {"num_inference_steps": steps}

    def _encode(self, prompts: list[str], sources: list[Image.Image] | None) -> Conditions:
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            prompt=prompts,
            prompt_2=None,
            prompt_3=None,
            device=self.pipeline.text_encoder.device,
            do_classifier_free_guidance=False,
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
            timestep=sigma * 1000,
            encoder_hidden_states=conditions["prompt_embeds"],
            pooled_projections=conditions["pooled"],
            return_dict=False,
        )[0]
        return velocity

    def _decode_pixels(self, latents: Tensor) -> Tensor:
        vae = self.pipeline.vae
        scaled = latents / vae.config.scaling_factor + vae.config.shift_factor
        pixels: Tensor = vae.decode(scaled, return_dict=False)[0]
        return pixels
