"""Passes over latents in PyTorch that stay in the CPU's cache: shared by sde_step and rpo_loss.

Eager formulas over whole latents write and re-read a dozen temporaries; here every operation runs on
a block of a sample that fits the second-level cache, into a few reused float32 buffers. On a GPU,
and for samples too small to be worth a Python loop, one block is the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 32k float32 are 128 KiB: one thread's share of an elementwise call, and of its cache.
_BLOCK_PER_THREAD = 32768
_SMALL_SAMPLE = 8192


@dataclass(frozen=True, slots=True)
class Block:
    """What one round of operations covers.

    Attributes:
        sample: The sample, or None for the whole batch.
        inputs: Float32 pieces, [n] of one sample or [B, E]; valid until the next block.
        outputs: Writable pieces of the same shape in their own dtype.
    """

    sample: int | None
    inputs: list[Tensor]
    outputs: list[Tensor]


class Scalars:
    """Float32 [B] numbers as an elementwise call wants them: a Python float or a column.

    Python numbers reach the vectorised scalar kernels; on a GPU they would have to be waited for, and
    there every block is the whole batch.
    """

    def __init__(self, numbers: Tensor) -> None:
        self._column = numbers[:, None]
        self._list = numbers.tolist() if numbers.device.type == "cpu" else None

    def at(self, sample: int | None) -> float | Tensor:
        """The number of one sample, or all as [B, 1]."""
        if sample is None or self._list is None:
            return self._column
        number: float = self._list[sample]
        return number


def blocks(inputs: Sequence[Tensor], outputs: Sequence[Tensor] = ()) -> Iterator[Block]:
    """Walks latents [B, ...] of one shape; inputs of other dtypes arrive cast to float32."""
    flat = [tensor.flatten(1) for tensor in (*inputs, *outputs)]
    batch, elements = flat[0].shape
    count = len(inputs)
    if flat[0].device.type != "cpu" or elements < _SMALL_SAMPLE:
        yield Block(None, [tensor.float() for tensor in flat[:count]], flat[count:])
        return
    step = _BLOCK_PER_THREAD * torch.get_num_threads()
    casts = [
        None if tensor.dtype == torch.float32 else torch.empty(min(step, elements))
        for tensor in flat[:count]
    ]
    for sample in range(batch):
        for pieces in zip(*(tensor[sample].split(step) for tensor in flat), strict=True):
            read = [
                piece if cast is None else cast[: len(piece)].copy_(piece)
                for piece, cast in zip(pieces[:count], casts, strict=True)
            ]
            yield Block(sample, read, list(pieces[count:]))


class Scratch:
    """One float32 buffer, reused by blocks of the same or a smaller size."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def like(self, piece: Tensor) -> Tensor:
        """A buffer of the piece's shape; its old content is lost."""
        if self._buffer is None or self._buffer.numel() < piece.numel():
            self._buffer = torch.empty(piece.numel(), dtype=torch.float32, device=piece.device)
        return self._buffer[: piece.numel()].view(piece.shape)


def add_scaled(base: Tensor, terms: Sequence[tuple[Tensor, float | Tensor]], out: Tensor) -> Tensor:
    """out = base + sum of scale times tensor, term by term in the given order."""
    for tensor, scale in terms:
        if isinstance(scale, Tensor):
            torch.addcmul(base, tensor, scale, out=out)
        else:
            torch.add(base, tensor, alpha=scale, out=out)
        base = out
    return out


def add_square_sums(sums: Tensor, sample: int | None, values: Tensor) -> None:
    """Adds each sample's sum of squares to sums float64 [B]."""
    if sample is None:
        sums += torch.linalg.vecdot(values, values)
    else:
        sums[sample] += torch.dot(values, values)
