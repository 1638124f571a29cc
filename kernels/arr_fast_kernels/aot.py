"""Compiles every case ahead of time for GPUs that need not be present, and reads what the compiler
made of it.

NVIDIA: registers, stack and shared memory from `cuobjdump --dump-resource-usage` on the cubin
(spills live in the stack frame, so stack 0 is no spill), instructions from PTX and, as ptxas left
them, from nvdisasm's SASS; both tools come with triton. AMD: the metadata and instructions of the
AMDGCN text, which is the machine code. Bytes that a kernel without loops requests: the loads and
stores of Triton's own IR. The interpreter replaces `triton.jit`, so this module
refuses to run under TRITON_INTERPRET=1. Idea: Triton's own
python/test/unit/language/test_compile_only.py.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from arr_fast_kernels.configs import ARCHS
from arr_fast_kernels.roofline import GPUS, Resources, blocks_per_sm, roofline
from arr_fast_kernels.specs import Case, cases
from arr_fast_kernels.traffic import BuildTables

MATRIX_INSTRUCTION = {
    "sm_80": "mma.sync",
    "sm_90": "wgmma.mma_async",
    "sm_100": "tcgen05.mma",
    "gfx942": "v_mfma",
}
# The machine instructions that ptxas makes of them, whatever their number format.
SASS_MATRIX = {"sm_80": "[HI]MMA", "sm_90": "[HIQ]GMMA", "sm_100": "UTC[HIQO]MMA"}
# cp.async; a bulk copy; a tile copy through a tensor map.
SASS_ASYNC_COPY = "LDGSTS|UBLKCP|UTMALDG"
LATENT_KERNELS = ("_sde_step_kernel", "_rpo_sums_kernel", "_rpo_backward_kernel")
# Bytes over the least possible; key and value bytes over what the tiles' paths hold.
MOST_LATENT_BYTES = 1.1
MOST_KEY_BYTES = 1.15
_CASE_KEYS: tuple[str, ...] = (
    "op",
    "kernel",
    "shape",
    "dtype",
    "arch",
    "num_warps",
    "num_stages",
    "programs",
)
_CASE_KEYS += ("flops", "least_bytes", "bytes", "hbm_bytes", "reason")
ASYNC_COPY = {"sm": r"cp\.async\.c[ag]|cp\.async\.bulk", "gfx": r"buffer_load_dword.* lds"}


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the report: a case, its resources, and the card's roofline."""

    case: Case
    resources: Resources
    blocks_per_sm: int
    roofline_us: float
    bound: str
    problems: tuple[str, ...]

    def as_json(self) -> dict[str, Any]:
        """Returns the line as plain data."""
        return {
            **{key: getattr(self.case, key) for key in _CASE_KEYS},
            "constants": dict(self.case.constants),
            "counts": dict(self.case.counts),
            **asdict(self.resources),
            "blocks_per_sm": self.blocks_per_sm,
            "gpu": GPUS[self.case.arch].name,
            "roofline_us": self.roofline_us,
            "bound": self.bound,
            "bytes_over_least": self.case.hbm_bytes / self.case.least_bytes,
            "problems": list(self.problems),
        }


def compile_case(case: Case) -> Resources:
    """Compiles one case for its architecture.

    Raises:
        RuntimeError: called under the interpreter.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise RuntimeError("ahead-of-time compilation cannot run under TRITON_INTERPRET=1")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(f"arr_fast_kernels.{case.op}"), case.kernel)
    signature: dict[str, str] = {}
    attributes: dict[tuple[int, ...], list[list[object]]] = {}
    for index, name in enumerate(kernel.arg_names):
        signature[name] = "constexpr" if name in case.constants else case.types[name]
        if signature[name].startswith("*") or name in case.aligned:
            attributes[(index,)] = [["tt.divisibility", 16]]
    target = GPUTarget("cuda", int(case.arch[3:]), 32)
    if case.arch.startswith("gfx"):
        target = GPUTarget("hip", case.arch, 64)
    compiled = triton.compile(
        ASTSource(kernel, signature, case.constants, attributes),
        target=target,
        options={
            "num_warps": case.num_warps,
            "num_stages": case.num_stages,
            "enable_fp_fusion": True,
        },
    )
    shared = int(compiled.metadata.shared)
    if case.arch.startswith("gfx"):
        resources = _read_amdgcn(compiled.asm["amdgcn"], shared)
    else:
        resources = _read_cubin(compiled.asm["cubin"], compiled.asm["ptx"], case.arch, shared)
    return replace(resources, program_bytes=count_bytes(compiled.asm["ttir"]))


# Shapes that share constants share a binary: it is taken apart once.
@lru_cache(maxsize=32)
def _read_cubin(cubin: bytes, ptx: str, arch: str, shared: int) -> Resources:
    import triton

    tools = triton.knobs.nvidia
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _output_of(tools.cuobjdump.path, "--dump-resource-usage", file.name)
        sass = _output_of(tools.nvdisasm.path, "--print-code", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage: {usage!r}")
    registers, stack, _, local = map(int, found.groups())
    return Resources(
        registers=registers,
        spill_bytes=stack + local,
        vgpr_spills=0,
        shared=shared,
        matrix=ptx.count(MATRIX_INSTRUCTION[arch]),
        async_copies=len(re.findall(ASYNC_COPY["sm"], ptx)),
        sass_matrix=count_sass(sass, SASS_MATRIX[arch]),
        sass_async_copies=count_sass(sass, SASS_ASYNC_COPY),
        program_bytes=0,
    )


def _output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def count_sass(sass: str, opcode: str) -> int:
    """Instructions of nvdisasm's text whose opcode matches; a predicate may stand before it."""
    return len(re.findall(rf"^\s*/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?(?:{opcode})\b", sass, re.M))


def count_bytes(ttir: str) -> int:
    """Bytes of every load and store of Triton's IR, each once; masked lanes count."""
    total = 0
    for shape, bits in re.findall(
        r"tt\.(?:load|store) [^:]*: (?:tensor<([\dx]+)x)?!tt\.ptr<[a-z]+(\d+)>", ttir
    ):
        total += math.prod(map(int, shape.split("x"))) * int(bits) // 8 if shape else int(bits) // 8
    return total


def _read_amdgcn(text: str, shared: int) -> Resources:
    def number(key: str) -> int:
        found = re.search(rf"\.{key}:\s+(\d+)", text)
        if found is None:
            raise RuntimeError(f"the AMDGCN metadata has no {key}")
        return int(found.group(1))

    return Resources(
        registers=number("vgpr_count"),
        spill_bytes=number("private_segment_fixed_size"),
        vgpr_spills=number("vgpr_spill_count"),
        shared=shared,
        matrix=text.count(MATRIX_INSTRUCTION["gfx942"]),
        async_copies=len(re.findall(ASYNC_COPY["gfx"], text)),
        sass_matrix=None,
        sass_async_copies=None,
        program_bytes=0,
    )


def problems_of(case: Case, resources: Resources) -> tuple[str, ...]:
    """Broken budgets of one case; fp32 carries no spill and no matrix gate."""
    found = []
    limit = GPUS[case.arch].shared_per_block
    if resources.shared > limit:
        found.append(f"shared memory {resources.shared} over the card's {limit}")
    if case.dtype != "fp32":
        if resources.spill_bytes:
            found.append(f"{resources.spill_bytes} bytes of stack")
        if resources.vgpr_spills:
            found.append(f"{resources.vgpr_spills} vgprs spilled")
        if case.matrix and not resources.matrix:
            found.append(f"no {MATRIX_INSTRUCTION[case.arch]}")
        elif case.matrix and resources.sass_matrix == 0:
            found.append(f"no {SASS_MATRIX[case.arch]} in SASS")
    if case.kernel in LATENT_KERNELS:
        found += _latent_problems(case, resources)
    if case.kernel == "_prefix_attention_kernel":
        found += _attention_problems(case)
    return tuple(found)


def _latent_problems(case: Case, resources: Resources) -> Iterable[str]:
    """What the compiled kernel requests, and what is needed to add its partial sums up."""
    requested = resources.program_bytes * case.programs
    ratio = (requested + case.counts["finalise_bytes"]) / case.least_bytes
    if ratio > MOST_LATENT_BYTES:
        yield f"bytes {ratio:.2f}x the least, over {MOST_LATENT_BYTES}x"
    # Otherwise the report would print bytes that no kernel moves.
    if requested != case.bytes:
        yield f"requests {requested} bytes where specs.py says {case.bytes:.0f}"


def _attention_problems(case: Case) -> Iterable[str]:
    """Tiles and key/value bytes of the engine's tile tables under this case's block sizes."""
    counts = case.counts
    if counts["tiles"] > counts["tile_limit"]:
        yield f"{counts['tiles']:.0f} tiles over {counts['tile_limit']:.0f}"
    ratio = counts["blocks"] / counts["path"]
    if ratio > MOST_KEY_BYTES:
        yield f"key and value bytes {ratio:.2f}x tiles x path, over {MOST_KEY_BYTES}x"
    if int(case.constants["BLOCK_M"]) < 64:
        yield "BLOCK_M under 64"


def build_row(case: Case) -> Row:
    """Compiles one case and judges it."""
    resources = compile_case(case)
    time, bound = roofline(case)
    return Row(
        case=case,
        resources=resources,
        blocks_per_sm=blocks_per_sm(case, resources),
        roofline_us=time,
        bound=bound,
        problems=problems_of(case, resources),
    )


def build_rows(work: Sequence[Case], *, jobs: int = 1) -> Iterable[Row]:
    """Compiles cases in order, in `jobs` processes; equal binaries come from Triton's cache."""
    if jobs <= 1:
        yield from map(build_row, work)
        return
    # A forked child would share the parent's compiler state; each worker starts its own.
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        yield from pool.map(build_row, work)


def canonical_arch(name: str) -> str:
    """Spells an architecture as in ARCHS: "80", "sm80" and "sm_80" are one.

    Raises:
        ValueError: an architecture without shipped configurations.
    """
    text = name.strip().lower().replace("sm_", "").replace("sm", "")
    arch = f"sm_{text}" if text.isdigit() else text
    if arch not in ARCHS:
        raise ValueError(f"arch must be one of {', '.join(ARCHS)}, got {name!r}")
    return arch


def report(rows: Sequence[Row]) -> dict[str, Any]:
    """The documented JSON object of `arr-fast kernels report`."""
    import triton

    return {
        "schema": "arr_fast.kernels/1",
        "triton": triton.__version__,
        "rows": [row.as_json() for row in rows],
        "ok": not any(row.problems for row in rows),
    }


def write_report(archs: Sequence[str], path: Path, build_tables: BuildTables) -> None:
    """Compiles every fp16 and bf16 case of some architectures and writes the table; setup.py calls
    this."""
    work = [case for arch in archs for case in cases(canonical_arch(arch), build_tables)]
    rows = list(build_rows(work, jobs=os.cpu_count() or 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report(rows), indent=1) + "\n")
