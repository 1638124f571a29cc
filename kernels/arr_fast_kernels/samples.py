"""Latents as B flat samples: what the elementwise kernels need to address them."""

from __future__ import annotations

import torch


def sample_stride(tensor: torch.Tensor) -> tuple[torch.Tensor, int]:
    """Returns a tensor whose samples are each contiguous, and the stride between samples in
    elements.

    A slice over tokens (the edit models' noise prediction) keeps contiguous samples and is not
    copied.
    """
    if not tensor[:1].is_contiguous():
        tensor = tensor.contiguous()
    return tensor, tensor.stride(0)
