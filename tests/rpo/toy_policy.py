"""A policy small enough to check by hand: two linear layers, a frozen copy as the reference."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.rollout import PromptBatch
from arr_fast.rpo.schedule import shifted_sigmas

CONDITION = 6


class ToyNetwork(nn.Module):
    """v = W2 tanh(W1 [x, sigma, condition])."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.first = nn.Linear(elements + 1 + CONDITION, 32)
        self.second = nn.Linear(32, elements)

    def forward(self, latents: Tensor, sigma: Tensor, condition: Tensor) -> Tensor:
        flat = latents.flatten(1)
        dtype = self.first.weight.dtype
        joined = torch.cat([flat.to(dtype), sigma[:, None].to(dtype), condition.to(dtype)], dim=1)
        velocity: Tensor = self.second(self.first(joined).tanh())
        return velocity.view(latents.shape)


class ToyPolicy:
    """A `Policy`."""

    name = "toy"

    def __init__(
        self, latent_shape: tuple[int, ...] = (3, 7), *, dtype: torch.dtype = torch.float32
    ) -> None:
        torch.manual_seed(0)
        elements = torch.Size(latent_shape).numel()
        self.latent_shape = latent_shape
        self.module: nn.Module = ToyNetwork(elements).to(dtype)
        self.frozen = copy.deepcopy(self.module).requires_grad_(False)
        self.decoded = 0

    @property
    def device(self) -> torch.device:
        return torch.device("cpu")

    def encode(
        self, prompts: Sequence[str], sources: Sequence[Image.Image] | None = None
    ) -> Conditions:
        rows = [
            torch.randn(CONDITION, generator=torch.Generator().manual_seed(len(p) * 7 + ord(p[-1])))
            for p in prompts
        ]
        return {"condition": torch.stack(rows)}

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        velocity: Tensor = self.module(latents, sigma, conditions["condition"])
        return velocity

    @contextmanager
    def reference(self) -> Iterator[None]:
        trained, self.module = self.module, self.frozen
        try:
            yield
        finally:
            self.module = trained

    def decode(self, latents: Tensor) -> list[Image.Image]:
        self.decoded += len(latents)
        return [Image.new("L", (2, 2), int(abs(float(x.mean())) * 100) % 256) for x in latents]

    def sigmas(self, steps: int) -> Tensor:
        return shifted_sigmas(steps, 3.0)

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        return {}

    def networks(self) -> Sequence[nn.Module]:
        return [self.module, self.frozen]

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        torch.save(self.module.state_dict(), directory / "toy.pt")

    def load(self, directory: Path) -> None:
        self.module.load_state_dict(torch.load(directory / "toy.pt"))

    def shift_weights(self, scale: float = 0.1) -> None:
        """Moves the trained weights away from the reference."""
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in self.module.parameters():
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(scale * noise.to(parameter.dtype))


def prompt_batch(policy: ToyPolicy, first: int = 0, count: int = 3, epoch: int = 0) -> PromptBatch:
    """Prompts number first .. first + count - 1."""
    ids = tuple(range(first, first + count))
    prompts = tuple(f"prompt {number}" for number in ids)
    return PromptBatch(ids, prompts, policy.encode(prompts), epoch=epoch)
