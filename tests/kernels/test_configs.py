"""Launch configurations: what the host asks of them, without triton."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from arr_fast.engine.path_forest import tables_of_paths
from arr_fast_kernels.configs import (
    ARCHS,
    HEAD_DIMS,
    arch_of,
    attention_config,
    padded_head_dim,
    rows_per_tile,
)
from arr_fast_kernels.specs import cases

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_rows_per_tile_fill_the_block_for_every_dtype(arch: str, head_dim: int) -> None:
    """Tiles are cut once per batch, before the dtype is known to the kernel: block_m must not
    depend on it.
    """
    blocks = {
        attention_config(arch, head_dim, dtype).block_m
        for dtype in (torch.float16, torch.bfloat16, torch.float32)
    }
    (block_m,) = blocks
    assert block_m >= 64
    for group in (1, 2, 3, 4, 6, 7, 8, 16):
        rows = rows_per_tile(group, head_dim, arch)
        assert rows * group <= block_m < (rows + 1) * group


def test_head_dims() -> None:
    assert [padded_head_dim(d) for d in (16, 64, 65, 96, 128, 129, 256)] == [
        16,
        64,
        128,
        128,
        128,
        256,
        256,
    ]
    with pytest.raises(ValueError, match="q has head dim 257"):
        padded_head_dim(257)
    with pytest.raises(ValueError, match="group must be 1 to"):
        rows_per_tile(200, 128, "sm_90")


def test_a_cpu_tensor_is_refused_outside_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="needs a GPU tensor or TRITON_INTERPRET=1"):
        arch_of(torch.device("cpu"))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert arch_of(torch.device("cpu")) == "interpret"


def test_every_case_has_a_reason_and_moves_at_least_the_least() -> None:
    for arch in ARCHS:
        for case in cases(arch, tables_of_paths, ("fp16", "bf16", "fp32")):
            assert case.reason
            assert case.hbm_bytes >= case.least_bytes * (1 - 1e-9), case.kernel
            assert case.bytes >= case.hbm_bytes * (1 - 1e-9), case.kernel


def test_configs_and_specs_need_no_triton() -> None:
    """The engine asks for rows per tile on machines without triton."""
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import arr_fast_kernels.specs as s, arr_fast_kernels.roofline\n"
        "print(s.rows_per_tile(4, 128, 'sm_90'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT / "kernels",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "32"
