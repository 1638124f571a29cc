"""The interpreter and the ahead-of-time compiler exclude each other in one process: each tier runs
in its own.

The default suite runs the tests of both tiers that are not marked slow; the full tiers are
`TRITON_INTERPRET=1 pytest -m interpret` and `pytest -m aot`.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run_tier(tier: str, *, interpret: bool, at_least: int) -> None:
    """Runs a tier without its slow tests; fails with its output, or when nothing ran."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    if interpret:
        environment["TRITON_INTERPRET"] = "1"
    command = [sys.executable, "-m", "pytest", f"tests/kernels/{tier}", "-q"]
    done = subprocess.run(
        [*command, "-m", f"{tier} and not slow", "-p", "no:cacheprovider"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,  # a loaded two-core machine takes several times the usual minute
        check=False,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None and int(passed.group(1)) >= at_least, done.stdout[-2000:]
    assert "skipped" not in done.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    ("tier", "interpret", "at_least"), [("interpret", True, 120), ("aot", False, 13)]
)
def test_tier(tier: str, interpret: bool, at_least: int) -> None:
    run_tier(tier, interpret=interpret, at_least=at_least)
