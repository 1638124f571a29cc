"""The Triton `rpo_loss` under the interpreter: the checks of every impl, forward and backward, and
opcheck."""

from __future__ import annotations

import pytest
import torch

from arr_fast.ops.rpo_loss import rpo_loss, rpo_loss_backward_op, rpo_loss_op
from arr_fast.ops.sde_step import StepCoefficients
from tests.ops.rpo_cases import rpo_inputs
from tests.ops.rpo_checks import check_loss, coefficients_of

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
KL_FORMS = pytest.mark.parametrize("kl", ["none", "latent_mean", "velocity", "log_prob_diff"])


@DTYPES
@KL_FORMS
@pytest.mark.parametrize("shape", [(3, 127), (2, 5, 63), (3, 1), (2, 700)], ids=str)
def test_values_and_gradient(dtype: torch.dtype, kl: str, shape: tuple[int, ...]) -> None:
    check_loss("triton", shape, dtype, kl=kl)


@KL_FORMS
@pytest.mark.parametrize("kind", ["dance_sde", "sde", "cps"])
def test_kinds_and_guard(kind: str, kl: str) -> None:
    check_loss("triton", (2, 301), torch.float32, kind=kind, kl=kl, guard=True)
    check_loss("triton", (4, 301), torch.float32, kind=kind, kl=kl, quadrants=True)


def test_cps_unnormalised() -> None:
    check_loss("triton", (3, 200), torch.float32, kind="cps", normalised=False, clip=(1e-5, 1e-5))


def test_log_prob_diff_needs_no_reference_for_its_gradient() -> None:
    check_loss("triton", (3, 200), torch.float32, kl="log_prob_diff", with_ref=False)


def test_more_blocks_than_one_round_of_the_sum() -> None:
    """137 blocks of 128 elements: the finalising kernel loops twice."""
    check_loss("triton", (1, 137 * 128 - 5), torch.float32, kl="latent_mean")


def test_opcheck() -> None:
    inputs = rpo_inputs((2, 3, 50), torch.float32, 5, kind="sde")
    step = coefficients_of("sde", 2)
    latents = [inputs[n] for n in ("v", "x", "x_next", "v_ref", "v_old")]
    scalars = [
        step.x_scale,
        step.v_scale,
        step.std,
        step.dt,
        inputs["log_prob_old"],
        inputs["advantage"],
    ]
    options = (0.2, 0.2, 0.03, "latent_mean", True, "triton")
    latents[0].requires_grad_()
    torch.library.opcheck(rpo_loss_op, (*latents, *scalars, *options))
    _, stats = rpo_loss_op(*latents, *scalars, *options)
    latents[0].requires_grad_(False)
    torch.library.opcheck(
        rpo_loss_backward_op,
        (torch.ones(2), stats.detach(), *latents, step.x_scale, step.v_scale, "triton"),
    )


@pytest.mark.parametrize("kl", ["latent_mean", "log_prob_diff"])
def test_scalars_may_have_gaps_and_repeats(kl: str) -> None:
    """Columns of tables, and one schedule step expanded over the batch."""
    inputs = rpo_inputs((3, 130), torch.float32, 5, kind="sde")
    step = coefficients_of("sde", 1)
    repeated = StepCoefficients(*(getattr(step, n).expand(3) for n in step.__slots__))
    tables = {n: torch.stack([inputs[n] + 9, inputs[n]], 1) for n in ("log_prob_old", "advantage")}
    results = []
    for impl in ("triton", "reference"):
        v = inputs["v"].clone().requires_grad_()
        result = rpo_loss(
            v,
            inputs["x"],
            inputs["x_next"],
            repeated,
            log_prob_old=tables["log_prob_old"][:, 1],
            advantage=tables["advantage"][:, 1],
            clip_low=0.2,
            clip_high=0.2,
            beta=0.03,
            kl=kl,
            v_ref=inputs["v_ref"],
            v_old=inputs["v_old"],
            impl=impl,
        )
        weights = torch.tensor([[7.0, 0.5], [7.0, 1.0], [7.0, 2.0]])[:, 1]
        grad = torch.autograd.grad(result.loss, v, weights)[0]
        results.append((result.loss, result.log_prob, result.ratio, result.kl, grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_backward_reads_scalars_with_gaps() -> None:
    inputs = rpo_inputs((3, 130), torch.float32, 5, kind="sde")
    step = coefficients_of("sde", 3)
    latents = [inputs[n] for n in ("v", "x", "x_next", "v_ref", "v_old")]
    generator = torch.Generator().manual_seed(0)
    stats = torch.randn(3, 7, generator=generator).T
    columns = torch.stack([step.x_scale + 9, step.x_scale, step.v_scale], 1)
    scalars = (columns[:, 1], columns[:, 2])
    grad_loss = torch.randn(3, 2, generator=generator)[:, 1]
    ours, exact = (
        rpo_loss_backward_op(grad_loss, stats, *latents, *scalars, impl)
        for impl in ("triton", "reference")
    )
    torch.testing.assert_close(ours, exact, rtol=1e-5, atol=1e-6)


def test_equals_torch_with_sliced_latents() -> None:
    inputs = rpo_inputs((2, 90, 4), torch.float32, 5, kind="sde")
    whole = torch.full((2, 130, 4), float("nan"))
    whole[:, :90] = inputs["v"]
    grads = []
    for impl, v in (("triton", whole[:, :90]), ("torch", inputs["v"])):
        leaf = v.detach().requires_grad_()
        result = rpo_loss(
            leaf,
            inputs["x"],
            inputs["x_next"],
            coefficients_of("sde", 2),
            log_prob_old=inputs["log_prob_old"],
            advantage=inputs["advantage"],
            clip_low=0.2,
            clip_high=0.2,
            impl=impl,
        )
        grads.append(torch.autograd.grad(result.loss.mean(), leaf)[0])
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-9)
