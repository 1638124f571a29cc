"""sde_step: values against the repositories' own formulas, Philox, schema and compilation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from arr_fast.ops.philox import philox_normal, philox_words
from arr_fast.ops.sde_step import (
    StepCoefficients,
    check_sde_step,
    sde_step,
    sde_step_op,
    step_coefficients,
)
from tests.ops.rpo_cases import draw_latents, published_step, sigmas, spread
from tests.ops.rpo_checks import check_step, coefficients_of

KINDS = ["dance_sde", "sde", "cps", "ode"]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("shape", [(3, 127), (4, 2, 63), (2, 3, 30_001)], ids=str)
def test_values(impl: str, kind: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    check_step(impl, kind, shape, dtype)


def test_cps_unnormalised() -> None:
    check_step("torch", "cps", (3, 200), torch.float32, normalised=False)


@pytest.mark.parametrize("kind", KINDS)
def test_coefficients_are_the_published_means(kind: str) -> None:
    """mu = x_scale x + v_scale v is each repository's mean, to fp32 rounding of the
    coefficients."""
    x, v = (t.double() for t in draw_latents((3, 500), torch.float32, 2, 2))
    step = coefficients_of(kind, 3)
    mean, std = published_step(kind, x, v, *sigmas(3))
    got = spread(step.x_scale, x) * x + spread(step.v_scale, x) * v
    assert (got - mean).abs().max() <= 4 * torch.finfo(torch.float32).eps * mean.abs().max()
    torch.testing.assert_close(step.std.double(), std, rtol=1e-7, atol=0)


def test_first_and_last_step() -> None:
    """sigma = 1 takes the second sigma inside the root; sigma' = 0 under ode returns x0."""
    one, next_ = torch.tensor([1.0]), torch.tensor([0.9])
    step = step_coefficients("sde", one, next_, eta=0.7, sigma_after_first=0.95)
    rate = 0.7 * math.sqrt(1 / (1 - 0.95))
    assert step.std.item() == pytest.approx(rate * math.sqrt(0.1), rel=1e-6)
    x, v = draw_latents((1, 20), torch.float32, 2, 2)
    last = step_coefficients("ode", torch.tensor([0.3]), torch.tensor([0.0]))
    x_next, _ = sde_step(x, v, last)
    torch.testing.assert_close(x_next, x - 0.3 * v)


def test_schedule_is_indexed() -> None:
    sigma, sigma_next = sigmas(3)
    schedule = step_coefficients("sde", sigma, sigma_next, eta=0.7)
    alone = step_coefficients("sde", sigma[1:2], sigma_next[1:2], eta=0.7)
    picked = schedule[torch.tensor([1])]
    assert all(
        torch.equal(getattr(picked, n), getattr(alone, n))
        for n in ("x_scale", "v_scale", "std", "dt")
    )


def test_philox_words_equal_numpy() -> None:
    """NumPy's Philox is the 64-bit variant, so the rounds are checked against Python integers."""
    seed, elements = 0x1234_5678_9ABC_DEF0 - 2**62, 50
    words = philox_words(torch.tensor([seed, 0, -1]), elements)
    for row, key in enumerate((seed, 0, -1)):
        for element in (0, 1, 2, 49):
            expected = _philox_by_integers(key & (2**64 - 1), element)
            assert (words[0][row, element].item(), words[1][row, element].item()) == expected[:2]


def test_philox_known_answer() -> None:
    """Random123's published known-answer vector: counter 0, key 0."""
    assert _philox_by_integers(0, 0) == (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)


def test_seeded_noise() -> None:
    """One seed per sample: the same seed gives the same sample in any batch; normals look
    normal."""
    x, v = torch.zeros(3, 40_000), torch.zeros(3, 40_000)
    step = StepCoefficients(*(torch.ones(3) for _ in range(3)), dt=-torch.ones(3))
    seed = torch.tensor([5, 2**40 + 1, 5])
    noise, _ = sde_step(x, v, step, seed=seed)
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[1])
    alone, _ = sde_step(x[:1], v[:1], step[1:2], seed=seed[1:2])
    assert torch.equal(alone[0], noise[1])
    assert torch.equal(noise, philox_normal(seed, 40_000))
    for sample in noise[:2].double().numpy():
        assert abs(sample.mean()) < 4 / math.sqrt(40_000)
        assert abs(sample.var() - 1) < 4 * math.sqrt(2 / 40_000)
        assert abs(np.corrcoef(sample[:-1], sample[1:])[0, 1]) < 4 / math.sqrt(40_000)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_gradient_of_the_reparameterised_sample(dtype: torch.dtype) -> None:
    x, v, noise, weight = draw_latents((3, 60), dtype, 4, 4)
    step = coefficients_of("sde", 3)
    x.requires_grad_()
    v.requires_grad_()
    x_next, log_prob = sde_step(x, v, step, noise=noise)
    assert not log_prob.requires_grad
    grad_x, grad_v = torch.autograd.grad((x_next * weight).sum(), (x, v))
    x64, v64 = (t.detach().double().requires_grad_() for t in (x, v))
    mean, _ = published_step("sde", x64, v64, *sigmas(3))
    exact_x, exact_v = torch.autograd.grad((mean * weight.double()).sum(), (x64, v64))
    for got, exact in ((grad_x, exact_x), (grad_v, exact_v)):
        bound = (torch.finfo(dtype).eps + 8 * torch.finfo(torch.float32).eps) * exact.abs().max()
        assert (got.double() - exact).abs().max() <= bound


def op_arguments(**changes: Any) -> dict[str, Any]:
    x, v, noise = draw_latents((2, 3, 50), torch.float32, 4, 3)
    step = coefficients_of("sde", 2)
    arguments = {
        "x": x,
        "v": v,
        "x_scale": step.x_scale,
        "v_scale": step.v_scale,
        "std": step.std,
        "noise": noise,
        "seed": None,
        "normalised": True,
        "impl": "torch",
    }
    return {**arguments, **changes}


def test_opcheck() -> None:
    arguments = op_arguments()
    torch.library.opcheck(sde_step_op, tuple(arguments.values()))
    arguments["x"].requires_grad_()
    arguments["v"].requires_grad_()
    torch.library.opcheck(sde_step_op, tuple(arguments.values()))
    seeded = op_arguments(noise=None, seed=torch.tensor([1, 2]))
    torch.library.opcheck(sde_step_op, tuple(seeded.values()))


def test_compiled_equals_eager() -> None:
    torch.compiler.reset()

    def step(x: Tensor, v: Tensor, noise: Tensor, *scalars: Tensor) -> tuple[Tensor, Tensor]:
        return sde_step(x * 1.0, v, StepCoefficients(*scalars), noise=noise)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    for shape in ((2, 40), (3, 77)):
        x, v, noise = draw_latents(shape, torch.float32, 4, 3)
        c = coefficients_of("cps", shape[0])
        scalars = (c.x_scale, c.v_scale, c.std, c.dt)
        v.requires_grad_()
        eager, result = step(x, v, noise, *scalars), compiled(x, v, noise, *scalars)
        assert torch.equal(eager[0], result[0]) and torch.equal(eager[1], result[1])
        grads = [torch.autograd.grad(out[0].square().sum(), v)[0] for out in (eager, result)]
        assert torch.equal(*grads)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"v": torch.zeros(2, 3, 49)}, "v must have x's shape"),
        ({"x": torch.zeros(2)}, "x must be"),
        ({"noise": torch.zeros(2, 3, 50, dtype=torch.int32)}, "noise must be float32"),
        ({"seed": torch.tensor([1, 2])}, "noise and seed are both given"),
        ({"noise": None, "seed": torch.tensor([1])}, "seed must be int64"),
        ({"noise": None}, "noise or seed is needed"),
        ({"std": torch.tensor([math.nan, 1.0])}, "std holds NaN"),
        ({"v_scale": torch.ones(3)}, "v_scale must be float32"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_bad_input_is_named(change: dict[str, Any], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        sde_step_op(*op_arguments(**change, impl=impl).values())


def test_an_unknown_impl_is_named() -> None:
    with pytest.raises(ValueError, match="impl must be torch, triton or reference, got 'flash'"):
        sde_step_op(*op_arguments(impl="flash").values())


@pytest.mark.parametrize("name", ["v", "noise", "seed", "x_scale", "v_scale", "std"])
def test_input_on_another_device_is_named(name: str) -> None:
    """The check itself: PyTorch sends a call with a meta tensor to the fake implementation."""
    given = op_arguments()
    if name == "seed":
        given |= {"noise": None, "seed": torch.tensor([1, 2])}
    given[name] = given[name].to("meta")
    keys = ("x", "v", "x_scale", "v_scale", "std", "noise", "seed")
    with pytest.raises(ValueError, match=f"{name} is on meta, .* on cpu"):
        check_sde_step(*(given[key] for key in keys))


@pytest.mark.parametrize(
    ("kind", "sigma", "sigma_next", "eta", "message"),
    [
        ("flow", 0.5, 0.4, 0.3, "kind must be one of"),
        ("sde", math.nan, 0.4, 0.3, "sigma must be in"),
        ("sde", 0.5, math.nan, 0.3, "sigma_next must be in"),
        ("sde", 0.5, 0.6, 0.3, "sigma_next must be in"),
        ("sde", 1.5, 0.6, 0.3, "sigma must be in"),
        ("sde", 1.0, 0.6, 0.3, "sigma_after_first is needed"),
        ("dance_sde", 0.5, 0.4, 0.0, "eta must be finite"),
        ("cps", 0.5, 0.4, math.nan, "eta must be finite"),
    ],
)
def test_bad_coefficients_are_named(
    kind: Any, sigma: float, sigma_next: float, eta: float, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        step_coefficients(kind, torch.tensor([sigma]), torch.tensor([sigma_next]), eta=eta)


def _philox_by_integers(key: int, element: int) -> tuple[int, int, int, int]:
    mask = 2**32 - 1
    counter = [element, 0, 0, 0]
    k0, k1 = key & mask, key >> 32
    for _ in range(10):
        product_0, product_1 = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            (product_1 >> 32) ^ counter[1] ^ k0,
            product_1 & mask,
            (product_0 >> 32) ^ counter[3] ^ k1,
            product_0 & mask,
        ]
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return counter[0], counter[1], counter[2], counter[3]
