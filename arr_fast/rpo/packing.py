"""Decided candidates, packed into micro-batches of one fixed shape.

A row is one trained step of one candidate. Only candidates with an advantage become rows; the last
micro-batch is filled up with rows of weight 0, so that compiled graphs see one shape whatever the
judge decided. Ranks agree on the number of micro-batches by `min_batches`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arr_fast.ops.sde_step import StepCoefficients
from arr_fast.rpo.advantages import Advantages
from arr_fast.rpo.policies.base import Conditions
from arr_fast.rpo.rollout import Trajectories


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """R rows, ready for the training step.

    Attributes:
        latents, next_latents: float32 [R, *latent_shape], before and after the step.
        times: float32 [R], what the model is told.
        coefficients: float32 [R] each.
        log_prob_old: float32 [R].
        advantage: float32 [R].
        weight: float32 [R]; 0 for padding, 1 / (rows of all ranks) otherwise.
        conditions: R items.
        v_old: [R, *latent_shape] velocities of the rollout, or None.
    """

    latents: Tensor
    next_latents: Tensor
    times: Tensor
    coefficients: StepCoefficients
    log_prob_old: Tensor
    advantage: Tensor
    weight: Tensor
    conditions: Conditions
    v_old: Tensor | None


@dataclass(frozen=True, slots=True)
class _Row:
    chunk: int
    sample: int
    step: int


class PackedRows:
    """The rows of one optimizer step; micro-batches are gathered when they are asked for.

    Args:
        chunks: What was sampled.
        chunk_advantages: Per chunk, its prompts' advantages.
        rows_per_batch: R.
        min_batches: At least so many micro-batches, filled with rows of weight 0.

    Attributes:
        rows: Rows with weight.
        log_prob_old: Per row, replaceable by recomputed values.

    Raises:
        ValueError: No chunks, numbers that disagree, or a chunk that no longer fits the first.
    """

    def __init__(
        self,
        chunks: Sequence[Trajectories],
        chunk_advantages: Sequence[Advantages],
        rows_per_batch: int,
        *,
        min_batches: int = 0,
    ) -> None:
        _check(chunks, chunk_advantages, rows_per_batch)
        self.chunks = list(chunks)
        self.rows_per_batch = rows_per_batch
        self._rows: list[_Row] = []
        values: list[float] = []
        for number, (chunk, given) in enumerate(zip(chunks, chunk_advantages, strict=True)):
            candidates = chunk.candidates
            weight, value = given.weight.tolist(), given.value.tolist()
            trained = chunk.trained.tolist()
            for prompt, steps in enumerate(trained):
                for candidate in range(candidates):
                    if weight[prompt][candidate] == 0:
                        continue
                    sample = prompt * candidates + candidate
                    self._rows += [_Row(number, sample, step) for step in steps]
                    values += [value[prompt][candidate]] * len(steps)
        self.rows = len(self._rows)
        self.elements = chunks[0].latents[0, 0].numel()
        batches = max(min_batches, -(-self.rows // rows_per_batch))
        padding = batches * rows_per_batch - self.rows
        self._rows += [self._rows[0] if self.rows else _any_finite_row(chunks)] * padding
        self._advantage = torch.tensor(values + [0.0] * padding, dtype=torch.float32)
        self._counts = torch.tensor([1.0] * self.rows + [0.0] * padding, dtype=torch.float32)
        tables = [chunk.log_probs.cpu() for chunk in chunks]
        self.log_prob_old = torch.tensor(
            [float(tables[r.chunk][r.sample, r.step]) for r in self._rows]
        )

    def __len__(self) -> int:
        return len(self._rows) // self.rows_per_batch

    def batches(self, total_rows: float | None = None) -> Iterator[MicroBatch]:
        """Micro-batches in order.

        Args:
            total_rows: Rows with weight over all ranks, by which the loss is divided (a trainer
                whose gradients are averaged over W ranks passes it divided by W); None: this
                object's.
        """
        divisor = self.rows if total_rows is None else total_rows
        for number in range(len(self)):
            yield self.batch(number, divisor)

    def batch(self, number: int, total_rows: float) -> MicroBatch:
        """One micro-batch; see `batches`."""
        size = self.rows_per_batch
        part = slice(number * size, (number + 1) * size)
        rows = self._rows[part]
        device = self.chunks[0].latents.device
        schedule = self.chunks[0].schedule
        steps = torch.tensor([r.step for r in rows], device=device)
        v_old = None
        if self.chunks[0].velocities is not None:
            v_old = torch.stack([self._velocity(r) for r in rows])
        weight = self._counts[part] / max(total_rows, 1.0)
        return MicroBatch(
            latents=torch.stack([self.chunks[r.chunk].latents[r.sample, r.step] for r in rows]),
            next_latents=torch.stack(
                [self.chunks[r.chunk].latents[r.sample, r.step + 1] for r in rows]
            ),
            times=schedule.times[steps],
            coefficients=schedule.coefficients[steps],
            log_prob_old=self.log_prob_old[part].to(device),
            advantage=self._advantage[part].to(device),
            weight=weight.to(device),
            conditions=self._conditions(rows),
            v_old=v_old,
        )

    def _velocity(self, row: _Row) -> Tensor:
        velocities = self.chunks[row.chunk].velocities
        assert velocities is not None
        return velocities[row.sample, row.step]

    def _conditions(self, rows: Sequence[_Row]) -> Conditions:
        first = self.chunks[0].batch.conditions
        items = [(r.chunk, r.sample // self.chunks[r.chunk].candidates) for r in rows]
        return {
            name: torch.stack([self.chunks[c].batch.conditions[name][p] for c, p in items])
            for name in first
        }


def _any_finite_row(chunks: Sequence[Trajectories]) -> _Row:
    for number, chunk in enumerate(chunks):
        for prompt in chunk.finite.nonzero().flatten().tolist():
            return _Row(number, prompt * chunk.candidates, int(chunk.trained[prompt, 0]))
    return _Row(0, 0, int(chunks[0].trained[0, 0]))


def count_rows(chunks: Sequence[Trajectories], chunk_advantages: Sequence[Advantages]) -> int:
    """Rows with weight, before packing: what ranks exchange to agree on `min_batches`."""
    return sum(
        int(given.weight.sum()) * chunk.trained.shape[1]
        for chunk, given in zip(chunks, chunk_advantages, strict=True)
    )


def _check(
    chunks: Sequence[Trajectories], chunk_advantages: Sequence[Advantages], rows_per_batch: int
) -> None:
    if not chunks:
        raise ValueError("chunks must not be empty")
    if len(chunks) != len(chunk_advantages):
        raise ValueError(
            f"chunk_advantages has {len(chunk_advantages)} items, chunks has {len(chunks)}"
        )
    if rows_per_batch < 1:
        raise ValueError(f"rows_per_batch must be at least 1, got {rows_per_batch}")
    for number, (chunk, given) in enumerate(zip(chunks, chunk_advantages, strict=True)):
        expected = (len(chunk.batch), chunk.candidates)
        if tuple(given.value.shape) != expected:
            raise ValueError(
                f"chunk_advantages[{number}] has shape {tuple(given.value.shape)}, the chunk "
                f"{expected} (P, G)"
            )
        if chunk.latents.shape[1:] != chunks[0].latents.shape[1:]:
            raise ValueError(
                f"chunks[{number}] has latents {tuple(chunk.latents.shape[1:])}, chunks[0] "
                f"{tuple(chunks[0].latents.shape[1:])}"
            )
        if not torch.equal(chunk.schedule.sigmas, chunks[0].schedule.sigmas):
            raise ValueError(f"chunks[{number}] was sampled on another schedule than chunks[0]")
