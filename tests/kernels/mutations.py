"""Kernels broken on purpose: a copy of a kernel's file with one expression replaced."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import arr_fast_kernels


def load(name: str, mutation: tuple[str, str], tmp_path: Path) -> ModuleType:
    """The kernel file with one replacement, as a module."""
    source = (Path(arr_fast_kernels.__file__).parent / f"{name}.py").read_text()
    old, new = mutation
    assert source.count(old) >= 1, f"{old!r} is no longer in {name}.py"
    path = tmp_path / f"mutated_{name}.py"
    path.write_text(source.replace(old, new))
    spec = importlib.util.spec_from_file_location(f"mutated_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
