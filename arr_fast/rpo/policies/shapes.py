"""The bundled shapes generator as a policy: 64 x 64 pictures, seconds per iteration on a CPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor, nn

from arr_fast.errors import ArrFastError
from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.policies.diffusers_policy import LoraOptions, restore_weights
from arr_fast.rpo.schedule import shifted_sigmas
from arr_fast.shapes import generator_directory
from arr_fast.shapes.generator import SHIFT, TRANSFORMER_CONFIG, ShapesGenerator, word_ids
from arr_fast.shapes.latents import CHANNELS, TOKENS, PatchCode

LORA_TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_mlp", "proj_out")


class ShapesPolicy:
    """A `Policy` on a `ShapesGenerator`.

    Args:
        generator: Words and transformer.
        code: Its latents.
        lora: An adapter, whose reference is the network without it; None trains the whole
            transformer against a frozen copy. Word embeddings stay as they are.
    """

    latent_shape: tuple[int, ...] = (TOKENS, CHANNELS)

    def __init__(
        self, generator: ShapesGenerator, code: PatchCode, *, lora: LoraOptions | None = None
    ) -> None:
        self.name = "shapes" if generator.task == "t2i" else "shapes-edit"
        self.generator = generator.eval().requires_grad_(False)
        self.code = code
        self.transformer: Any = generator.transformer
        self._lora = lora
        self._frozen_copy: nn.Module | None = None
        if lora is None:
            self._frozen_copy = copy.deepcopy(self.transformer)
            self.transformer.requires_grad_(True)
        else:
            from peft import LoraConfig

            # peft scales by lora_alpha / r; its annotation says int, its arithmetic takes floats.
            adapter: Any = {"r": lora.rank, "lora_alpha": lora.alpha}
            self.transformer.add_adapter(
                LoraConfig(target_modules=list(lora.targets or LORA_TARGETS), **adapter)
            )
        self.module: nn.Module = self.transformer

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "builtin:shapes",
        *,
        device: torch.device | str = "cpu",
        lora: LoraOptions | None = None,
    ) -> Self:
        """Loads a generator.

        Args:
            model: "builtin:shapes", "builtin:shapes-edit", or a directory of `train_generator`.
            device: Where it goes.
            lora: See the class.

        Raises:
            ArrFastError: There is none.
        """
        name = str(model)
        if name.startswith("builtin:"):
            directory = generator_directory(name.removeprefix("builtin:"))
        else:
            directory = Path(name)
        generator, code = ShapesGenerator.load(directory)
        return cls(generator.to(device), code.to(device), lora=lora)

    @property
    def device(self) -> torch.device:
        """Where latents, sigmas and conditions live."""
        return self.generator.words.weight.device

    @torch.no_grad()
    def encode(
        self, prompts: Sequence[str], sources: Sequence[Image.Image] | None = None
    ) -> Conditions:
        """See `Policy.encode`; {text [B, 16, 64], pooled [B, 64]} and source [B, 64, 48]."""
        if not prompts:
            raise ValueError("prompts must not be empty")
        if (sources is not None) != (self.generator.task == "edit"):
            needs = "needs source images" if sources is None else "takes no source images"
            raise ValueError(f"{self.name} {needs}")
        if sources is not None and len(sources) != len(prompts):
            raise ValueError(f"sources has {len(sources)} items, prompts has {len(prompts)}")
        before = None if sources is None else self.code.encode(sources)
        return self.generator.conditions(word_ids(prompts).to(self.device), before)

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """See `Policy.velocity`."""
        return self.generator.velocity(self.module, latents, sigma, conditions)

    @contextmanager
    def reference(self) -> Iterator[None]:
        """The adapter is off, or the frozen copy takes the network's place."""
        if self._frozen_copy is None:
            self.transformer.disable_adapters()
            try:
                yield
            finally:
                self.transformer.enable_adapters()
            return
        trained, self.module = self.module, self._frozen_copy
        try:
            yield
        finally:
            self.module = trained

    @torch.no_grad()
    def decode(self, latents: Tensor) -> list[Image.Image]:
        """See `Policy.decode`.

        Raises:
            ValueError: Latents of another shape than [B, 64, 48].
        """
        if tuple(latents.shape[1:]) != self.latent_shape:
            raise ValueError(
                f"latents have shape {tuple(latents.shape[1:])}, the policy {self.latent_shape}"
            )
        return self.code.decode(latents)

    def sigmas(self, steps: int) -> Tensor:
        """The linear schedule with the generator's own shift."""
        return shifted_sigmas(steps, SHIFT)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """Adapter weights, or the whole transformer."""
        # By name, not by requires_grad: peft switches that off while an adapter is disabled.
        return {
            name: parameter
            for name, parameter in self.transformer.named_parameters()
            if self._lora is None or ".lora_" in name
        }

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        """The word embeddings."""
        return {"words": self.generator.words}

    def networks(self) -> Sequence[nn.Module]:
        """The transformer and its frozen copy."""
        return [n for n in (self.transformer, self._frozen_copy) if n is not None]

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes the adapter in peft's format, or the transformer in diffusers'."""
        if self._lora is not None:
            self.transformer.save_lora_adapter(str(directory))
            return
        generator = self.generator
        if weights is not None:
            sizes = {name: self.transformer.config[name] for name in TRANSFORMER_CONFIG}
            generator = ShapesGenerator(generator.task, sizes=sizes)
            generator.transformer.load_state_dict(weights)
            generator.words.load_state_dict(self.generator.words.state_dict())
        generator.save(directory, self.code)

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote, in place.

        Raises:
            ArrFastError: The weights are missing or of other layers.
        """
        if self._lora is not None:
            from peft.utils import get_peft_model_state_dict
            from safetensors.torch import load_file

            path = directory / "pytorch_lora_weights.safetensors"
            if not path.is_file():
                raise ArrFastError(f"{path} does not exist")
            state = load_file(path)
            own: dict[str, Tensor] = get_peft_model_state_dict(self.transformer)
        else:
            state = dict(ShapesGenerator.load(directory)[0].transformer.state_dict())
            own = dict(self.transformer.state_dict())
        restore_weights(own, state, directory)
