"""Passes over latents in PyTorch that stay in the CPU's cache, for sde_step and rpo_loss.

Eager formulas over whole latents write and re-read a dozen temporaries; here every operation runs
on a block of a sample that fits the second-level cache, into a few reused float32 buffers. On a
GPU, and for samples too small to be worth a Python loop, one block is the whole batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# 64k float32 are 256 KiB: smaller blocks pay for calls, larger ones leave the cache.
_BLOCK_PER_THREAD = 65536
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

    Python numbers reach the vectorised scalar kernels; on a GPU they would have to be waited for,
    and there every block is the whole batch.
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
    elements = flat[0].shape[1]
    count = len(inputs)
    if flat[0].device.type != "cpu" or elements < _SMALL_SAMPLE:
        yield Block(None, [tensor.float() for tensor in flat[:count]], flat[count:])
        return
    step = _BLOCK_PER_THREAD * torch.get_num_threads()
    casts = [
        None if tensor.dtype == torch.float32 else torch.empty(min(step, elements))
        for tensor in flat[:count]
    ]
    # Two calls a tensor make all the views; slicing piece by piece would cost as much as the sums.
    columns = zip(*(tensor.split(step, dim=1) for tensor in flat), strict=True)
    for column in columns:
        rows = zip(*(part.unbind(0) for part in column), strict=True)
        for sample, pieces in enumerate(rows):
            read = [
                piece if cast is None else cast[: len(piece)].copy_(piece)
                for piece, cast in zip(pieces, casts, strict=False)
            ]
            yield Block(sample, read, list(pieces[count:]))


class Scratch:
    """One float32 buffer, reused by blocks of the same size."""

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def like(self, piece: Tensor) -> Tensor:
        """A buffer of the piece's shape; its old content is lost."""
        if self._buffer is None or self._buffer.shape != piece.shape:
            self._buffer = torch.empty(piece.shape, dtype=torch.float32, device=piece.device)
        return self._buffer


def add_scaled(base: Tensor, terms: Sequence[tuple[Tensor, float | Tensor]], out: Tensor) -> Tensor:
    """out = base + sum of scale times tensor, term by term in the given order."""
    for tensor, scale in terms:
        if isinstance(scale, Tensor):
            torch.addcmul(base, tensor, scale, out=out)
        else:
            torch.add(base, tensor, alpha=scale, out=out)
        base = out
    return out


class SquareSums:
    """Sums of squares per sample, in float64."""

    def __init__(self, latents: Tensor) -> None:
        self._device = latents.device
        self._numbers = [0.0] * latents.shape[0]
        self._whole: Tensor | None = None

    def add(self, sample: int | None, values: Tensor) -> None:
        """Adds the squares of a block; values is float32 [n] of one sample, or [B, E]."""
        if sample is None:
            self._whole = torch.linalg.vecdot(values, values).double()
        else:
            self._numbers[sample] += torch.dot(values, values).item()

    def total(self) -> Tensor:
        """Float64 [B]."""
        if self._whole is not None:
            return self._whole
        return torch.tensor(self._numbers, dtype=torch.float64, device=self._device)
