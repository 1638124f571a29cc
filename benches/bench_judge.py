"""pytest-benchmark suite of the judge: `pytest benches/bench_judge.py`.

Every engine is gated against plain transformers before it is timed; ratios to plain transformers,
measured in alternation, stand in `extra_info`. `ARR_FAST_BENCH_MODEL` and
`ARR_FAST_BENCH_WORKLOAD` choose what runs (by default the model and workload of the design).
"""

from __future__ import annotations

import os
import time
from statistics import median
from typing import Any

import pytest
import torch

from arr_fast.bench.engine_transformers import PlainEngine
from arr_fast.bench.engines import EngineOptions, make_engine
from arr_fast.bench.gate import Reference, check, make_reference
from arr_fast.bench.random_models import resolve_model
from arr_fast.bench.workloads import Inputs, build_inputs, named

MODEL = os.environ.get("ARR_FAST_BENCH_MODEL", "random:qwen3_vl-29m")
WORKLOAD = os.environ.get("ARR_FAST_BENCH_WORKLOAD", "design9")
ALTERNATIONS = 3


@pytest.fixture(scope="module")
def plain() -> PlainEngine:
    engine = PlainEngine()
    engine.prepare(resolve_model(MODEL))
    return engine


@pytest.fixture(scope="module")
def inputs(plain: PlainEngine) -> Inputs:
    return build_inputs(named(WORKLOAD), plain.prompts)


@pytest.fixture(scope="module")
def reference(plain: PlainEngine, inputs: Inputs) -> Reference:
    plain.reset(inputs, warm=inputs.workload.images == "warm")
    return make_reference(plain, inputs)


@pytest.mark.parametrize("name", ["ours", "transformers-kv-copied", "transformers-batched"])
def test_judge(
    name: str, benchmark: Any, plain: PlainEngine, inputs: Inputs, reference: Reference
) -> None:
    engine = make_engine(name, EngineOptions(threads=torch.get_num_threads()))
    engine.prepare(resolve_model(MODEL))
    warm = inputs.workload.images == "warm"
    engine.reset(inputs, warm=warm)
    gate = check(name, inputs, engine.run(inputs), reference, "log_odds")
    assert gate.passed, str(gate)
    ratios = []
    for _ in range(ALTERNATIONS):
        seconds = []
        for each in (engine, plain):
            each.reset(inputs, warm=warm)
            started = time.perf_counter()
            each.run(inputs)
            seconds.append(time.perf_counter() - started)
        ratios.append(seconds[1] / seconds[0])
    benchmark.extra_info.update(
        model=MODEL,
        workload=WORKLOAD,
        times_faster_than_transformers=median(ratios),
        largest_difference=gate.max_difference,
    )
    benchmark.pedantic(
        engine.run,
        args=(inputs,),
        setup=lambda: engine.reset(inputs, warm=warm),
        rounds=5,
        warmup_rounds=1,
    )
    engine.close()
