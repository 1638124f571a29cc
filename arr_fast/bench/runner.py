"""Runs engines on workloads: gate first, then interleaved timed repeats, then memory."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch

from arr_fast.bench.engine_ours import OursEngine
from arr_fast.bench.engine_transformers import PlainEngine
from arr_fast.bench.engines import BenchEngine, EngineOptions, make_engine
from arr_fast.bench.gate import GateError, GateResult, Scale, check, make_reference
from arr_fast.bench.gemm import GemmProbe, linear_shapes
from arr_fast.bench.memory import peak_above_weights
from arr_fast.bench.rows import Row, environment
from arr_fast.bench.workloads import Inputs, Workload, build_inputs

Say = Callable[[str], None]
Point = tuple[str, Workload]


@dataclass(frozen=True, slots=True)
class RunOptions:
    """How a benchmark is run.

    Attributes:
        repeats: Timed runs of every point; an odd number has a plain median.
        warmup: Untimed runs before them (beside the gate's).
        memory: Whether to measure peak memory, in a process of its own per point.
        gate_limit: Most verdicts of a workload that plain transformers recomputes.
        engines: Set-up of the engines.
    """

    repeats: int = 5
    warmup: int = 1
    memory: bool = True
    gate_limit: int = 60
    engines: EngineOptions = field(default_factory=EngineOptions)


@dataclass
class _Measured:
    """What the repeats of one point gave."""

    seconds: list[float] = field(default_factory=list)
    decoder_seconds: list[float] = field(default_factory=list)
    gflops: list[float] = field(default_factory=list)
    packed_tokens: int | None = None
    gate: GateResult | None = None
    peak_bytes: int | None = None


def run_points(
    model_dir: str,
    model_name: str,
    points: Sequence[Point],
    options: RunOptions,
    say: Say = lambda _: None,
) -> list[Row]:
    """Measures every (engine, workload) point side by side.

    Args:
        model_dir: A checkpoint directory.
        model_name: What rows call it.
        points: Engine names and workloads; repeats go round all of them, so that a slow minute
            of the machine meets every point alike.
        options: How to run.
        say: Told one line at a time what happens.

    Returns:
        One row per point, in order.

    Raises:
        GateError: A gated engine disagrees with plain transformers; nothing is timed then.
    """
    torch.set_num_threads(options.engines.threads)
    plain = PlainEngine()
    plain.prepare(model_dir)
    workloads = {workload.name: workload for _, workload in points}
    inputs = {name: build_inputs(each, plain.prompts) for name, each in workloads.items()}
    engines: dict[str, BenchEngine] = {plain.name: plain}
    try:
        for name in dict.fromkeys(engine for engine, _ in points):
            if name not in engines:
                engines[name] = make_engine(name, options.engines)
                engines[name].prepare(model_dir)
        measured = {(engine, each.name): _Measured() for engine, each in points}
        _gate(engines, plain, inputs, measured, options, say)
        _time(engines, inputs, measured, options, say)
    finally:
        for engine in engines.values():
            engine.close()
    if options.memory:
        for (name, workload), result in measured.items():
            if name != "vllm":
                result.peak_bytes = peak_above_weights(
                    model_dir, name, workloads[workload], options.engines
                )
    return [
        _row(model_name, engines[name], inputs[workload.name], measured, options, plain)
        for name, workload in points
    ]


def _gate(
    engines: dict[str, BenchEngine],
    plain: PlainEngine,
    inputs: dict[str, Inputs],
    measured: dict[tuple[str, str], _Measured],
    options: RunOptions,
    say: Say,
) -> None:
    references = {}
    for workload, each in inputs.items():
        plain.reset(each, warm=each.workload.images == "warm")
        references[workload] = make_reference(plain, each, options.gate_limit)
    failures = []
    for (name, workload), result in measured.items():
        engine, each = engines[name], inputs[workload]
        if not engine.gated:
            say(f"no gate for {name}: {engine.note}")
            continue
        if engine is plain:
            # It is the reference; that it agrees with itself says nothing.
            continue
        engine.reset(each, warm=each.workload.images == "warm")
        scale: Scale = "probability" if name == "vllm" else "log_odds"
        verdict = check(name, each, engine.run(each), references[workload], scale)
        say(str(verdict))
        result.gate = verdict
        if not verdict.passed:
            failures.append(str(verdict))
    if failures:
        raise GateError("; ".join(failures))


def _time(
    engines: dict[str, BenchEngine],
    inputs: dict[str, Inputs],
    measured: dict[tuple[str, str], _Measured],
    options: RunOptions,
    say: Say,
) -> None:
    keys = list(measured)
    probes: dict[str, GemmProbe | None] = {}
    for repeat in range(-options.warmup, options.repeats):
        # Every other round goes backwards, so that no point always follows the same neighbour.
        for name, workload in keys if repeat % 2 else reversed(keys):
            engine, each, result = engines[name], inputs[workload], measured[name, workload]
            engine.reset(each, warm=each.workload.images == "warm")
            before = _counters(engine)
            gc.collect()
            started = time.perf_counter()
            engine.run(each)
            seconds = time.perf_counter() - started
            if repeat < 0:
                continue
            result.seconds.append(seconds)
            _note_work(engine, before, each, result, probes)
        say(f"repeat {repeat + 1} of {options.repeats}" if repeat >= 0 else "warm-up done")


def _note_work(
    engine: BenchEngine,
    before: dict[str, float] | None,
    inputs: Inputs,
    result: _Measured,
    probes: dict[str, GemmProbe | None],
) -> None:
    after = _counters(engine)
    if before is None or after is None or not isinstance(engine, OursEngine):
        return
    result.packed_tokens = int(after["rows"] - before["rows"])
    result.decoder_seconds.append(after["decoder_seconds"] - before["decoder_seconds"])
    name = inputs.workload.name
    if name not in probes:
        probes[name] = _probe(engine, result.packed_tokens)
    probe = probes[name]
    if probe is not None:
        result.gflops.append(probe.measure())


def _probe(engine: OursEngine, rows: int) -> GemmProbe | None:
    assert engine.judge is not None
    try:
        return GemmProbe(linear_shapes(engine.judge.engine.adapter.decoder), rows)
    except ValueError:
        return None


def _counters(engine: BenchEngine) -> dict[str, float] | None:
    if not isinstance(engine, OursEngine) or engine.judge is None:
        return None
    stats = engine.judge.stats()
    return {name: float(stats[name]) for name in ("rows", "decoder_seconds", "verdicts")}


def _row(
    model: str,
    engine: BenchEngine,
    inputs: Inputs,
    measured: dict[tuple[str, str], _Measured],
    options: RunOptions,
    plain: PlainEngine,
) -> Row:
    workload = inputs.workload
    result = measured[engine.name, workload.name]
    ours = measured.get(("ours", workload.name))
    seconds = median(result.seconds)
    share, rate = None, median(result.gflops) if result.gflops else None
    decoder = median(result.decoder_seconds) if result.decoder_seconds else None
    if rate and decoder and result.packed_tokens:
        shapes = linear_shapes(plain.model.get_decoder())
        share = shapes.executed(result.packed_tokens, workload.verdicts) / decoder / 1e9 / rate
    gate = result.gate
    shape: dict[str, Any] = {
        name: getattr(workload, name)
        for name in ("criteria", "n_pairs", "orders", "images", "group", "height", "width")
    }
    return Row(
        model=model,
        workload=workload.name,
        engine=engine.name,
        **shape,
        prefix_tokens=inputs.prefix_tokens,
        leaf_tokens=inputs.leaf_tokens,
        verdicts=workload.verdicts,
        gate="passed" if gate else ("reference" if engine is plain else "none"),
        gate_difference=gate.max_difference if gate else None,
        gate_spread=gate.spread if gate else None,
        repeats=len(result.seconds),
        seconds=seconds,
        seconds_min=min(result.seconds),
        seconds_max=max(result.seconds),
        verdicts_per_second=workload.verdicts / seconds,
        ratio_to_ours=ratio(result.seconds, ours.seconds) if ours else None,
        packed_tokens=result.packed_tokens,
        decoder_seconds=decoder,
        gemm_gflops=rate,
        gemm_share=share,
        peak_bytes=result.peak_bytes,
        note=engine.note,
        **environment(options.engines.threads),
    )


def ratio(seconds: Sequence[float], base: Sequence[float]) -> float:
    """Median over repeats of seconds / base of the same repeat."""
    return median(a / b for a, b in zip(seconds, base, strict=True))
