"""rpo_loss: values, gradients, schema and compilation; Triton runs the same checks in
tests/kernels/interpret."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from arr_fast.ops.rpo_loss import (
    RPOLoss,
    check_rpo_loss,
    rpo_loss,
    rpo_loss_backward_op,
    rpo_loss_op,
)
from arr_fast.ops.sde_step import StepCoefficients
from tests.ops.rpo_cases import rpo_inputs
from tests.ops.rpo_checks import check_loss, coefficients_of

SHAPES = [(3, 127), (2, 5, 63), (3, 1), (2, 3, 70_001)]
KL_FORMS = ["none", "latent_mean", "velocity", "log_prob_diff"]


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"]
)
@pytest.mark.parametrize("kl", KL_FORMS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_values_and_gradient(
    impl: str, dtype: torch.dtype, kl: str, shape: tuple[int, ...]
) -> None:
    check_loss(impl, shape, dtype, kl=kl)


@pytest.mark.parametrize("impl", ["torch", "reference"])
@pytest.mark.parametrize("kind", ["dance_sde", "sde", "cps"])
@pytest.mark.parametrize("kl", KL_FORMS)
def test_kinds_and_guard(impl: str, kind: str, kl: str) -> None:
    check_loss(impl, (4, 301), torch.float32, kind=kind, kl=kl, guard=True)
    check_loss(impl, (4, 301), torch.float32, kind=kind, kl=kl, quadrants=True)


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_cps_unnormalised(impl: str) -> None:
    check_loss(impl, (3, 200), torch.float32, kind="cps", normalised=False, clip=(1e-5, 1e-5))


@pytest.mark.parametrize("impl", ["torch", "reference"])
def test_log_prob_diff_needs_no_reference_for_its_gradient(impl: str) -> None:
    check_loss(impl, (3, 200), torch.float32, kl="log_prob_diff", with_ref=False)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_gradient_stops_where_the_clip_binds(sign: float) -> None:
    """A > 0 and rho above the range, or A < 0 and rho below it: no gradient; the other two keep
    it."""
    inputs = rpo_inputs((2, 400), torch.float32, 5, kind="sde")
    rewarding = torch.full((2,), sign)
    shift = torch.tensor([-1.0, 1.0])  # rho about e and 1/e
    grads, result = _loss_and_grad({**inputs, "advantage": rewarding}, shift=shift)
    assert result.clipped.tolist() == [1.0, 1.0]
    bound, free = (0, 1) if sign > 0 else (1, 0)
    assert grads[bound].abs().max() == 0
    assert grads[free].abs().max() > 0


def test_unchanged_policy_has_ratio_one() -> None:
    """The rollout's sde_step and the loss agree bit for bit on log_prob, in fp32 and in bf16
    storage."""
    from arr_fast.ops.sde_step import sde_step

    for dtype in (torch.float32, torch.bfloat16):
        inputs = rpo_inputs((3, 2, 40_000), dtype, 1, kind="dance_sde")
        step = coefficients_of("dance_sde", 3)
        x_next, log_prob = sde_step(
            inputs["x"], inputs["v"], step, noise=torch.randn(3, 2, 40_000), impl="torch"
        )
        result = rpo_loss(
            inputs["v"],
            inputs["x"],
            x_next,
            step,
            log_prob_old=log_prob,
            advantage=torch.ones(3),
            clip_low=0.2,
            clip_high=0.2,
        )
        assert (result.ratio - 1).abs().max() <= 2e-7
        assert torch.equal(result.log_prob, log_prob)


def test_only_the_loss_carries_a_gradient() -> None:
    inputs = rpo_inputs((2, 50), torch.float32, 5, kind="sde")
    inputs["v"].requires_grad_()
    _, result = _loss_and_grad(inputs)
    assert result.loss.requires_grad
    assert not any(getattr(result, n).requires_grad for n in ("log_prob", "ratio", "clipped", "kl"))


def test_sliced_latents() -> None:
    """A slice over tokens, as the edit models give it."""
    inputs = rpo_inputs((2, 90, 4), torch.float32, 5, kind="sde")
    whole = torch.randn(2, 130, 4)
    whole[:, :90] = inputs["v"]
    plain, _ = _loss_and_grad(inputs)
    sliced, _ = _loss_and_grad({**inputs, "v": whole[:, :90]})
    assert torch.equal(plain, sliced)


def test_opcheck() -> None:
    args = op_arguments("torch")
    args["v"].requires_grad_()
    torch.library.opcheck(rpo_loss_op, tuple(args.values()))
    _, stats = rpo_loss_op(*args.values())
    keys = ("v", "x", "x_next", "v_ref", "v_old", "x_scale", "v_scale")
    torch.library.opcheck(
        rpo_loss_backward_op,
        (torch.ones(2), stats.detach(), *(args[k].detach() for k in keys), "torch"),
    )


@pytest.mark.parametrize("kl", KL_FORMS)
def test_eager_calls_equal_the_op(kl: str) -> None:
    """rpo_loss calls past the op's dispatch; the op itself, as a graph calls it, gives the same
    numbers, and a mode that watches tensors still sees the op."""
    arguments = op_arguments("torch") | {"kl": kl}
    seen: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    def direct(v: torch.Tensor) -> RPOLoss:
        names = ("x_scale", "v_scale", "std", "dt")
        rest = {k: a for k, a in arguments.items() if k not in ("v", "x", "x_next", *names)}
        step = StepCoefficients(*(arguments[name] for name in names))
        return rpo_loss(v, arguments["x"], arguments["x_next"], step, **rest)

    grads = []
    for watch in (False, True):
        v = arguments["v"].clone().requires_grad_()
        with Watch() if watch else nullcontext():
            result = direct(v)
        (grad,) = torch.autograd.grad(result.loss.sum(), v)
        grads.append((result.loss.detach(), result.kl, grad))
    assert seen.count("arr_fast.rpo_loss.default") == 1
    v = arguments["v"].clone().requires_grad_()
    loss, stats = rpo_loss_op(*{**arguments, "v": v}.values())
    grads.append((loss.detach(), stats[3].detach(), torch.autograd.grad(loss.sum(), v)[0]))
    for other in grads[1:]:
        assert all(torch.equal(a, b) for a, b in zip(grads[0], other, strict=True))
    (first,) = torch.autograd.grad(direct(v).loss.sum(), v, create_graph=True)
    with pytest.raises(RuntimeError, match="does not require grad"):
        first.sum().backward()


def op_arguments(impl: str, shape: tuple[int, ...] = (2, 3, 50)) -> dict[str, Any]:
    """Arguments of rpo_loss_op, in order, with everything on."""
    inputs = rpo_inputs(shape, torch.float32, 5, kind="sde")
    step = coefficients_of("sde", shape[0])
    return {
        "v": inputs["v"],
        "x": inputs["x"],
        "x_next": inputs["x_next"],
        "v_ref": inputs["v_ref"],
        "v_old": inputs["v_old"],
        "x_scale": step.x_scale,
        "v_scale": step.v_scale,
        "std": step.std,
        "dt": step.dt,
        "log_prob_old": inputs["log_prob_old"],
        "advantage": inputs["advantage"],
        "clip_low": 0.2,
        "clip_high": 0.2,
        "beta": 0.03,
        "kl": "latent_mean",
        "normalised": True,
        "impl": impl,
    }


def test_compiled_equals_eager_and_never_recompiles() -> None:
    """One graph serves every step of the schedule and every batch size."""
    torch.compiler.reset()
    compilations = 0

    def counting_backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compilations
        compilations += 1
        return graph.forward

    def objective(v: Tensor, x: Tensor, x_next: Tensor, v_ref: Tensor, *scalars: Tensor) -> Tensor:
        from arr_fast.ops.sde_step import StepCoefficients

        result = rpo_loss(
            v * 1.0,
            x,
            x_next,
            StepCoefficients(*scalars[:4]),
            log_prob_old=scalars[4],
            advantage=scalars[5],
            clip_low=0.2,
            clip_high=0.2,
            beta=0.03,
            kl="latent_mean",
            v_ref=v_ref,
        )
        return result.loss.mean() + 0.0 * result.ratio.mean()

    for backend in (counting_backend, "aot_eager"):
        compiled = torch.compile(objective, fullgraph=True, dynamic=True, backend=backend)
        for batch, length in ((2, 40), (3, 77), (5, 130)):
            a = op_arguments("torch", (batch, length))
            scalars = [
                a[k] for k in ("x_scale", "v_scale", "std", "dt", "log_prob_old", "advantage")
            ]
            latents = [a[k] for k in ("x", "x_next", "v_ref")]
            v_eager = a["v"].clone().requires_grad_()
            v_compiled = a["v"].clone().requires_grad_()
            eager = objective(v_eager, *latents, *scalars)
            result = compiled(v_compiled, *latents, *scalars)
            eager.backward()
            result.backward()
            assert torch.equal(eager, result)
            torch.testing.assert_close(v_eager.grad, v_compiled.grad, rtol=0, atol=0)
    assert compilations == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3, 49)}, "x must have v's shape"),
        ({"x_next": torch.zeros(2, 3, 50, dtype=torch.float64)}, "x_next must be float32"),
        ({"std": torch.tensor([0.1, 0.0])}, "std must be above 0"),
        ({"std": torch.tensor([0.1, math.nan])}, "std holds NaN"),
        ({"x_scale": torch.tensor([0.1, 1.0], dtype=torch.float64)}, "x_scale must be float32"),
        ({"advantage": torch.ones(3)}, "advantage must be float32"),
        ({"log_prob_old": torch.tensor([math.nan, 0.0])}, "log_prob_old holds NaN"),
        ({"dt": torch.tensor([0.1, -0.1])}, "dt must be below 0"),
        ({"clip_low": -0.1}, "clip_low must be in"),
        ({"clip_high": math.nan}, "clip_low must be in"),
        ({"kl": "k3"}, "kl must be one of"),
        ({"v_ref": None}, "v_ref is needed by"),
        ({"normalised": False}, "v_old turns GRPO-Guard on"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton", "reference"])
def test_bad_input_is_named(change: dict[str, Any], message: str, impl: str) -> None:
    with pytest.raises(ValueError, match=message):
        rpo_loss_op(*{**op_arguments(impl), **change}.values())


def test_an_unknown_impl_is_named() -> None:
    with pytest.raises(ValueError, match="impl must be torch, triton or reference, got 'cuda'"):
        rpo_loss_op(*op_arguments("cuda").values())


LATENTS = ("x", "x_next", "v_ref", "v_old")
SCALARS = ("x_scale", "v_scale", "std", "dt", "log_prob_old", "advantage")


@pytest.mark.parametrize("name", LATENTS + SCALARS)
def test_input_on_another_device_is_named(name: str) -> None:
    """The check itself: PyTorch sends a call with a meta tensor to the fake implementation."""
    given = op_arguments("torch")
    given[name] = given[name].to("meta")
    latents = {key: given[key] for key in ("v", *LATENTS)}
    scalars = {key: given[key] for key in SCALARS}
    with pytest.raises(ValueError, match=f"{name} is on meta, .* on cpu"):
        check_rpo_loss(*latents.values(), scalars, 0.2, 0.2, "latent_mean", True)


def _loss_and_grad(inputs: dict[str, Any], *, shift: Tensor | None = None) -> tuple[Tensor, Any]:
    v = inputs["v"] if inputs["v"].requires_grad else inputs["v"].detach().requires_grad_()
    old = inputs["log_prob_old"]
    result = rpo_loss(
        v,
        inputs["x"],
        inputs["x_next"],
        coefficients_of("sde", len(old)),
        log_prob_old=old if shift is None else old + shift,
        advantage=inputs["advantage"],
        clip_low=0.2,
        clip_high=0.2,
    )
    (grad,) = torch.autograd.grad(result.loss.sum(), v, retain_graph=True)
    return grad, result
