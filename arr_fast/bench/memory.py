"""Peak memory of one run above the loaded weights, measured in a process of its own.

The child loads the engine, runs a small workload once so that libraries have their buffers, hands
free memory back, notes its resident size, resets the kernel's high-water mark and runs once. The
answer is the high-water mark less the resident size before. Allocations above 64 KiB go straight
to the kernel (MALLOC_MMAP_THRESHOLD_), so that what was freed earlier does not hide a later peak.
Needs Linux (/proc/self/clear_refs).
"""

from __future__ import annotations

import ctypes
import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from arr_fast.bench.engines import EngineOptions, make_engine
from arr_fast.bench.workloads import Workload, build_inputs


def peak_above_weights(
    model_dir: str, engine: str, workload: Workload, options: EngineOptions
) -> int | None:
    """Bytes that one run of a workload needs above the weights (and warm image features).

    Args:
        model_dir: A checkpoint.
        engine: Name of an in-process engine.
        workload: What to run.
        options: As for the timed engine.

    Returns:
        Bytes, or None where the platform has no resettable high-water mark.
    """
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return None
    request = {
        "model": model_dir,
        "engine": engine,
        "workload": dataclasses.asdict(workload),
        "options": dataclasses.asdict(options),
    }
    root = Path(__file__).resolve().parents[2]
    paths = [str(root), os.environ.get("PYTHONPATH", "")]
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    done = subprocess.run(
        [sys.executable, "-m", "arr_fast.bench.memory"],
        input=json.dumps(request),
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"memory measurement of {engine} failed: {done.stderr[-2000:]}")
    return int(json.loads(done.stdout.strip().splitlines()[-1])["peak_bytes"])


def main() -> None:
    """The child: reads a request from standard input, prints one JSON line."""
    import torch
    from transformers import AutoConfig, AutoImageProcessor, AutoTokenizer

    from arr_fast.bench.plain_prompts import PlainPrompts

    request = json.loads(sys.stdin.read())
    options = EngineOptions(**request["options"])
    torch.set_num_threads(options.threads)
    model = request["model"]
    prompts = PlainPrompts(
        AutoTokenizer.from_pretrained(model),
        AutoConfig.from_pretrained(model),
        AutoImageProcessor.from_pretrained(model, backend="pil"),
    )
    workload = Workload(**request["workload"])
    inputs = build_inputs(workload, prompts)
    small = replace(
        workload, n_pairs=1, height=64, width=64, criteria=1, prefix_tokens=None, group=2
    )
    engine = make_engine(request["engine"], options)
    engine.prepare(model)
    first = build_inputs(small, prompts)
    engine.reset(first, warm=False)
    engine.run(first)
    engine.reset(inputs, warm=workload.images == "warm")
    ctypes.CDLL(None).malloc_trim(0)
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    engine.run(inputs)
    print(json.dumps({"peak_bytes": _status("VmHWM") - before}))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main()
