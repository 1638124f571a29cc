"""What importing costs, what it must not shadow, and the one-way arrows between packages."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import arr_fast

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "triton", "transformers", "diffusers", "peft", "PIL", "pydantic", "numpy")


def fresh(code: str, *, cwd: Path = ROOT, blocked: tuple[str, ...] = ()) -> str:
    """Runs code in a new interpreter started in the repository root; returns its output."""
    block = "".join(f"sys.modules[{name!r}] = None\n" for name in blocked)
    path = os.pathsep.join(["", str(ROOT), str(ROOT / "kernels")])
    result = subprocess.run(
        [sys.executable, "-c", f"import sys\n{block}{code}"],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_import_is_lean():
    loaded = fresh(f"import arr_fast; print([m for m in {HEAVY} if m in sys.modules])")
    assert loaded == "[]"


def test_data_types_need_no_torch():
    names = ("arr_fast.rubric", "arr_fast.images", "arr_fast.verdicts", "arr_fast.trace")
    code = f"import importlib\nfor m in {names}: importlib.import_module(m)\n"
    blocked = ("torch", "triton", "transformers", "diffusers", "peft")
    assert fresh(code + "print('ok')", blocked=blocked) == "ok"


@pytest.mark.parametrize("name", [n for n in arr_fast.__all__ if n not in ("Judge", "__version__")])
def test_public_names_resolve(name):
    assert getattr(arr_fast, name).__name__ == name


def test_table_of_public_names_is_whole():
    assert set(arr_fast.__all__) == {*arr_fast._HOMES, "__version__"}
    assert set(arr_fast.__all__) <= set(dir(arr_fast))
    with pytest.raises(AttributeError, match="no attribute 'Jugde'"):
        _ = arr_fast.Jugde


def test_judge_imports_without_triton_and_gpu_libraries():
    code = "from arr_fast import Judge; print(Judge.__name__)"
    assert fresh(code, blocked=("triton", "flash_attn", "xformers", "arr_fast_kernels")) == "Judge"


def test_kernels_is_not_a_package_of_ours():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    code = """
try:
    import kernels
    print(getattr(kernels, "__file__", None))
except ImportError:
    print(None)
"""
    found = fresh(code)
    # Absent, a namespace without a file, or Hugging Face's own: never a file of this repository.
    assert found == "None" or not Path(found).is_relative_to(ROOT / "kernels")


def test_vision_language_models_import_from_the_root():
    modules = (
        "transformers.integrations.hub_kernels",
        "transformers.models.qwen2_vl.modeling_qwen2_vl",
        "transformers.models.qwen2_5_vl.modeling_qwen2_5_vl",
        "transformers.models.qwen3_vl.modeling_qwen3_vl",
    )
    assert fresh(f"import {', '.join(modules)}; print('ok')") == "ok"


def imports_of(path: Path) -> set[str]:
    """Every module that a file imports, at any depth of nesting; relative ones made absolute."""
    package = list(path.relative_to(ROOT).with_suffix("").parts)
    if package[0] == "kernels":
        package = package[1:]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: -node.level]) if node.level else ""
            module = ".".join(filter(None, [base, node.module]))
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
        elif (
            isinstance(node, ast.Call)
            and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
            and node.args
            and isinstance(node.args[0], ast.Constant)
        ):
            found.add(str(node.args[0].value))
    return found


def reaches(path: Path, *targets: str) -> set[str]:
    return {m for m in imports_of(path) for t in targets if m == t or m.startswith(t + ".")}


def sources(*patterns: str) -> list[Path]:
    return sorted(path for pattern in patterns for path in ROOT.glob(pattern))


def test_the_scan_sees_nested_and_relative_imports(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    path = tmp_path / "arr_fast" / "ops" / "x.py"
    path.parent.mkdir(parents=True)
    path.write_text(
        "def f():\n    from ..judge import Judge\n    import torch.nn\n"
        "    import importlib; importlib.import_module('arr_fast_kernels.aot')\n"
    )
    assert {"arr_fast.judge", "torch.nn", "arr_fast_kernels.aot"} <= imports_of(path)
    assert reaches(path, "arr_fast.judge") and not reaches(path, "arr_fast.jud")


LOWER = {
    # The engine finds builtin: and random: checkpoints by name, so it may ask shapes and bench.
    "arr_fast/engine": ("judge", "cli", "serve", "integrations", "rpo"),
    "arr_fast/ops": ("engine", "judge", "cli", "serve", "integrations", "rpo", "bench", "shapes"),
    "arr_fast/rpo": ("judge", "engine", "cli", "serve", "integrations"),
}


@pytest.mark.parametrize("folder", LOWER)
def test_lower_layers_do_not_know_higher_ones(folder):
    targets = [f"arr_fast.{name}" for name in LOWER[folder]]
    bad = {str(p): reaches(p, *targets) for p in sources(f"{folder}/**/*.py")}
    assert not {path: found for path, found in bad.items() if found}


def test_verdict_modules_are_numpy_only():
    names = ("aggregation", "pairwise", "pointwise", "ranking", "verdict_arrays", "verdicts")
    for name in names:
        path = ROOT / "arr_fast" / f"{name}.py"
        assert not reaches(path, "torch", "transformers", "triton", "arr_fast.engine"), path


def test_kernels_import_only_triton_and_torch():
    stdlib = set(sys.stdlib_module_names)
    for path in sources("kernels/arr_fast_kernels/**/*.py"):
        tops = {module.split(".")[0] for module in imports_of(path)}
        assert tops <= stdlib | {"torch", "triton", "arr_fast_kernels"}, path


def test_only_ops_reach_the_kernels_and_the_reference_never_does():
    for path in sources("arr_fast/**/*.py"):
        inside = path.relative_to(ROOT / "arr_fast").parts[0]
        allowed = inside in ("ops", "bench", "cli") and (path.name != "reference.py")
        if not allowed:
            assert not reaches(path, "arr_fast_kernels", "triton"), path


def test_kernels_are_never_imported_at_the_top_of_a_module():
    for path in sources("arr_fast/**/*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            tops = {name.split(".")[0] for name in names}
            assert not tops & {"arr_fast_kernels", "triton", "flash_attn", "xformers"}, path


def test_files_stay_readable():
    long = {
        str(path.relative_to(ROOT)): count
        for path in sources("arr_fast/**/*.py", "kernels/**/*.py")
        if (count := len(path.read_text(encoding="utf-8").splitlines())) > 500
    }
    assert not long
