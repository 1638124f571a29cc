"""Fixed latents of 64 x 64 pictures: PCA of 8 x 8 patches, 64 tokens of 48 channels.

A linear code that nothing is trained for: fitted once on rendered scenes and saved. Latents are
divided by one number that brings their mean variance to 1, so that an error weighs what it weighs
in pixels, and what is coarse comes out of the noise before what is fine. (Channels whitened by half
left every decision to a narrow band of noise levels; after equal training few shapes were whole.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

SIDE = 64
PATCH = 8
GRID = SIDE // PATCH
TOKENS = GRID * GRID
CHANNELS = 48


@dataclass(frozen=True, slots=True)
class PatchCode:
    """The linear code.

    Attributes:
        mean: float32 [192], of a patch (rows, columns, RGB) in [-1, 1].
        basis: float32 [48, 192], orthonormal rows.
        scale: float32 [], latent = basis (patch - mean) / scale.
    """

    mean: Tensor
    basis: Tensor
    scale: Tensor

    @staticmethod
    def fit(images: Sequence[Image.Image]) -> PatchCode:
        """Fits the code to pictures of SIDE x SIDE pixels."""
        patches = _patches(images).double().flatten(0, 1)
        mean = patches.mean(0)
        centred = patches - mean
        variance, vectors = torch.linalg.eigh(centred.T @ centred / len(centred))
        order = variance.argsort(descending=True)[:CHANNELS]
        # eigh leaves signs open; the largest entry of every row is positive.
        basis = vectors[:, order].T
        largest = basis.gather(1, basis.abs().argmax(1, keepdim=True))
        basis = basis * largest.sign()
        scale = variance[order].mean().sqrt()
        return PatchCode(mean.float(), basis.float(), scale.float())

    def encode(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as latents: float32 [B, 64, 48] on the code's device.

        Raises:
            ValueError: A picture of another size.
        """
        patches = _patches(images).to(self.mean.device)
        latents: Tensor = (patches - self.mean) @ self.basis.T / self.scale
        return latents

    def decode(self, latents: Tensor) -> list[Image.Image]:
        """Latents [B, 64, 48] as pictures; values outside the range are clipped."""
        patches = (latents.float() * self.scale) @ self.basis + self.mean
        grid = patches.view(-1, GRID, GRID, PATCH, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
        pixels = ((grid.reshape(-1, SIDE, SIDE, 3).clamp(-1, 1) + 1) * 127.5).round()
        return [Image.fromarray(p) for p in pixels.to(torch.uint8).cpu().numpy()]

    def tensors(self) -> dict[str, Tensor]:
        """What `from_tensors` reads."""
        return {"mean": self.mean, "basis": self.basis, "scale": self.scale}

    @staticmethod
    def from_tensors(tensors: dict[str, Tensor]) -> PatchCode:
        """The inverse of `tensors`."""
        return PatchCode(tensors["mean"], tensors["basis"], tensors["scale"])

    def to(self, device: torch.device | str) -> PatchCode:
        """Moves the code."""
        return PatchCode(self.mean.to(device), self.basis.to(device), self.scale.to(device))


def _patches(images: Sequence[Image.Image]) -> Tensor:
    """float32 [B, 64, 192] in [-1, 1]."""
    for number, image in enumerate(images):
        if image.size != (SIDE, SIDE):
            raise ValueError(
                f"images[{number}] is {image.width} x {image.height}, expected {SIDE} x {SIDE}"
            )
    stack = np.stack([np.asarray(image.convert("RGB")) for image in images])
    pixels = torch.from_numpy(stack).float() / 127.5 - 1
    grid = pixels.view(-1, GRID, PATCH, GRID, PATCH, 3).permute(0, 1, 3, 2, 4, 5)
    return grid.reshape(-1, TOKENS, PATCH * PATCH * 3)
