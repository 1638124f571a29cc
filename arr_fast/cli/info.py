"""`arr-fast info`: device, versions, what can run here and why the rest cannot."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
from typing import Any

from rich.markup import escape
from rich.table import Table

from arr_fast import __version__
from arr_fast.cli import options as opt
from arr_fast.cli.options import console

PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "diffusers",
    "peft",
    "accelerate",
    "torchao",
    "flash-attn",
    "xformers",
    "numpy",
    "pillow",
)
SCHEMA = 1


def info(device: opt.Device = "auto", json_path: opt.JsonPath = None) -> None:
    """Show the device, versions, implementations and supported model families."""
    with opt.one_line_errors():
        opt.quiet_libraries()
        found = collect(device)
        table = Table("", "", show_header=False, box=None)
        table.add_row("arr-fast", found["arr_fast_version"])
        table.add_row("python", found["python"])
        table.add_row("device", found["device"]["name"])
        table.add_row("dtype (auto)", found["device"]["dtype"])
        for name, version in found["versions"].items():
            table.add_row(name, version or "not installed")
        for name, status in found["impls"].items():
            table.add_row(f"impl {name}", escape(status))
        table.add_row("impl auto", found["auto_impl"])
        table.add_row("families", ", ".join(found["families"]))
        table.add_row("rubrics", ", ".join(found["rubrics"]))
        console.print(table)
        if json_path is not None:
            json_path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def collect(device: str = "auto") -> dict[str, Any]:
    """Returns everything that `info` shows as one JSON-able object."""
    import torch

    from arr_fast.engine.families import FAMILIES
    from arr_fast.engine.model import resolve_device, resolve_dtype
    from arr_fast.ops import impl_status, resolve_impl
    from arr_fast.rubric import Rubric

    chosen = resolve_device(device)
    if chosen.type == "cuda":
        properties = torch.cuda.get_device_properties(chosen)
        name = f"{chosen}: {properties.name}, {properties.total_memory / 2**30:.0f} GiB"
    else:
        name = f"{chosen}: {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
        name += f", {torch.backends.cpu.get_cpu_capability()}"
    return {
        "schema": f"arr_fast.info/{SCHEMA}",
        "arr_fast_version": __version__,
        "python": f"{platform.python_version()} on {platform.system()} {platform.machine()}",
        "device": {
            "name": name,
            "dtype": str(resolve_dtype("auto", chosen)).removeprefix("torch."),
        },
        "versions": {package: _version(package) for package in PACKAGES},
        "impls": impl_status(chosen),
        "auto_impl": resolve_impl("auto", str(chosen)),
        "families": sorted(FAMILIES),
        "rubrics": list(Rubric.builtin_names()),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
