"""What RPO asks of a generator: the `Policy` protocol and the tensors that cross it.

A policy is a flow-matching model: it predicts v = noise - data at a noise level sigma. Everything
that belongs to one model family (prompt encoding, guidance, latent packing, the VAE) stays behind
the protocol; rollout, loss and training see latents [B, *latent_shape] only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor, nn

# Everything velocity needs beside latents and sigma, one entry per tensor; first dim = item. Shapes
# beyond it are the same for every prompt (padded, with a mask), so chunks of prompts concatenate
# and one compiled graph serves them all.
Conditions = dict[str, Tensor]


@runtime_checkable
class Policy(Protocol):
    """A generator that RPO can train.

    Attributes:
        name: Family and variant, for logs and checkpoints.
        module: The network that is optimised and that `velocity` calls. A trainer may replace it
            by a wrapper of it (DDP).
        latent_shape: Shape of one item's latents, without the batch.
        device: Where latents, sigmas and conditions live.
    """

    name: str
    module: nn.Module
    latent_shape: tuple[int, ...]

    @property
    def device(self) -> torch.device: ...

    def encode(
        self, prompts: Sequence[str], sources: Sequence[Image.Image] | None = None
    ) -> Conditions:
        """Encodes prompts (and source images, for editing), without gradients.

        Args:
            prompts: B prompts or edit instructions.
            sources: B images to edit; None for text-to-image.

        Returns:
            Conditions of B items on the policy's device.

        Raises:
            ValueError: sources given to a text-to-image policy, missing for an editing one, or of
                another number than the prompts.
        """
        ...

    def velocity(self, latents: Tensor, sigma: Tensor, conditions: Conditions) -> Tensor:
        """Predicts v = noise - data; differentiable in the trainable parameters, traceable.

        Guidance belongs here: a guidance embedding, or a second forward for the unconditional
        branch, without gradient.

        Args:
            latents: [B, *latent_shape] in float32.
            sigma: float32 [B] noise levels in (0, 1].
            conditions: As `encode` returns them, B items.

        Returns:
            [B, *latent_shape] in the dtype of the network.
        """
        ...

    def reference(self) -> AbstractContextManager[None]:
        """Within the context `velocity` is the reference policy (adapter off, or a frozen copy)."""
        ...

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Turns clean latents [B, *latent_shape] into B images, without gradients."""
        ...

    def sigmas(self, steps: int) -> Tensor:
        """The noise levels that the model's own pipeline would use: float64 [steps + 1], CPU,
        decreasing from at most 1 to 0."""
        ...

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that are optimised, by their name in the unwrapped network."""
        ...

    def frozen_parts(self) -> Mapping[str, nn.Module]:
        """Text encoders, VAE and the like by name: what a trainer may move off the device while it
        trains. `encode` and `decode` run where their parts are."""
        ...

    def networks(self) -> Sequence[nn.Module]:
        """The trained network and, where there is one, its frozen copy: what sharding splits."""
        ...

    def save(self, directory: Path, weights: Mapping[str, Tensor] | None = None) -> None:
        """Writes what was trained in the format of the model's own library (LoRA weights or the
        whole network).

        Args:
            directory: Where to.
            weights: The whole network's state, where the live one is split over ranks.
        """
        ...

    def load(self, directory: Path) -> None:
        """Reads what `save` wrote into the network in place; parameters keep their identity."""
        ...


def select_conditions(conditions: Conditions, index: Tensor) -> Conditions:
    """Picks items.

    Args:
        conditions: B items.
        index: int64 [N] item numbers; repeats are fine.

    Returns:
        Conditions of N items.
    """
    return {name: tensor.index_select(0, index) for name, tensor in conditions.items()}


def cat_conditions(parts: Sequence[Conditions]) -> Conditions:
    """Joins items of several `encode` calls.

    Raises:
        ValueError: No parts, or parts whose names differ.
    """
    if not parts:
        raise ValueError("cat_conditions needs at least one part")
    names = list(parts[0])
    for number, part in enumerate(parts):
        if set(part) != set(names):
            raise ValueError(f"part {number} has {sorted(part)}, part 0 has {sorted(names)}")
    return {name: torch.cat([part[name] for part in parts]) for name in names}


def map_conditions(conditions: Conditions, **to: Any) -> Conditions:
    """`Tensor.to(**to)` on every tensor, for example to move a prompt cache to another device."""
    return {name: tensor.to(**to) for name, tensor in conditions.items()}


def condition_count(conditions: Conditions) -> int:
    """The number of items.

    Raises:
        ValueError: No tensors, or tensors that disagree.
    """
    counts = {name: tensor.shape[0] for name, tensor in conditions.items()}
    if len(set(counts.values())) != 1:
        raise ValueError(f"conditions must agree on the number of items, got {counts}")
    return next(iter(counts.values()))
