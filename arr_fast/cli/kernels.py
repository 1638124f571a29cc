"""`arr-fast kernels report | check`: what the compiler makes of every shipped kernel configuration.

Both compile ahead of time for GPUs that need not be present. `report` prints a table, `check`
prints what breaks a budget and exits with 1 if anything does. `--json` writes one object:

    {"schema": "arr_fast.kernels/1", "triton": version, "ok": bool, "rows": [{op, kernel, shape,
     dtype, arch, gpu, constants, counts, num_warps, num_stages, programs, registers, spill_bytes,
     vgpr_spills, shared, blocks_per_sm, matrix, async_copies, sass_matrix, sass_async_copies,
     program_bytes, flops, least_bytes, bytes, hbm_bytes, bytes_over_least, roofline_us, bound,
     reason, problems}]}

`counts` holds what tile tables of a judging forest say of prefix_attention: tiles and their limit,
and bytes of keys and values that the tiles' paths hold (path), that are requested, that whole
blocks would request (blocks), and that reach HBM (hbm).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from arr_fast_kernels.aot import Row

kernels_app = typer.Typer(
    no_args_is_help=True, help="Compile the kernels for GPUs that need not be present."
)
console = Console()

Archs = Annotated[
    list[str] | None, typer.Option("--arch", help="sm_80, sm_90, sm_100, gfx942; default all.")
]
Dtypes = Annotated[
    list[str] | None, typer.Option("--dtype", help="fp16, bf16, fp32; default fp16 and bf16.")
]
Jobs = Annotated[int, typer.Option(min=1, help="Compiler processes.")]
Reduced = Annotated[bool, typer.Option("--reduced", help="One judge and one latent size.")]
JsonPath = Annotated[Path | None, typer.Option("--json", help="Write the table as one object.")]


@kernels_app.command("report")
def report(
    arch: Archs = None,
    dtype: Dtypes = None,
    jobs: Jobs = 1,
    reduced: Reduced = False,
    json_path: JsonPath = None,
) -> None:
    """Print registers, spills, shared memory, matrix instructions, bytes and roofline times."""
    rows = _compile(arch, dtype, jobs, reduced)
    _write(rows, json_path)
    for name in dict.fromkeys(row.case.arch for row in rows):
        console.print(_table([row for row in rows if row.case.arch == name]))
    console.print(
        "x least: HBM bytes over the least possible. HBM bytes of prefix_attention assume the L2"
        " model of arr_fast_kernels.traffic.attention_traffic; x path: its keys and values, whole"
        " blocks of them, over those on the tiles' paths. Roofline times are bounds, not"
        " measurements."
    )


@kernels_app.command("check")
def check(
    arch: Archs = None,
    dtype: Dtypes = None,
    jobs: Jobs = 1,
    reduced: Reduced = False,
    json_path: JsonPath = None,
) -> None:
    """Exit with 1 if a kernel breaks its budget of spills, shared memory, matrix units or bytes."""
    rows = _compile(arch, dtype, jobs, reduced)
    _write(rows, json_path)
    broken = [row for row in rows if row.problems]
    for row in broken:
        case = row.case
        console.print(
            f"{case.arch} {case.kernel} {case.shape} {case.dtype}: {'; '.join(row.problems)}",
            markup=False,
            soft_wrap=True,
        )
    console.print(f"{len(rows) - len(broken)} of {len(rows)} kernel configurations within budget")
    if broken:
        raise typer.Exit(1)


def _compile(
    archs: Sequence[str] | None, dtypes: Sequence[str] | None, jobs: int, reduced: bool
) -> list[Row]:
    try:
        import triton  # noqa: F401  (its absence is reported as an option error, not a traceback)
    except ImportError:
        raise typer.BadParameter("triton is not installed; it has wheels for Linux only") from None
    from arr_fast.engine.path_forest import tables_of_paths
    from arr_fast_kernels import aot
    from arr_fast_kernels.configs import ARCHS
    from arr_fast_kernels.specs import DTYPES, cases

    unknown = set(dtypes or ()) - set(DTYPES)
    if unknown:
        raise typer.BadParameter(f"--dtype must be one of {', '.join(DTYPES)}, got {unknown}")
    try:
        names = [aot.canonical_arch(name) for name in archs or ARCHS]
    except ValueError as error:
        raise typer.BadParameter(f"--{error}") from None
    chosen = tuple(dtypes or ("fp16", "bf16"))
    work = [
        case for name in names for case in cases(name, tables_of_paths, chosen, reduced=reduced)
    ]
    rows: list[Row] = []
    with typer.progressbar(length=len(work), label="compiling") as bar:
        for row in aot.build_rows(work, jobs=jobs):
            rows.append(row)
            bar.update(1)
    return rows


def _write(rows: Sequence[Row], path: Path | None) -> None:
    if path is None:
        return
    from arr_fast_kernels import aot

    path.write_text(json.dumps(aot.report(rows), indent=1) + "\n")


def _table(rows: Sequence[Row]) -> Table:
    from arr_fast_kernels.roofline import GPUS

    arch = rows[0].case.arch
    is_nvidia = arch.startswith("sm_")
    table = Table(title=f"{arch} ({GPUS[arch].name})", title_justify="left")
    for column in ("kernel", "shape", "dtype"):
        table.add_column(column, no_wrap=True)
    for column in (
        "regs",
        "spill B",
        "shared B",
        "blocks/SM",
        "matrix",
        "async",
        "GFLOP",
        "HBM MB",
        "x least",
        "x path",
        "roofline us",
        "bound",
    ):
        table.add_column(column, justify="right")
    for row in rows:
        case, resources = row.case, row.resources
        table.add_row(
            case.kernel.strip("_").removesuffix("_kernel"),
            case.shape,
            case.dtype,
            str(resources.registers),
            str(resources.spill_bytes),
            str(resources.shared),
            str(row.blocks_per_sm),
            # Of the machine code: SASS, or AMDGCN.
            str((resources.sass_matrix or 0) if is_nvidia else resources.matrix),
            str((resources.sass_async_copies or 0) if is_nvidia else resources.async_copies),
            f"{case.flops / 1e9:.2f}",
            f"{case.hbm_bytes / 1e6:.1f}",
            f"{case.hbm_bytes / case.least_bytes:.2f}",
            f"{case.counts['blocks'] / case.counts['path']:.2f}" if "path" in case.counts else "",
            f"{row.roofline_us:.1f}",
            row.bound if not row.problems else "BROKEN",
        )
    return table
