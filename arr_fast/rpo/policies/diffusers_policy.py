"""What every policy on a diffusers pipeline shares: adaptation, reference, guidance, weights.

The pipeline is loaded from its own format and its classes do the encoding and decoding; only the
denoising loop is ours. Trained is a LoRA adapter (the reference is the network with the adapter
disabled) or the whole network (the reference is a frozen copy).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from arr_fast.errors import ArrFastError, UnsupportedModelError
from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.schedule import dynamic_shift
from arr_fast.rpo.sharding import split_like

_LORA_FILE = "pytorch_lora_weights.safetensors"
_LORA_PREFIX = "transformer."
_WEIGHTS_FILES = "diffusion_pytorch_model{suffix}.safetensors"


@dataclass(frozen=True, slots=True)
class LoraOptions:
    """A LoRA adapter.

    Attributes:
        rank, alpha: Its update is scaled by alpha / rank.
        targets: Names of the linear layers; None takes the policy's own list.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not self.alpha > 0:
            raise ValueError(f"alpha must be above 0, got {self.alpha}")


class DiffusersPolicy:
    """Base of the policies on diffusers pipelines; a `Policy`.

    Args:
        pipeline: A loaded pipeline, on its device.
        height, width: Of the images, in pixels.
        lora: The adapter; None trains the whole network.
        guidance: What a guidance-distilled network is told; None where it has no such input.
        true_cfg: Scale of classifier-free guidance; 1 has no unconditional branch.
        negative_prompt: What the unconditional branch reads.
        max_sequence_length: Tokens of a prompt; shorter ones are padded, so that all prompts have
            one shape.
        gradient_checkpointing: Recompute activations in the backward.
        decode_batch: Images that the VAE decodes at once.

    Raises:
        ValueError: A size that the latent grid does not divide, or options out of range.
    """

    name: ClassVar[str]
    pipeline_classes: ClassVar[tuple[str, ...]]
    lora_targets: ClassVar[tuple[str, ...]]
    edits: ClassVar[bool] = False

    latent_shape: tuple[int, ...]

    def __init__(
        self,
        pipeline: Any,
        *,
        height: int,
        width: int,
        lora: LoraOptions | None = None,
        guidance: float | None = None,
        true_cfg: float = 1.0,
        negative_prompt: str = "",
        max_sequence_length: int = 256,
        gradient_checkpointing: bool = False,
        decode_batch: int = 8,
    ) -> None:
        if not (math.isfinite(true_cfg) and true_cfg >= 1):
            raise ValueError(f"true_cfg must be finite and at least 1, got {true_cfg}")
        cell = self.pixels_per_cell(pipeline)
        if height < cell or width < cell or height % cell or width % cell:
            raise ValueError(f"height and width must be multiples of {cell}, got {height}, {width}")
        self.pipeline = pipeline
        self.height, self.width = height, width
        self.guidance, self.true_cfg = guidance, true_cfg
        self.negative_prompt = negative_prompt
        self.max_sequence_length = max_sequence_length
        self.decode_batch = decode_batch
        self.transformer: Any = pipeline.transformer
        self.dtype: torch.dtype = self.transformer.dtype
        for part in (*self.frozen_parts().values(), self.transformer):
            part.requires_grad_(False).eval()
        self._lora = lora
        self._frozen_copy: nn.Module | None = None
        if lora is None:
            self._frozen_copy = copy.deepcopy(self.transformer)
            # Updates of 1e-5 vanish in bfloat16: the forward is in `dtype`, the weights are not.
            self.transformer.float().requires_grad_(True)
        else:
            self._add_adapter(lora)
        if gradient_checkpointing:
            self.transformer.enable_gradient_checkpointing()
        self.module: nn.Module = self.transformer
        self._check_guidance()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        revision: str | None = None,
        **options: Any,
    ) -> Self:
        """Loads a pipeline from a directory or hub id in diffusers' format.

        Args:
            model: Directory or hub id.
            dtype: Of the forward and of all weights but the trained ones, which are float32.
            device: Where they go.
            revision: Of a hub id.
            **options: Arguments of the class.

        Raises:
            UnsupportedModelError: The pipeline is of another class.
        """
        from diffusers import DiffusionPipeline

        pipeline = DiffusionPipeline.from_pretrained(
            str(model), torch_dtype=dtype, revision=revision, **cls.components(model, revision)
        )
        found = type(pipeline).__name__
        if found not in cls.pipeline_classes:
            raise UnsupportedModelError(found, cls.pipeline_classes, f"not a {cls.name} pipeline")
        pipeline.set_progress_bar_config(disable=True)
        return cls(pipeline.to(device), **options)

    @classmethod
    def components(cls, model: str | Path, revision: str | None) -> dict[str, Any]:
        """Parts of the pipeline that are not loaded by diffusers itself."""
        return {}

    @staticmethod
    def pixels_per_cell(pipeline: Any) -> int:
        """Pixels along one side of a latent token."""
        return int(pipeline.vae_scale_factor) * 2

    @property
    def grid(self) -> tuple[int, int]:
        """Latent tokens (rows, columns) of an image."""
        cell = self.pixels_per_cell(self.pipeline)
        return self.height // cell, self.width // cell

    @property
    def device(self) -> torch.device:
        device: torch.device = next(self.transformer.parameters()).device
        return device

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        """Text encoders and VAE by their names in the pipeline."""
        return {
            name: part
            for name, part in self.pipeline.components.items()
            if isinstance(part, nn.Module) and name != "transformer"
        }

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """What is optimised: adapter weights, or everything."""
        # By name, not by requires_grad: peft switches that off while an adapter is disabled.
        return {
            name: parameter
            for name, parameter in self.transformer.named_parameters()
            if self._lora is None or ".lora_" in name
        }

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The adapter is off, or the frozen copy takes the network's place."""
        if self._frozen_copy is not None:
            trained, self.module = self.module, self._frozen_copy
            try:
                yield
            finally:
                self.module = trained
            return
        self.transformer.disable_adapters()
        try:
            yield
        finally:
            self.transformer.enable_adapters()

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Conditional velocity, or the guided one; no gradient flows through the unconditional
        branch."""
        if self._lora is not None or self.dtype == torch.float32:
            return self._guided_velocity(latents, sigma, conditions)
        with torch.autocast(self.device.type, dtype=self.dtype):
            return self._guided_velocity(latents, sigma, conditions)

    def _guided_velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        conditional = self._predict(latents, sigma, conditions, negative=False)
        if self.true_cfg == 1.0:
            return conditional
        with torch.no_grad():
            unconditional = self._predict(latents, sigma, conditions, negative=True)
        return self._guide(conditional.float(), unconditional.float())

    def encode(
        self, prompts: Sequence[str], sources: Sequence[Image.Image] | None = None
    ) -> Conditions:
        """See `Policy.encode`."""
        if not prompts:
            raise ValueError("prompts must not be empty")
        if sources is not None and not self.edits:
            raise ValueError(f"{self.name} is a text-to-image policy, but sources were given")
        if self.edits and sources is None:
            raise ValueError(f"{self.name} edits images: sources are missing")
        if sources is not None and len(sources) != len(prompts):
            raise ValueError(f"sources has {len(sources)} items, prompts has {len(prompts)}")
        with torch.no_grad():
            return self._encode(list(prompts), None if sources is None else list(sources))

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """See `Policy.decode`."""
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape[1:])}, the policy {self.latent_shape}"
            )
        vae = self.pipeline.vae
        images: list[Image.Image] = []
        with torch.no_grad():
            for part in latents.split(self.decode_batch):
                pixels = self._decode_pixels(part.to(vae.device, vae.dtype))
                images += self.pipeline.image_processor.postprocess(pixels, output_type="pil")
        return images

    def sigmas(self, steps: int) -> Tensor:
        """The schedule of the pipeline's own scheduler at this image size."""
        scheduler = copy.deepcopy(self.pipeline.scheduler)
        config, arguments = scheduler.config, self._schedule_arguments(steps)
        if config.get("use_dynamic_shifting"):
            rows, columns = self.grid
            shift = dynamic_shift(
                rows * columns,
                base_tokens=config.get("base_image_seq_len", 256),
                max_tokens=config.get("max_image_seq_len", 4096),
                base_shift=config.get("base_shift", 0.5),
                max_shift=config.get("max_shift", 1.15),
            )
            arguments["mu"] = math.log(shift)
        scheduler.set_timesteps(**arguments)
        sigmas: Tensor = scheduler.sigmas.double().cpu()
        return sigmas

    def networks(self) -> Sequence[nn.Module]:
        """The transformer and its frozen copy."""
        return [n for n in (self.transformer, self._frozen_copy) if n is not None]

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the adapter as diffusers' `load_lora_weights` reads it, or the whole transformer
        as `save_pretrained` does, into `directory/transformer`."""
        if self._lora is None:
            save_transformer(self.transformer, directory / "transformer", weights)
            return
        from peft.utils import get_peft_model_state_dict

        type(self.pipeline).save_lora_weights(
            str(directory),
            transformer_lora_layers=get_peft_model_state_dict(self.transformer),
            transformer_lora_adapter_metadata=self.transformer.peft_config["default"].to_dict(),
        )

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote, in place.

        Raises:
            ArrFastError: The weights are missing or of other layers.
        """
        restore_weights(self._state_by_saved_name(), self._saved_state(directory), directory)

    def _saved_state(self, directory: Path) -> dict[str, Tensor]:
        from safetensors.torch import load_file

        if self._lora is None:
            saved = type(self.transformer).from_pretrained(str(directory / "transformer"))
            return dict(saved.state_dict())
        path = directory / _LORA_FILE
        if not path.is_file():
            raise ArrFastError(f"{path} does not exist")
        return {name.removeprefix(_LORA_PREFIX): t for name, t in load_file(path).items()}

    def _state_by_saved_name(self) -> dict[str, Tensor]:
        """The live tensors under the names that `save` gives them."""
        if self._lora is None:
            return dict(self.transformer.state_dict())
        return {
            name.replace(".default.", "."): parameter
            for name, parameter in self.trainable_parameters().items()
        }

    def _add_adapter(self, lora: LoraOptions) -> None:
        from diffusers.training_utils import cast_training_params
        from peft import LoraConfig

        self.transformer.add_adapter(
            LoraConfig(
                r=lora.rank,
                lora_alpha=lora.alpha,  # type: ignore[arg-type]  # any number works
                target_modules=list(lora.targets or self.lora_targets),
            )
        )
        # As above: updates need float32.
        cast_training_params(self.transformer, dtype=torch.float32)

    def _check_guidance(self) -> None:
        """Refuses guidance that the network has no input for, and fills in the default."""
        has_input = bool(self.transformer.config.get("guidance_embeds", False))
        if self.guidance is not None and not has_input:
            raise ValueError(f"{self.name}: the network is not guidance-distilled; use true_cfg")
        if has_input and self.guidance is None:
            self.guidance = 3.5

    def _guide(self, conditional: Tensor, unconditional: Tensor) -> Tensor:
        """Classifier-free guidance."""
        return unconditional + self.true_cfg * (conditional - unconditional)

    def _guidance_input(self, rows: int) -> Tensor | None:
        if self.guidance is None:
            return None
        return torch.full((rows,), self.guidance, device=self.device, dtype=torch.float32)

    def _schedule_arguments(self, steps: int) -> dict[str, Any]:
        """Arguments of the scheduler's set_timesteps, as the pipeline passes them."""
        return {"sigmas": np.linspace(1.0, 1 / steps, steps)}

    def _predict(
        self, latents: Tensor, sigma: Tensor, conditions: Conditions, *, negative: bool
    ) -> Tensor:
        """One forward of `self.module`."""
        raise NotImplementedError

    def _encode(self, prompts: list[str], sources: list[Image.Image] | None) -> Conditions:
        raise NotImplementedError

    def _decode_pixels(self, latents: Tensor) -> Tensor:
        """[B, 3, height, width] in [-1, 1]."""
        raise NotImplementedError


def save_transformer(
    transformer: Any, directory: Path, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Writes a transformer as diffusers' `save_pretrained` does.

    Args:
        transformer: A diffusers model.
        directory: Where to.
        weights: Its state, where the live one is split over ranks.
    """
    if weights is None:
        transformer.save_pretrained(str(directory))
        return
    from huggingface_hub import save_torch_state_dict

    transformer.save_config(str(directory))
    save_torch_state_dict(
        dict(weights), str(directory), filename_pattern=_WEIGHTS_FILES, max_shard_size="10GB"
    )


def restore_weights(own: Mapping[str, Tensor], saved: Mapping[str, Tensor], source: Path) -> None:
    """Copies saved weights into a policy's own.

    Args:
        own: The policy's tensors by the names they are saved under.
        saved: What was read.
        source: Where from, for the message.

    Raises:
        ArrFastError: The names differ.
    """
    different = set(saved) ^ set(own)
    if different:
        raise ArrFastError(
            f"{source} does not fit the policy: {len(different)} weights differ, such as "
            f"{min(different)}"
        )
    with torch.no_grad():
        for name, tensor in saved.items():
            own[name].copy_(split_like(tensor, own[name]))
