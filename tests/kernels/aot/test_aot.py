"""Ahead-of-time compilation of the shipped configurations: budgets, and that a broken budget is
seen.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arr_fast.cli.kernels import kernels_app
from arr_fast_kernels import aot
from arr_fast_kernels.configs import ARCHS
from arr_fast_kernels.specs import Case, attention_case, cases


def unique(work: list[Case]) -> list[Case]:
    """One case per binary: shapes that share constants share it."""
    found = {}
    for case in work:
        constants = tuple(sorted(case.constants.items()))
        found.setdefault((case.arch, case.kernel, case.dtype, constants), case)
    return list(found.values())


# One binary of each kernel family and architecture; the rest is marked slow.
REDUCED = [
    case
    for arch in ARCHS
    for case in unique(cases(arch, ("bf16",), reduced=True))
    if case.kernel in ("_prefix_attention_kernel", "_rpo_backward_kernel")
    or (case.kernel == "_vocab_kernel" and arch == "sm_90")
]
FULL = [
    case
    for arch in ARCHS
    for case in unique(cases(arch, ("fp16", "bf16", "fp32")))
    if case not in REDUCED
]


def identify(case: Case) -> str:
    return f"{case.arch}-{case.kernel.strip('_')}-{case.shape}-{case.dtype}".replace(" ", "_")


@pytest.mark.parametrize("case", REDUCED, ids=identify)
def test_budgets(case: Case) -> None:
    row = aot.build_row(case)
    assert row.problems == ()
    assert row.blocks_per_sm >= 1
    if case.matrix and case.arch != "gfx942":
        assert row.resources.sass_matrix and row.resources.sass_async_copies


def test_sass_is_counted_by_opcode() -> None:
    """Lines as nvdisasm prints them: predicated ones count, operands and labels do not."""
    sass = """
.text._kernel:
        /*0000*/                   LDC R1, c[0x0][0x37c] ;
        /*00a0*/                   HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24 ;
        /*00b0*/              @!P0 LDGSTS.E.BYPASS.128 [R5], desc[UR8][R2.64] ;
        /*00c0*/              @UP1 UBLKCP.S.G [UR4], [UR6], UR8 ;
        /*1100*/                   MOV R2, `(HGMMA) ;
"""
    assert aot.count_sass(sass, aot.SASS_MATRIX["sm_90"]) == 1
    assert aot.count_sass(sass, aot.SASS_MATRIX["sm_80"]) == 0
    assert aot.count_sass(sass, aot.SASS_ASYNC_COPY) == 2


@pytest.mark.slow
@pytest.mark.parametrize("case", FULL, ids=identify)
def test_budgets_of_everything(case: Case) -> None:
    row = aot.build_row(case)
    assert row.problems == ()
    assert row.blocks_per_sm >= 1 or case.dtype == "fp32"


def test_a_spilling_configuration_is_seen() -> None:
    """128 slots by 64 keys on 4 warps spill on sm_80."""
    case = attention_case("sm_80", "bf16", "qwen3-vl-2b", 16, 8, 128)
    spilling = replace(case, constants=case.constants | {"BLOCK_N": 64}, num_warps=4)
    resources = aot.compile_case(spilling)
    assert resources.spill_bytes > 0
    assert any("bytes of stack" in problem for problem in aot.problems_of(spilling, resources))


def test_problems_name_each_budget() -> None:
    case = attention_case("gfx942", "bf16", "qwen3-vl-2b", 16, 8, 128)
    good = aot.Resources(
        registers=128,
        spill_bytes=0,
        vgpr_spills=0,
        shared=32768,
        matrix=64,
        async_copies=0,
        sass_matrix=None,
        sass_async_copies=None,
    )
    assert aot.problems_of(case, good) == ()
    on_nvidia = attention_case("sm_90", "bf16", "qwen3-vl-2b", 16, 8, 128)
    assert aot.problems_of(on_nvidia, replace(good, sass_matrix=8)) == ()
    (lost,) = aot.problems_of(on_nvidia, replace(good, sass_matrix=0))
    assert lost == "no [HIQ]GMMA in SASS"
    for change, words in (
        ({"spill_bytes": 4}, "bytes of stack"),
        ({"vgpr_spills": 2}, "vgprs spilled"),
        ({"shared": 65537}, "shared memory"),
        ({"matrix": 0}, "no v_mfma"),
    ):
        (problem,) = aot.problems_of(case, replace(good, **change))
        assert words in problem
    few = replace(case, constants=case.constants | {"BLOCK_M": 32})
    assert "BLOCK_M under 64" in aot.problems_of(few, good)
    many = replace(case, extra=case.extra | {"tiles": case.extra["tile_limit"] + 1})
    assert "tiles over" in aot.problems_of(many, good)[0]
    step = next(c for c in cases("gfx942") if c.kernel == "_sde_step_kernel")
    wasteful = replace(step, hbm_bytes=step.least_bytes * 1.2)
    assert aot.problems_of(wasteful, replace(good, matrix=0)) == ("bytes over 1.1x the least",)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check exits with 1 where a budget is broken; --json holds every row."""
    work = [c for c in cases("sm_80", ("bf16",), reduced=True) if c.op in ("sde_step", "rpo_loss")]
    monkeypatch.setattr("arr_fast_kernels.specs.cases", lambda *a, **k: work)
    path = tmp_path / "kernels.json"
    runner = CliRunner()
    arguments = ["--arch", "80", "--json", str(path)]
    done = runner.invoke(kernels_app, ["report", *arguments], catch_exceptions=False)
    assert done.exit_code == 0 and "sde_step" in done.output
    table = json.loads(path.read_text())
    assert table["schema"] == "arr_fast.kernels/1" and table["ok"] is True
    assert [row["kernel"] for row in table["rows"]] == [c.kernel for c in work]
    assert runner.invoke(kernels_app, ["check", *arguments]).exit_code == 0
    work[0] = replace(work[0], hbm_bytes=2 * work[0].least_bytes)
    broken = runner.invoke(kernels_app, ["check", *arguments])
    assert broken.exit_code == 1 and "bytes over 1.1x the least" in broken.output
    assert runner.invoke(kernels_app, ["check", "--arch", "sm_70"]).exit_code == 2


def test_install_time_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setup.py calls writes the same object."""
    work = [c for c in cases("sm_90", ("bf16",), reduced=True) if c.op == "sde_step"]
    monkeypatch.setattr(aot, "cases", lambda arch: work)
    monkeypatch.setattr(aot.os, "cpu_count", lambda: 1)
    aot.write_report(["90"], tmp_path / "deep" / "aot_resources.json")
    table = json.loads((tmp_path / "deep" / "aot_resources.json").read_text())
    assert table["ok"] and {row["arch"] for row in table["rows"]} == {"sm_90"}
