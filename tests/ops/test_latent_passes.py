"""The fused passes of large latents: their formulas, when they run, and what happens where they
cannot."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from arr_fast.ops import latent_fused
from arr_fast.ops.rpo_loss import rpo_loss, rpo_loss_backward_op, rpo_loss_op
from arr_fast.ops.rpo_loss_torch import _fused
from arr_fast.ops.sde_step import sde_step
from tests.ops.rpo_cases import draw_latents
from tests.ops.rpo_checks import check_loss, check_step, coefficients_of
from tests.ops.test_rpo_loss import KL_FORMS, op_arguments


@pytest.fixture
def fuse_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small latents take the fused passes too."""
    monkeypatch.setattr(latent_fused, "FUSED_ELEMENTS", 0)


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The fused formulas run as plain PyTorch; the list says which ones ran."""
    ran: list[str] = []

    def plain(formula: latent_fused.Formula) -> latent_fused.Formula:
        ran.append(getattr(formula, "__name__", ""))
        return formula

    monkeypatch.setattr(latent_fused, "_compiled", plain)
    monkeypatch.setattr(latent_fused, "_is_found", lambda *_: True)
    return ran


@pytest.fixture
def messages(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """Log of one test, with nothing remembered from another."""
    latent_fused._log_once.cache_clear()
    with caplog.at_level(logging.WARNING, logger="arr_fast"):
        yield caplog
    latent_fused._failures.clear()


@pytest.mark.usefixtures("fuse_everything")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kl", KL_FORMS)
def test_formulas(kl: str, dtype: torch.dtype, uncompiled: list[str]) -> None:
    check_loss("torch", (3, 127), dtype, kl=kl)
    check_loss("torch", (4, 5, 61), dtype, kl=kl, guard=True)
    check_step("torch", "sde", (3, 127), dtype)
    assert set(uncompiled) == {"error_square_sums", "loss_and_stats", "velocity_gradient"}


def test_every_kind_of_loss_has_graphs_of_its_own() -> None:
    """torch.compile gives up after eight graphs of one code object."""
    kinds = list(itertools.product(KL_FORMS, *[[False, True]] * 3))
    assert len({_fused(*kind).__code__ for kind in kinds}) == len(kinds) == 32


def test_only_large_latents_are_fused(uncompiled: list[str]) -> None:
    small, large = torch.zeros(2, 100), torch.zeros(8, 1024, 64)
    formula = latent_fused.error_square_sums
    assert latent_fused.run_fused(formula, [small] * 3, [torch.ones(2)] * 2) is None
    assert latent_fused.run_fused(formula, [large] * 3, [torch.ones(8)] * 2) is not None
    assert uncompiled == ["error_square_sums"]


@pytest.mark.usefixtures("fuse_everything")
def test_without_a_compiler_the_blocks_run_and_say_so_once(
    monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    for _ in range(2):
        check_loss("torch", (3, 127), torch.float32, kl="latent_mean")
    assert messages.text.count("there is no C++ compiler (no-such-compiler)") == 1


@pytest.mark.usefixtures("fuse_everything")
@pytest.mark.parametrize("variable", ["TORCH_COMPILE_DISABLE", "TORCHDYNAMO_DISABLE"])
def test_torch_compile_can_be_turned_off(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(variable, "1")
    assert latent_fused.why_not_fused() == "torch.compile is disabled"


@pytest.mark.usefixtures("fuse_everything")
def test_a_compiler_that_fails_is_asked_once(
    monkeypatch: pytest.MonkeyPatch, messages: pytest.LogCaptureFixture
) -> None:
    """A real failure of torch.compile: its backend raises."""
    asked = 0

    def broken(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        nonlocal asked
        asked += 1
        raise RuntimeError("Python.h is missing")

    def compiled(formula: latent_fused.Formula) -> Any:
        return torch.compile(formula, fullgraph=True, dynamic=True, backend=broken)

    torch.compiler.reset()
    monkeypatch.setattr(latent_fused, "_compiled", compiled)
    monkeypatch.setattr(latent_fused, "_is_found", lambda *_: True)
    for _ in range(2):
        check_loss("torch", (3, 127), torch.float32, kl="latent_mean")
    assert asked == 1
    assert messages.text.count("torch.compile failed: ") == 1
    assert "Python.h is missing" in messages.text


@pytest.mark.compile
@pytest.mark.usefixtures("fuse_everything")
def test_compiled_passes() -> None:
    """Inductor's own loops: values, gradient, opcheck, no second graph for another shape, and the
    same inside a compiled program."""
    if latent_fused.why_not_fused() is not None:
        pytest.skip(f"fused passes cannot run here: {latent_fused.why_not_fused()}")
    torch.compiler.reset()
    check_loss("torch", (3, 5001), torch.float32, kl="latent_mean")
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for shape in ((2, 5, 1263), (2, 3, 70_001)):
        check_loss("torch", shape, torch.float32, kl="latent_mean")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == before > 0
    check_loss("torch", (3, 127), torch.bfloat16, kl="latent_mean")
    assert latent_fused._failures == []

    arguments = op_arguments("torch")
    arguments |= {"v_old": None}
    arguments["v"].requires_grad_()
    torch.library.opcheck(rpo_loss_op, tuple(arguments.values()))
    _, stats = rpo_loss_op(*arguments.values())
    keys = ("v", "x", "x_next", "v_ref", "v_old", "x_scale", "v_scale")
    latents = [None if arguments[k] is None else arguments[k].detach() for k in keys]
    torch.library.opcheck(rpo_loss_backward_op, (torch.ones(2), stats.detach(), *latents, "torch"))

    def objective(v: torch.Tensor) -> torch.Tensor:
        return rpo_loss_op(v * 1.0, *list(arguments.values())[1:])[0].mean()

    results = []
    for call in (objective, torch.compile(objective, fullgraph=True, dynamic=True)):
        v = arguments["v"].detach().clone().requires_grad_()
        loss = call(v)
        loss.backward()
        results.append((loss.detach(), v.grad))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-9)
    assert latent_fused._failures == []


@pytest.mark.compile
@pytest.mark.parametrize("shape", [(8, 1024, 64), (3, 4099, 64), (2, 70_001, 5)])
@pytest.mark.parametrize("kl", KL_FORMS)
def test_unchanged_policy_has_ratio_one_when_fused(kl: str, shape: tuple[int, ...]) -> None:
    """The loss has a graph of its own, and adds the squares up as the rollout's does: log_prob is
    equal bit for bit from the size on where fusing starts."""
    if latent_fused.why_not_fused() is not None:
        pytest.skip(f"fused passes cannot run here: {latent_fused.why_not_fused()}")
    x, v, noise, change = draw_latents(shape, torch.float32, 3, 4)
    step = coefficients_of("sde", shape[0])
    x_next, log_prob = sde_step(x, v, step, noise=noise)
    result = rpo_loss(
        v,
        x,
        x_next,
        step,
        log_prob_old=log_prob,
        advantage=torch.ones(shape[0]),
        clip_low=0.2,
        clip_high=0.2,
        beta=0.1,
        kl=kl,  # type: ignore[arg-type]
        v_ref=v + 0.01 * change,
    )
    assert latent_fused._failures == []
    assert torch.equal(result.log_prob, log_prob)
    assert (result.ratio - 1).abs().max() <= 2e-7
