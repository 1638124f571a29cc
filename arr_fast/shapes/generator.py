"""The bundled generator: a small FLUX transformer over PCA latents, told captions word by word.

Shapes: B items, 64 image tokens of 48 channels, L = 16 words of width 64. Text is position-coded by
the first rotary axis, on which image tokens are 0; a source picture sits at 1 on that axis (as FLUX
Kontext places it), far from every word.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from arr_fast.errors import ArrFastError
from arr_fast.shapes.captions import NUMBERS, PLURALS
from arr_fast.shapes.generator_data import GeneratorTask
from arr_fast.shapes.latents import CHANNELS, GRID, TOKENS, PatchCode
from arr_fast.shapes.scene import BACKGROUNDS, COLOURS, RADII, SHAPES

WORDS = 16
WORD_WIDTH = 64
FIRST_WORD_POSITION = 8
GRAMMAR_WORDS = """
    a an image picture scene of with on against background and left right above below to the
    make change colour size turn into replace remove take away add put
"""
VOCABULARY = (
    "<pad>",
    *sorted(
        {*SHAPES, *PLURALS.values(), *COLOURS, *BACKGROUNDS, *RADII, *NUMBERS[1:]}
        | set(re.findall(r"\w+", GRAMMAR_WORDS))
    ),
)
_IDS = {word: number for number, word in enumerate(VOCABULARY)}
TRANSFORMER_CONFIG: dict[str, Any] = {
    "patch_size": 1,
    "in_channels": CHANNELS,
    "num_layers": 2,
    "num_single_layers": 4,
    "attention_head_dim": 32,
    "num_attention_heads": 4,
    "joint_attention_dim": WORD_WIDTH,
    "pooled_projection_dim": WORD_WIDTH,
    "guidance_embeds": False,
    "axes_dims_rope": (8, 12, 12),
}
# Of the sampling schedule: sigma = shift t / (1 + (shift - 1) t).
SHIFT = 4.0
FILES = ("generator.json", "words.safetensors", "code.safetensors")


def word_ids(texts: Sequence[str]) -> Tensor:
    """Words of captions or instructions: int64 [B, WORDS], padded with 0.

    Raises:
        ValueError: A text without words, with too many, or with a word that the generator does not
            know.
    """
    rows = []
    for number, text in enumerate(texts):
        words = re.findall(r"[^\s.,]+", text.lower())
        unknown = [word for word in words if word not in _IDS]
        if unknown:
            raise ValueError(
                f"prompts[{number}]: the shapes generator does not know {unknown[0]!r}; it draws "
                f"{', '.join(SHAPES)} in {', '.join(COLOURS)}"
            )
        if not 0 < len(words) <= WORDS:
            raise ValueError(f"prompts[{number}] has {len(words)} words, expected 1 to {WORDS}")
        rows.append([_IDS[word] for word in words] + [0] * (WORDS - len(words)))
    return torch.tensor(rows, dtype=torch.int64)


class ShapesGenerator(nn.Module):
    """Word embeddings and the transformer.

    Args:
        task: "edit" puts a source picture's tokens behind the image's.
        seed: Of the random weights.
        sizes: Changes to TRANSFORMER_CONFIG, for tests and benchmarks.
    """

    image_ids: Tensor
    text_ids: Tensor

    def __init__(
        self, task: GeneratorTask = "t2i", seed: int = 0, sizes: Mapping[str, Any] | None = None
    ) -> None:
        super().__init__()
        from diffusers import FluxTransformer2DModel

        self.task = task
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.words = nn.Embedding(len(VOCABULARY), WORD_WIDTH, padding_idx=0)
            network: Any = FluxTransformer2DModel(**{**TRANSFORMER_CONFIG, **(sizes or {})})
            # Training starts at v = 0.
            nn.init.zeros_(network.proj_out.weight)
            nn.init.zeros_(network.proj_out.bias)
        self.transformer = network
        places = torch.cartesian_prod(torch.arange(GRID), torch.arange(GRID))
        image_ids = torch.cat([torch.zeros(TOKENS, 1), places], 1)
        if task == "edit":
            image_ids = torch.cat([image_ids, torch.cat([torch.ones(TOKENS, 1), places], 1)])
        text_ids = torch.zeros(WORDS, 3)
        text_ids[:, 0] = FIRST_WORD_POSITION + torch.arange(WORDS)
        self.register_buffer("image_ids", image_ids, persistent=False)
        self.register_buffer("text_ids", text_ids, persistent=False)

    def conditions(self, ids: Tensor, source: Tensor | None = None) -> dict[str, Tensor]:
        """What the transformer reads beside latents and sigma.

        Args:
            ids: int64 [B, WORDS] from `word_ids`.
            source: float32 [B, 64, 48] latents of source pictures, for an editing generator.
        """
        text = self.words(ids)
        real = (ids > 0).unsqueeze(-1)
        found = {"text": text, "pooled": (text * real).sum(1) / real.sum(1).clamp(min=1)}
        return found if source is None else {**found, "source": source}

    def velocity(
        self, network: nn.Module, latents: Tensor, sigma: Tensor, conditions: dict[str, Tensor]
    ) -> Tensor:
        """Predicts noise - data.

        Args:
            network: The transformer, a wrapper of it, or its frozen copy.
            latents: [B, 64, 48].
            sigma: [B] in (0, 1].
            conditions: From `conditions`.
        """
        source = conditions.get("source")
        tokens = latents if source is None else torch.cat([latents, source], 1)
        velocity: Tensor = network(
            hidden_states=tokens,
            encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"],
            timestep=sigma,
            img_ids=self.image_ids,
            txt_ids=self.text_ids,
            return_dict=False,
        )[0]
        return velocity[:, :TOKENS]

    @torch.no_grad()
    def sample(self, conditions: dict[str, Tensor], noise: Tensor, steps: int = 8) -> Tensor:
        """Deterministic Euler steps from noise [B, 64, 48] to clean latents of that shape."""
        t = torch.linspace(1, 0, steps + 1, device=noise.device)
        sigmas = SHIFT * t / (1 + (SHIFT - 1) * t)
        latents = noise
        for now, after in itertools.pairwise(sigmas):
            sigma = now.expand(len(noise))
            velocity = self.velocity(self.transformer, latents, sigma, conditions)
            latents = latents + (after - now) * velocity
        return latents

    def save(self, directory: Path, code: PatchCode, **facts: Any) -> None:
        """Writes the generator: the transformer in diffusers' format, and what belongs to it.

        Args:
            directory: Made if needed.
            code: Its latents.
            **facts: How it was trained; kept in generator.json.
        """
        directory.mkdir(parents=True, exist_ok=True)
        self.transformer.save_pretrained(str(directory / "transformer"))
        save_file({"weight": self.words.weight.detach().contiguous()}, directory / FILES[1])
        save_file({k: v.contiguous() for k, v in code.tensors().items()}, directory / FILES[2])
        about = {"task": self.task, "vocabulary": list(VOCABULARY), **facts}
        (directory / FILES[0]).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")

    @staticmethod
    def load(directory: Path) -> tuple[ShapesGenerator, PatchCode]:
        """Reads what `save` wrote.

        Raises:
            ArrFastError: A file is missing, or the vocabulary is another one.
        """
        from diffusers import FluxTransformer2DModel

        for name in FILES:
            if not (directory / name).is_file():
                raise ArrFastError(
                    f"no shapes generator in {directory}: {name} is missing; make one with "
                    "python -m arr_fast.shapes.train_generator --out RUN"
                )
        about = json.loads((directory / FILES[0]).read_text(encoding="utf-8"))
        if about["vocabulary"] != list(VOCABULARY):
            raise ArrFastError(f"{directory} has another vocabulary than this version: retrain it")
        loaded: Any = FluxTransformer2DModel.from_pretrained(str(directory / "transformer"))
        sizes = {name: loaded.config[name] for name in TRANSFORMER_CONFIG}
        generator = ShapesGenerator(about["task"], sizes=sizes)
        generator.words.weight.data.copy_(load_file(directory / FILES[1])["weight"])
        generator.transformer.load_state_dict(loaded.state_dict())
        return generator, PatchCode.from_tensors(load_file(directory / FILES[2]))
