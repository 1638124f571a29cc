"""The Triton `sde_step` under the interpreter: the checks of every impl, and its generator against
Philox in PyTorch."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from arr_fast.ops.philox import philox_normal, philox_words
from arr_fast.ops.sde_step import StepCoefficients, sde_step
from arr_fast_kernels.sde_step import _philox_normal
from tests.ops.rpo_cases import draw_latents
from tests.ops.rpo_checks import check_step, coefficients_of

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


@DTYPES
@pytest.mark.parametrize("kind", ["dance_sde", "sde", "cps", "ode"])
@pytest.mark.parametrize("shape", [(3, 127), (4, 2, 63), (2, 1), (2, 3, 300)], ids=str)
def test_values(kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_step("triton", kind, shape, dtype)


def test_cps_unnormalised() -> None:
    check_step("triton", "cps", (3, 200), torch.float32, normalised=False)


def test_non_contiguous_latents() -> None:
    """Sliced tokens keep contiguous samples; a transposed tensor does not."""
    x, v, noise = draw_latents((2, 90, 4), torch.float32, 4, 3)
    step = coefficients_of("sde", 2)
    plain = sde_step(x, v, step, noise=noise, impl="triton")
    whole = torch.full((2, 130, 4), float("nan"))
    whole[:, :90] = v
    turned = noise.transpose(1, 2).contiguous().transpose(1, 2)
    strided = sde_step(x, whole[:, :90], step, noise=turned, impl="triton")
    assert torch.equal(plain[0], strided[0]) and torch.equal(plain[1], strided[1])


@pytest.mark.parametrize("seeded", [False, True])
def test_scalars_may_have_gaps_and_repeats(seeded: bool) -> None:
    x, v, noise = draw_latents((3, 200), torch.float32, 4, 3)
    step = coefficients_of("sde", 3)
    table = torch.stack([step.x_scale, step.v_scale], 1)
    strided = StepCoefficients(table[:, 0], table[:, 1], step.std[1].expand(3), step.dt)
    seed = torch.tensor([[5, 1], [2**40 + 1, 2], [-7, 3]])[:, 0]
    drawn = {"seed": seed} if seeded else {"noise": noise}
    ours, exact = (sde_step(x, v, strided, **drawn, impl=impl) for impl in ("triton", "reference"))
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-5)


@triton.jit
def _words_kernel(words_ptr, normal_ptr, seed_ptr, BLOCK: tl.constexpr):
    element = tl.arange(0, BLOCK)
    seed = tl.load(seed_ptr + tl.program_id(0))
    word_0, word_1, _, _ = tl.randint4x(seed, element)
    base = tl.program_id(0) * BLOCK
    tl.store(words_ptr + 2 * base + element, word_0.to(tl.int64))
    tl.store(words_ptr + 2 * base + BLOCK + element, word_1.to(tl.int64))
    tl.store(normal_ptr + base + element, _philox_normal(seed, element))


def test_generator_is_bit_equal() -> None:
    seed = torch.tensor([0, 1, -1, 2**40 + 12345, -(2**62)])
    words = torch.zeros(5, 2, 256, dtype=torch.int64)
    normal = torch.zeros(5, 256)
    _words_kernel[(5,)](words, normal, seed, BLOCK=256)
    expected = torch.stack(philox_words(seed, 256), 1)
    assert torch.equal(words, expected)
    assert (normal - philox_normal(seed, 256)).abs().max() <= 2e-6


def test_seeded_step_equals_torch() -> None:
    x, v = draw_latents((3, 300), torch.float32, 4, 2)
    step = coefficients_of("sde", 3)
    seed = torch.tensor([5, 2**40 + 1, -7])
    ours, ours_log_prob = sde_step(x, v, step, seed=seed, impl="triton")
    torchs, torchs_log_prob = sde_step(x, v, step, seed=seed, impl="torch")
    assert (ours - torchs).abs().max() <= 4e-6
    assert (ours_log_prob - torchs_log_prob).abs().max() <= 1e-5
    assert not torch.equal(ours[0], ours[1])


def test_deterministic_step_has_no_log_prob() -> None:
    x, v = draw_latents((2, 50), torch.float32, 4, 2)
    step = StepCoefficients(
        *(torch.ones(2) for _ in range(2)), std=torch.zeros(2), dt=-torch.ones(2)
    )
    x_next, log_prob = sde_step(x, v, step, impl="triton")
    torch.testing.assert_close(x_next, x + v)
    assert bool(log_prob.isnan().all())
