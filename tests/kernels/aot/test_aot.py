"""Ahead-of-time compilation of the shipped configurations: budgets, and that a broken budget is
seen.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from arr_fast.cli.kernels import kernels_app
from arr_fast.engine.path_forest import tables_of_paths
from arr_fast_kernels import aot
from arr_fast_kernels.configs import ARCHS, AttentionConfig
from arr_fast_kernels.specs import Case, attention_case, cases
from arr_fast_kernels.traffic import BuildTables, Tables
from arr_fast_kernels.traffic import Path as TreePath
from tests.kernels.mutations import load


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
    for case in unique(cases(arch, tables_of_paths, ("bf16",), reduced=True))
    if case.kernel in ("_prefix_attention_kernel", "_rpo_backward_kernel")
    or (case.kernel == "_vocab_kernel" and arch == "sm_90")
]
FULL = [
    case
    for arch in ARCHS
    for case in unique(cases(arch, tables_of_paths, ("fp16", "bf16", "fp32")))
    if case not in REDUCED
]


def small_judge(
    arch: str, build: BuildTables = tables_of_paths, config: AttentionConfig | None = None
) -> Case:
    return attention_case(arch, build, "bf16", "qwen3-vl-2b", 16, 8, 128, config)


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
    case = small_judge("sm_80")
    spilling = replace(case, constants=case.constants | {"BLOCK_N": 64}, num_warps=4)
    resources = aot.compile_case(spilling)
    assert resources.spill_bytes > 0
    assert any("bytes of stack" in problem for problem in aot.problems_of(spilling, resources))


GOOD = aot.Resources(
    registers=128,
    spill_bytes=0,
    vgpr_spills=0,
    shared=32768,
    matrix=64,
    async_copies=0,
    sass_matrix=None,
    sass_async_copies=None,
    program_bytes=0,
)


def test_problems_name_each_budget() -> None:
    case = small_judge("gfx942")
    assert aot.problems_of(case, GOOD) == ()
    on_nvidia = small_judge("sm_90")
    assert aot.problems_of(on_nvidia, replace(GOOD, sass_matrix=8)) == ()
    (lost,) = aot.problems_of(on_nvidia, replace(GOOD, sass_matrix=0))
    assert lost == "no [HIQ]GMMA in SASS"
    for change, words in (
        ({"spill_bytes": 4}, "bytes of stack"),
        ({"vgpr_spills": 2}, "vgprs spilled"),
        ({"shared": 65537}, "shared memory"),
        ({"matrix": 0}, "no v_mfma"),
    ):
        (problem,) = aot.problems_of(case, replace(GOOD, **change))
        assert words in problem


def tiles_of_half_the_rows(paths: tuple[TreePath, ...], rows: int) -> Tables:
    return tables_of_paths(paths, rows // 2)


def every_run_twice(paths: tuple[TreePath, ...], rows: int) -> Tables:
    own_start, runs, tiles = tables_of_paths(paths, rows)
    tiles[:, 2:4] *= 2
    return own_start, runs.repeat_interleave(2, 0), tiles


def own_part_from_the_parent(paths: tuple[TreePath, ...], rows: int) -> Tables:
    """Siblings taken for one segment: right to within the mask, but every tile reads them all."""
    own_start, runs, tiles = tables_of_paths(paths, rows)
    for first, count, begin, end, _, _ in tiles.tolist():
        if begin < end:
            own_start[first : first + count] = runs[end - 1, 1] + runs[end - 1, 2]
    return own_start, runs, tiles


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (tiles_of_half_the_rows, r"528 tiles over 272"),
        (every_run_twice, r"key and value bytes 1\.\d\dx tiles x path"),
        (own_part_from_the_parent, r"key and value bytes \d+\.\d\dx tiles x path"),
    ],
)
def test_bad_tile_tables_break_a_budget(build: BuildTables, words: str) -> None:
    (problem,) = aot.problems_of(small_judge("sm_80", build), replace(GOOD, sass_matrix=8))
    assert re.match(words, problem)


def test_bad_block_sizes_break_a_budget() -> None:
    """Blocks of 128 keys are masked too often; 32 slots stream keys too often."""
    keys = small_judge("sm_80", config=AttentionConfig(128, 128, 8, 2, ""))
    (problem,) = aot.problems_of(keys, replace(GOOD, sass_matrix=8))
    assert re.match(r"key and value bytes 1\.\d\dx tiles x path", problem)
    slots = small_judge("sm_80", config=AttentionConfig(32, 32, 4, 2, ""))
    assert aot.problems_of(slots, replace(GOOD, sass_matrix=8)) == ("BLOCK_M under 64",)


def latent_case(kernel: str, dtype: str = "bf16") -> Case:
    work = cases("sm_80", tables_of_paths, (dtype,), reduced=True)
    return next(case for case in work if case.kernel == kernel)


@pytest.mark.parametrize("kernel", aot.LATENT_KERNELS)
def test_a_block_larger_than_a_sample_breaks_the_byte_budget(kernel: str) -> None:
    """Three halves of its lanes are masked: the loads are counted in the compiled kernel."""
    case = latent_case(kernel)
    assert aot.problems_of(case, aot.compile_case(case)) == ()
    wide = replace(case, constants=case.constants | {"BLOCK_E": 131072}, num_warps=32, programs=16)
    problems = aot.problems_of(wide, aot.compile_case(wide))
    assert any(re.match(r"bytes 2\.00x the least, over 1\.1x", text) for text in problems)


MORE_LOADS = {
    "_sde_step_kernel": (
        "    mean_E = x_scale * x_E + v_scale * v_E\n",
        "    mean_E = x_scale * x_E + v_scale * v_E\n"
        "    mean_E += tl.load(v_ptr + element_E, mask=is_element_E, other=0.0)\n",
    ),
    "_rpo_backward_kernel": (
        "    if HAS_REF:\n        ref_scale",
        "    grad_E += tl.load(x_ptr + element_E, mask=is_element_E, other=0.0)\n"
        "    if HAS_REF:\n        ref_scale",
    ),
}


@pytest.mark.parametrize("kernel", MORE_LOADS)
def test_a_kernel_that_reads_more_breaks_the_byte_budget(
    kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = latent_case(kernel)
    module = load(case.op, MORE_LOADS[kernel], tmp_path)
    monkeypatch.setitem(sys.modules, f"arr_fast_kernels.{case.op}", module)
    problems = aot.problems_of(case, aot.compile_case(case))
    assert re.match(r"bytes 1\.2\dx the least, over 1\.1x", problems[0])
    assert re.match(r"requests \d+ bytes where specs\.py says \d+", problems[1])


def test_partial_sums_count() -> None:
    case = latent_case("_sde_step_kernel")
    heavy = replace(case, counts={"finalise_bytes": 0.2 * case.least_bytes})
    (problem,) = aot.problems_of(
        heavy, replace(GOOD, program_bytes=round(case.bytes) // case.programs)
    )
    assert problem == "bytes 1.20x the least, over 1.1x"


def test_bytes_are_counted_in_the_ir() -> None:
    ir = """
    %x = tt.load %p : !tt.ptr<f32> loc(#loc1)
    %y = tt.load %q, %mask, %zero : tensor<1024x!tt.ptr<bf16>> loc(#loc2)
    %z = tt.load %r, %mask, %zero : tensor<32x128x!tt.ptr<f32>> loc(#loc3)
    tt.store %s, %y, %mask : tensor<64x!tt.ptr<i64>> loc(#loc4)
    %w = tt.splat %p : !tt.ptr<f32> -> tensor<64x!tt.ptr<f32>> loc(#loc5)
"""
    assert aot.count_bytes(ir) == 4 + 2 * 1024 + 4 * 32 * 128 + 8 * 64


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """check exits with 1 where a budget is broken; --json holds every row."""
    work = cases("sm_80", tables_of_paths, ("bf16",), reduced=True)
    work = [case for case in work if case.op in ("sde_step", "rpo_loss")]
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
    work[0] = replace(work[0], least_bytes=work[0].least_bytes / 2)
    broken = runner.invoke(kernels_app, ["check", *arguments])
    assert broken.exit_code == 1 and "bytes 2.00x the least" in broken.output
    assert runner.invoke(kernels_app, ["check", "--arch", "sm_70"]).exit_code == 2


def test_install_time_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What setup.py calls writes the same object."""
    work = cases("sm_90", tables_of_paths, ("bf16",), reduced=True)
    work = [case for case in work if case.op == "sde_step"]
    monkeypatch.setattr(aot, "cases", lambda arch, build_tables: work)
    monkeypatch.setattr(aot.os, "cpu_count", lambda: 1)
    aot.write_report(["90"], tmp_path / "deep" / "aot_resources.json", tables_of_paths)
    table = json.loads((tmp_path / "deep" / "aot_resources.json").read_text())
    assert table["ok"] and {row["arch"] for row in table["rows"]} == {"sm_90"}
