"""Benchmark rows: one per measurement, to and from CSV."""

from __future__ import annotations

import csv
import os
import platform
import subprocess
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

SCHEMA_VERSION = 1


@dataclass(frozen=True, slots=True)
class Row:
    """One engine on one workload.

    Attributes:
        model, workload, engine: What ran.
        criteria, n_pairs, orders, images, group, height, width, prefix_tokens, leaf_tokens,
            verdicts: The workload's shape.
        gate: "passed", or "none" for a cost-only engine.
        gate_difference: Largest difference from plain transformers.
        gate_spread: Standard deviation of the reference's log-odds.
        repeats: Timed runs.
        seconds, seconds_min, seconds_max: Median, least and most seconds of one run.
        verdicts_per_second: From the median.
        ratio_to_ours: Median over repeats of seconds / seconds of `ours` in the same repeat.
        packed_tokens: Decoder rows that `ours` computed.
        decoder_seconds: Median decoder seconds of `ours`.
        gemm_gflops: Measured sgemm rate at the model's shapes.
        gemm_share: Executed linear FLOPs / decoder seconds / that rate.
        peak_bytes: Peak memory of one run above the weights.
        dtype, threads, device, torch, transformers, arr_fast, commit, time: Where and when.
        note: What a reader of this engine's numbers has to know.
    """

    model: str
    workload: str
    engine: str
    criteria: int
    n_pairs: int
    orders: str
    images: str
    group: int
    height: int
    width: int
    prefix_tokens: int
    leaf_tokens: int
    verdicts: int
    gate: str
    gate_difference: float | None
    gate_spread: float | None
    repeats: int
    seconds: float
    seconds_min: float
    seconds_max: float
    verdicts_per_second: float
    ratio_to_ours: float | None
    packed_tokens: int | None
    decoder_seconds: float | None
    gemm_gflops: float | None
    gemm_share: float | None
    peak_bytes: int | None
    dtype: str
    threads: int
    device: str
    torch: str
    transformers: str
    arr_fast: str
    commit: str
    time: str
    note: str


def write_csv(rows: Iterable[Row], path: str | os.PathLike[str]) -> None:
    """Appends rows to a CSV file, with a header where the file is new."""
    target = Path(path)
    is_new = not target.exists() or target.stat().st_size == 0
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(Row)])
        if is_new:
            writer.writeheader()
        for row in rows:
            writer.writerow({k: "" if v is None else v for k, v in asdict(row).items()})


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """Rows of a CSV file written by `write_csv`.

    Raises:
        ValueError: The header is not that of this version.
    """
    kinds = get_type_hints(Row)
    with Path(path).open(newline="") as stream:
        reader = csv.DictReader(stream)
        if list(reader.fieldnames or ()) != list(kinds):
            raise ValueError(f"{path}: the columns are not those of benchmark rows")
        return [Row(**{k: _value(v, kinds[k]) for k, v in raw.items()}) for raw in reader]


def environment(threads: int) -> dict[str, Any]:
    """Device, versions, commit and time of a run, as row fields."""
    import torch
    import transformers

    return {
        "dtype": "float32",
        "threads": threads,
        "device": _device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "arr_fast": _own_version(),
        "commit": _commit(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _value(text: str, kind: Any) -> Any:
    options = getattr(kind, "__args__", (kind,))
    if text == "" and type(None) in options:
        return None
    kind = next(option for option in options if option is not type(None))
    return kind(text)


def _own_version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("arr-fast")
    except PackageNotFoundError:
        return "unknown"


def _device_name() -> str:
    info = Path("/proc/cpuinfo")
    names = [
        line.split(":", 1)[1].strip()
        for line in (info.read_text().splitlines() if info.exists() else [])
        if line.startswith("model name")
    ]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str:
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
