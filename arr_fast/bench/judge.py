"""`arr-fast bench judge`: workloads x engines, gated, measured, written to CSV, JSON and PNG."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from arr_fast.bench.acceptance import POINTS, Target, targets
from arr_fast.bench.engines import ENGINE_NAMES, EngineOptions
from arr_fast.bench.gate import GateError
from arr_fast.bench.plot import curves, plot_cost
from arr_fast.bench.random_models import resolve_model
from arr_fast.bench.rows import SCHEMA_VERSION, Row, write_csv
from arr_fast.bench.runner import Point, RunOptions, run_points
from arr_fast.bench.workloads import named

SWEEP = (1, 2, 5, 10, 20, 40, 64)


@dataclass(frozen=True, slots=True)
class JudgeBench:
    """The result of one benchmark.

    Attributes:
        rows: One per engine and workload; empty when the gate failed.
        targets: The acceptance numbers, for `workload="acceptance"`.
        gate_failure: What disagreed, or None.
    """

    rows: tuple[Row, ...]
    targets: tuple[Target, ...]
    gate_failure: str | None

    @property
    def exit_code(self) -> int:
        """0, or 1 when the gate failed."""
        return 0 if self.gate_failure is None else 1

    def to_json(self) -> dict[str, Any]:
        """A JSON-ready object, versioned by `schema`."""
        return {
            "schema": f"arr-fast/bench-judge/{SCHEMA_VERSION}",
            "gate_failure": self.gate_failure,
            "rows": [asdict(row) for row in self.rows],
            "targets": [
                {
                    "what": each.what,
                    "value": each.value,
                    "bound": each.bound,
                    "at_least": each.at_least,
                    "holds": each.holds,
                }
                for each in self.targets
            ],
        }


def run_judge_bench(
    model: str = "random:qwen3_vl-29m",
    workload: str = "design9",
    engines: Sequence[str] = ("ours", "transformers", "transformers-kv-copied"),
    *,
    repeats: int = 5,
    threads: int | None = None,
    memory: bool = True,
    vllm_python: str | None = None,
    judge_options: dict[str, Any] | None = None,
    csv: str | os.PathLike[str] | None = None,
    json_path: str | os.PathLike[str] | None = None,
    png: str | os.PathLike[str] | None = None,
    say: Callable[[str], None] = print,
) -> JudgeBench:
    """Benchmarks judges side by side; prints no speed unless every engine agrees first.

    Args:
        model: A directory, hub id, `builtin:shapes`, or `random:<family>-<size>`.
        workload: Names of `workloads.named`, comma-separated; `<name>-sweep` goes through K =
            1 to 64; `acceptance` measures every point of the design's table.
        engines: Names of `engines.ENGINE_NAMES`. For `acceptance`, engines beyond the table's own
            are measured at `design9`.
        repeats: Timed runs of each point.
        threads: Intra-op threads; None is the number of cores.
        memory: Whether to measure peak memory.
        vllm_python: Interpreter for the `vllm` engine.
        judge_options: Keyword arguments of `Judge.from_pretrained` for `ours`.
        csv, json_path, png: Where to write; rows are appended to the CSV. The plot needs a sweep.
        say: Told one line at a time.

    Returns:
        The rows; `exit_code` is not 0 when the gate failed.

    Raises:
        ValueError: An unknown engine, workload or model name.
        MissingDependencyError: `vllm` was asked for and its interpreter is absent.
    """
    unknown = [name for name in engines if name not in ENGINE_NAMES]
    if unknown:
        raise ValueError(f"unknown engine {unknown[0]!r}; there are {', '.join(ENGINE_NAMES)}")
    count = threads or os.cpu_count() or 1
    options = RunOptions(
        repeats=repeats,
        memory=memory,
        engines=EngineOptions(count, vllm_python, dict(judge_options or {})),
    )
    points = _points(workload, engines)
    directory = _directory(model)
    try:
        rows = run_points(directory, model, points, options, say)
    except GateError as error:
        say(f"gate failed, nothing was timed: {error}")
        result = JudgeBench((), (), str(error))
        _write(result, csv, json_path, None)
        return result
    table = tuple(targets(rows)) if "acceptance" in workload.split(",") else ()
    result = JudgeBench(tuple(rows), table, None)
    for row in rows:
        say(summary(row))
    for each in table:
        say(str(each))
    _write(result, csv, json_path, png)
    return result


def summary(row: Row) -> str:
    """One line about one row."""
    parts = [
        f"{row.workload:22s} {row.engine:23s} {row.seconds:8.3f} s",
        f"{row.verdicts_per_second:8.1f} verdicts/s",
    ]
    if row.ratio_to_ours is not None:
        parts.append(f"{row.ratio_to_ours:6.2f}x ours")
    if row.peak_bytes is not None:
        parts.append(f"{row.peak_bytes / 2**20:7.1f} MiB")
    if row.gemm_share is not None:
        parts.append(f"{100 * row.gemm_share:5.1f} % of sgemm ({row.gemm_gflops:.0f} GFLOP/s)")
    return "  ".join(parts)


def _points(workload: str, engines: Sequence[str]) -> list[Point]:
    points: list[tuple[str, str]] = []
    for name in workload.split(","):
        if name == "acceptance":
            points += POINTS
            points += [(engine, "design9") for engine in engines]
        elif name.endswith("-sweep"):
            base = name.removesuffix("-sweep")
            points += [(engine, f"{base}-K{k}") for k in SWEEP for engine in engines]
        else:
            points += [(engine, name) for engine in engines]
    return [(engine, named(name)) for engine, name in dict.fromkeys(points)]


def _directory(model: str) -> str:
    if model == "builtin:shapes":
        from arr_fast.shapes import judge_directory

        return str(judge_directory())
    return resolve_model(model)


def _write(
    result: JudgeBench,
    csv: str | os.PathLike[str] | None,
    json_path: str | os.PathLike[str] | None,
    png: str | os.PathLike[str] | None,
) -> None:
    if csv is not None and result.rows:
        write_csv(result.rows, csv)
    if json_path is not None:
        Path(json_path).write_text(json.dumps(result.to_json(), indent=2) + "\n")
    if png is not None and csv is not None and curves(result.rows):
        plot_cost(csv, png)
