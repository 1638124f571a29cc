"""A schedule with its step coefficients, and noise that depends on what it is for, not on when.

The last step returns the clean latents, whatever the kind: it is deterministic, has no log_prob
and is never trained. Noise is Philox with one seed per (seed, epoch, prompt, candidate, step), so
a trajectory is the same in any batch, chunk or order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from arr_fast.ops.philox import philox_normal
from arr_fast.ops.sde_step import StepCoefficients, StepKind, step_coefficients
from arr_fast.rpo.schedule import check_sigmas, model_times

# In place of a step's number: what the noise of step 0's input, and the choice of steps, are
# keyed by.
INITIAL_NOISE = -1
STEP_CHOICE = -2
_MASK = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """T steps.

    Attributes:
        kind: Of every step but the last.
        sigmas: float64 [T + 1], CPU.
        times: float32 [T], the noise levels that the model is told.
        coefficients: float32 [T] each.
    """

    kind: StepKind
    sigmas: Tensor
    times: Tensor
    coefficients: StepCoefficients

    def __len__(self) -> int:
        return len(self.sigmas) - 1

    def to(self, device: torch.device | str) -> Schedule:
        """Moves what the loop reads to a device."""
        return Schedule(self.kind, self.sigmas, self.times.to(device), self.coefficients.to(device))


def build_schedule(
    sigmas: Tensor, kind: StepKind, eta: float = 0.0, *, floor_times: bool = False
) -> Schedule:
    """Computes the coefficients of a whole schedule, on the CPU.

    Args:
        sigmas: [T + 1], decreasing from at most 1 to 0.
        kind: "dance_sde", "sde", "cps" or "ode".
        eta: The kind's noise level.
        floor_times: See `schedule.model_times`.

    Raises:
        ValueError: A schedule, kind or eta that does not fit.
    """
    values = check_sigmas(sigmas)
    last = step_coefficients("ode", values[-2:-1], values[-1:])
    parts = [last]
    if len(values) > 2:
        parts.insert(
            0,
            step_coefficients(
                kind, values[:-2], values[1:-1], eta=eta, sigma_after_first=float(values[1])
            ),
        )
    coefficients = StepCoefficients(
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("x_scale", "v_scale", "std", "dt")
        )
    )
    return Schedule(kind, values, model_times(values, floor=floor_times), coefficients)


def noise_seed(seed: int, epoch: int, prompt_id: int, candidate: int, step: int) -> int:
    """A 63-bit key of one draw; splitmix64 over the parts (Steele et al., OOPSLA 2014)."""
    state = 0
    for part in (seed, epoch, prompt_id, candidate, step):
        state = (state ^ (part & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def noise_seeds(
    seed: int, epoch: int, prompt_ids: Sequence[int], candidates: int, step: int
) -> Tensor:
    """Keys of one step for P prompts with G candidates each: int64 [P G], candidates fastest."""
    return torch.tensor(
        [
            noise_seed(seed, epoch, prompt, candidate, step)
            for prompt in prompt_ids
            for candidate in range(candidates)
        ],
        dtype=torch.int64,
    )


def initial_noise(
    seed: int,
    epoch: int,
    prompt_ids: Sequence[int],
    candidates: int,
    shape: Sequence[int],
    *,
    shared: bool = False,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Where the trajectories start.

    Args:
        seed: Of the run.
        epoch: Walks over the prompt set so far.
        prompt_ids: P numbers.
        candidates: G.
        shape: Of one item's latents.
        shared: All candidates of a prompt start from the first one's noise.
        device: Where it is drawn; devices agree to 2e-6.

    Returns:
        float32 [P G, *shape].
    """
    seeds = noise_seeds(seed, epoch, prompt_ids, 1 if shared else candidates, INITIAL_NOISE)
    elements = 1
    for size in shape:
        elements *= size
    noise = philox_normal(seeds.to(device), elements).view(len(seeds), *shape)
    return noise.repeat_interleave(candidates, dim=0) if shared else noise


def trained_steps(
    seed: int, epoch: int, prompt_ids: Sequence[int], count: int, window: int
) -> Tensor:
    """Which steps of each prompt's trajectories are trained, drawn without replacement.

    Args:
        seed: Of the run.
        epoch: Walks over the prompt set so far.
        prompt_ids: P numbers; all candidates of a prompt train the same steps.
        count: n, at most `window`.
        window: The steps 0 .. window - 1 are drawn from.

    Returns:
        int64 [P, n], ascending.
    """
    rows = []
    for prompt in prompt_ids:
        generator = torch.Generator().manual_seed(noise_seed(seed, epoch, prompt, 0, STEP_CHOICE))
        rows.append(torch.randperm(window, generator=generator)[:count].sort().values)
    return torch.stack(rows)
