"""Philox-4x32-10 in PyTorch, bit-equal to the generator inside the Triton `sde_step`.

Key = a sample's 64-bit seed, counter = (element index, 0, 0, 0). Source: Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3" (SC 2011); word order and float conversion follow
triton.language.random (triton python/triton/language/random.py).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_ROUND_A, _ROUND_B = 0xD2511F53, 0xCD9E8D57
_KEY_A, _KEY_B = 0x9E3779B9, 0xBB67AE85
# Largest float32 step that keeps (2^31 - 1) * step below 1.
_UNIFORM_STEP = 4.6566127342e-10


def philox_words(seed: Tensor, elements: int) -> tuple[Tensor, Tensor]:
    """The first two of the four words at counters 0 .. elements - 1.

    Args:
        seed: int64 [B].
        elements: Counters per sample, below 2^31.

    Returns:
        Two int64 tensors [B, elements] with values in [0, 2^32).
    """
    key_0, key_1 = (seed & _MASK)[:, None], ((seed >> 32) & _MASK)[:, None]
    word_0 = torch.arange(elements, dtype=torch.int64, device=seed.device)[None, :]
    word_1 = word_2 = word_3 = torch.zeros_like(word_0)
    for _ in range(10):
        # An int64 product wraps modulo 2^64, so its upper half is exact after the shift and mask.
        product_a, product_b = word_0 * _ROUND_A, word_2 * _ROUND_B
        word_0 = ((product_b >> 32) & _MASK) ^ word_1 ^ key_0
        word_2 = ((product_a >> 32) & _MASK) ^ word_3 ^ key_1
        word_1, word_3 = product_b & _MASK, product_a & _MASK
        key_0, key_1 = (key_0 + _KEY_A) & _MASK, (key_1 + _KEY_B) & _MASK
    return word_0, word_1


def philox_normal(seed: Tensor, elements: int) -> Tensor:
    """Standard normals, float32 [B, elements], by Box-Muller from the first two words."""
    uniform_0, uniform_1 = (_uniform(word) for word in philox_words(seed, elements))
    radius = torch.sqrt(-2.0 * torch.log(uniform_0.clamp_(min=1.0e-7)))
    return radius * torch.cos(2.0 * math.pi * uniform_1)


def _uniform(word: Tensor) -> Tensor:
    """Float32 in [0, 1) from a 32-bit word: the signed word's magnitude times 2^-31, just below."""
    signed = torch.where(word >= 2**31, word - 2**32, word)
    return torch.where(signed < 0, -signed - 1, signed).float() * _UNIFORM_STEP
