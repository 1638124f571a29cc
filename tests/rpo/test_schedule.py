"""Schedules and step plans against diffusers' scheduler, the repositories' formulas and hashes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.pipelines.flux.pipeline_flux import calculate_shift

from arr_fast.rpo.schedule import check_sigmas, dynamic_shift, model_times, shifted_sigmas
from arr_fast.rpo.sde import (
    build_schedule,
    initial_noise,
    noise_seed,
    noise_seeds,
    trained_steps,
)


@pytest.mark.parametrize("shift", [1.0, 3.0, 0.5])
@pytest.mark.parametrize("steps", [1, 8, 27])
def test_shifted_sigmas_are_the_schedulers(steps: int, shift: float) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / steps, steps))
    assert torch.allclose(shifted_sigmas(steps, shift), scheduler.sigmas.double(), atol=1e-7)


@pytest.mark.parametrize("tokens", [256, 1024, 2025, 4096])
def test_dynamic_shift_is_the_pipelines(tokens: int) -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / 8, 8), mu=calculate_shift(tokens))
    ours = shifted_sigmas(8, dynamic_shift(tokens))
    assert torch.allclose(ours, scheduler.sigmas.double(), atol=1e-6)


def test_published_schedule_of_the_reference() -> None:
    expected = [1, 0.9545, 0.9, 0.8333, 0.75, 0.6429, 0.5, 0.3, 0]
    assert shifted_sigmas(8, 3.0).tolist() == pytest.approx(expected, abs=5e-5)
    floored = model_times(shifted_sigmas(8, 3.0), floor=True)
    assert floored.tolist() == pytest.approx([1.0, 0.954, 0.9, 0.833, 0.75, 0.642, 0.5, 0.3])


@pytest.mark.parametrize(
    ("sigmas", "message"),
    [
        ([1.0], "T >= 1"),
        ([1.0, 1.0, 0.0], "decrease"),
        ([1.2, 0.5, 0.0], r"\(0, 1\]"),
        ([1.0, 0.5, 0.1], r"\(0, 1\]"),
        ([1.0, math.nan, 0.0], "decrease"),
    ],
    ids=["short", "flat", "high", "end", "nan"],
)
def test_bad_sigmas(sigmas: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_sigmas(torch.tensor(sigmas))


@pytest.mark.parametrize("steps", [0, -1])
def test_bad_steps(steps: int) -> None:
    with pytest.raises(ValueError, match="steps"):
        shifted_sigmas(steps)


@pytest.mark.parametrize("kind", ["dance_sde", "sde", "cps", "ode"])
@pytest.mark.parametrize("steps", [1, 2, 8])
def test_last_step_returns_the_clean_latents(kind: str, steps: int) -> None:
    schedule = build_schedule(shifted_sigmas(steps, 3.0), kind, 0.5)  # type: ignore[arg-type]
    sigma = float(schedule.sigmas[-2])
    last = schedule.coefficients[-1:]
    assert float(last.std) == 0.0
    # x0 = x - sigma v
    assert float(last.x_scale) == pytest.approx(1.0, abs=1e-7)
    assert float(last.v_scale) == pytest.approx(-sigma, rel=1e-6)
    stochastic = schedule.coefficients.std[:-1]
    assert bool((stochastic == 0).all() if kind == "ode" else (stochastic > 0).all())


def test_noise_levels_of_the_field() -> None:
    """The injected noise that rl_ecosystem.md 2.2 lists for N = 8, shift 3."""
    sigmas = shifted_sigmas(8, 3.0)
    published = {
        ("dance_sde", 0.3): [0.064, 0.070, 0.078, 0.087, 0.098, 0.113, 0.134],
        ("sde", 0.7): [0.700, 0.749, 0.542, 0.452, 0.397, 0.355, 0.313],
        ("cps", 0.8): [0.908, 0.856, 0.793, 0.713, 0.611, 0.476, 0.285],
    }
    for (kind, eta), levels in published.items():
        schedule = build_schedule(sigmas, kind, eta)  # type: ignore[arg-type]
        assert schedule.coefficients.std[:-1].tolist() == pytest.approx(levels, abs=6e-4)


def test_noise_keys_differ_in_every_part() -> None:
    base = (3, 1, 17, 0, 2)
    keys = {noise_seed(*base)}
    for place in range(5):
        changed = list(base)
        changed[place] += 1
        keys.add(noise_seed(*changed))
    assert len(keys) == 6
    grid = {
        noise_seed(seed, 0, prompt, candidate, step)
        for seed in range(3)
        for prompt in range(50)
        for candidate in range(4)
        for step in range(-2, 8)
    }
    assert len(grid) == 3 * 50 * 4 * 10
    assert all(0 <= key < 2**63 for key in grid)


def test_seeds_are_in_row_order() -> None:
    seeds = noise_seeds(1, 0, [5, 9], 3, 4)
    assert seeds.tolist()[4] == noise_seed(1, 0, 9, 1, 4)


def test_initial_noise_is_normal_and_shared_on_request() -> None:
    own = initial_noise(0, 0, [1, 2], 3, (40, 50))
    shared = initial_noise(0, 0, [1, 2], 3, (40, 50), shared=True)
    assert own.shape == shared.shape == (6, 40, 50)
    assert abs(float(own.mean())) < 0.02 and abs(float(own.std()) - 1) < 0.02
    assert torch.equal(shared[0], shared[2]) and not torch.equal(shared[0], shared[3])
    assert not torch.equal(own[0], own[1])
    assert torch.equal(own[0], shared[0])


def test_trained_steps_are_a_seeded_choice() -> None:
    steps = trained_steps(0, 0, list(range(200)), 4, 7)
    assert steps.shape == (200, 4)
    assert bool((steps[:, 1:] > steps[:, :-1]).all())
    counts = torch.bincount(steps.flatten(), minlength=7)
    assert len(counts) == 7 and int(counts.min()) > 80
    assert torch.equal(steps[17], trained_steps(0, 0, [17], 4, 7)[0])
    assert not torch.equal(steps, trained_steps(0, 1, list(range(200)), 4, 7))
