"""Passes over latents in PyTorch that stay in the CPU's cache: shared by sde_step and rpo_loss.

Eager formulas over whole latents write and re-read a dozen temporaries; here every operation runs
on a block of a sample that fits the second-level cache, into a few reused float32 buffers. On a
GPU, and for samples too small to be worth a Python loop, one block is the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 32k float32 are 128 KiB: one thread's share of an elementwise call, and of its cache.
_BLOCK_PER_THREAD = 32768
_SMALL_SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Block:
    """Rows and columns of the flat latents [B, E] that one round of operations covers.

    Attributes:
        samples: The rows.
        elements: The columns.
    """

    samples: slice
    elements: slice


def blocks_of(latents: Tensor) -> Iterator[Block]:
    """Cuts flat latents [B, E] into blocks: one of the whole, or cache-sized pieces of one
    sample."""
    batch, elements = latents.shape
    if latents.device.type != "cpu" or elements < _SMALL_SAMPLE:
        yield Block(slice(0, batch), slice(0, elements))
        return
    step = _BLOCK_PER_THREAD * torch.get_num_threads()
    for sample in range(batch):
        for start in range(0, elements, step):
            yield Block(slice(sample, sample + 1), slice(start, min(start + step, elements)))


class Combination:
    """out = sum_i scale_i tensor_i in float32 over blocks, with per-sample scales.

    Args:
        tensors: Flat latents [B, E] of any floating dtype.
        scales: One float32 [B] per tensor.
    """

    def __init__(self, tensors: Sequence[Tensor], scales: Sequence[Tensor]) -> None:
        self._tensors = tensors
        self._scales = scales
        on_cpu = tensors[0].device.type == "cpu"
        # Python numbers reach the vectorised scalar kernels; a GPU would have to be waited for.
        self._numbers = [s.tolist() for s in scales] if on_cpu else None
        self._cast: Tensor | None = None

    def __call__(self, block: Block, out: Tensor) -> Tensor:
        """Writes the block of the combination into out [samples, elements] and returns it."""
        for number, tensor in enumerate(self._tensors):
            piece = tensor[block.samples, block.elements]
            if number and piece.dtype != torch.float32:
                if self._cast is None or self._cast.shape != out.shape:
                    self._cast = torch.empty_like(out, dtype=torch.float32)
                piece = self._cast.copy_(piece)
            self._accumulate(number, piece, block, out)
        return out

    def _accumulate(self, number: int, piece: Tensor, block: Block, out: Tensor) -> None:
        is_one_sample = block.samples.stop - block.samples.start == 1
        if self._numbers is not None and is_one_sample:
            scale = self._numbers[number][block.samples.start]
            if number:
                out.add_(piece, alpha=scale)
            elif piece.dtype == out.dtype:
                torch.mul(piece, scale, out=out)
            else:
                out.copy_(piece).mul_(scale)
            return
        column = self._scales[number][block.samples, None]
        if number:
            out.addcmul_(piece, column)
        elif piece.dtype == out.dtype:
            torch.mul(piece, column, out=out)
        else:
            out.copy_(piece).mul_(column)


def flat(tensor: Tensor) -> Tensor:
    """[B, ...] -> [B, E], a view wherever the samples are contiguous."""
    return tensor.flatten(1)


def add_square_sums(sums: Tensor, block: Block, values: Tensor) -> None:
    """Adds each row's sum of squares to sums float64 [B]; values is float32 [samples, elements]."""
    if values.shape[0] == 1:
        row = values[0]
        sums[block.samples] += torch.dot(row, row)
    else:
        sums[block.samples] += torch.linalg.vecdot(values, values)
