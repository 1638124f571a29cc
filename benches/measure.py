"""How the op suites measure: interleaved rounds, peak memory of allocations, one CSV row a number.

`ARR_FAST_BENCH_CSV=path` appends a row per implementation; `python -m benches.run_ops ops.csv
ops.png` runs all op suites into one file and draws it. On a GPU every timed call ends with a
synchronisation, else the host is timed.
"""

from __future__ import annotations

import csv
import ctypes
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from arr_fast.bench.allocations import peak_allocated
from arr_fast.bench.rows import environment

ROUNDS = int(os.environ.get("ARR_FAST_BENCH_ROUNDS", "9"))


@dataclass(frozen=True, slots=True)
class OpRow:
    """One implementation of one op at one shape; seconds are those of one call.

    `ratio` is the median over rounds of this one's seconds over ours in the same round.
    `peak_bytes` is the most that a call held above its inputs, `peak_ratio` that without the
    results (`output_bytes`, for the loss mainly dv) over ours.
    """

    op: str
    impl: str
    shape: str
    dtype: str
    rounds: int
    seconds: float
    seconds_p20: float
    seconds_p80: float
    ratio: float
    peak_bytes: int | None
    output_bytes: int
    peak_ratio: float | None
    threads: int
    device: str
    torch: str
    commit: str
    time: str


def keep_heap() -> None:
    """Tells glibc to hand no freed memory back to the system.

    Else chance decides who pays for that: whether freed latents lie on top of the heap. Faulting
    4 MB in again costs as much as a pass over them, and each contender frees many times as much.
    """
    trim_threshold, mmap_threshold = -1, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(mmap_threshold, 2**25)


def interleave(
    runs: Mapping[str, Callable[[], Any]], *, rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Times every contender once a round, in turn, after one warm-up call each.

    In a round each runs twice and the second call counts, its result still held: the first one
    pays for what the rival before it left in caches and heap.

    Returns:
        Name -> seconds per round.
    """
    if not torch.cuda.is_available():
        keep_heap()
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    synchronise()
    for _ in range(rounds):
        for name, run in runs.items():
            run()
            synchronise()
            start = time.perf_counter()
            result = run()
            synchronise()
            seconds[name].append(time.perf_counter() - start)
            del result
    return seconds


def synchronise() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(
    benchmark: Any,
    op: str,
    shape: str,
    dtype: torch.dtype,
    runs: Mapping[str, Callable[[], Any]],
    *,
    ours: str = "ours",
    with_memory: bool = True,
    rounds: int = ROUNDS,
) -> dict[str, OpRow]:
    """Times contenders, gives ours to pytest-benchmark, appends CSV rows, and returns them by
    name.
    """
    seconds = interleave(runs, rounds=rounds)
    peaks = {name: peak_allocated(run) if with_memory else None for name, run in runs.items()}
    outputs = _tensor_bytes(runs[ours]())
    ratios = {
        name: median(a / b for a, b in zip(each, seconds[ours], strict=True))
        for name, each in seconds.items()
    }
    where = environment(torch.get_num_threads())
    rows = []
    for name, each in seconds.items():
        cuts = quantiles(each, n=10) if len(each) > 1 else each * 9
        rows.append(
            OpRow(
                op=op,
                impl=name,
                shape=shape,
                dtype=str(dtype).removeprefix("torch."),
                rounds=len(each),
                seconds=median(each),
                seconds_p20=cuts[1],
                seconds_p80=cuts[7],
                ratio=ratios[name],
                peak_bytes=peaks[name],
                output_bytes=outputs,
                peak_ratio=_peak_ratio(peaks[name], peaks[ours], outputs),
                **{k: where[k] for k in ("threads", "device", "torch", "commit", "time")},
            )
        )
    append(rows)
    for row in rows:
        benchmark.extra_info[row.impl] = {"ratio": row.ratio, "peak_ratio": row.peak_ratio}
        milliseconds, peak = row.seconds * 1e3, row.peak_bytes
        print(f"{op} {shape} {row.impl}: {milliseconds:.2f} ms, x{row.ratio:.2f}, {peak} bytes")

    def timed() -> None:
        runs[ours]()
        synchronise()

    benchmark.pedantic(timed, rounds=ROUNDS, warmup_rounds=1)
    return {row.impl: row for row in rows}


def _tensor_bytes(result: Any) -> int:
    tensors = result if isinstance(result, tuple) else (result,)
    return sum(tensor.nbytes for tensor in tensors)


def _peak_ratio(peak: int | None, our_peak: int | None, outputs: int) -> float | None:
    if peak is None or our_peak is None:
        return None
    return (peak - outputs) / max(our_peak - outputs, 1)


def append(rows: list[OpRow]) -> None:
    """Appends rows to the file that ARR_FAST_BENCH_CSV names, if any."""
    target = os.environ.get("ARR_FAST_BENCH_CSV")
    if not target:
        return
    path = Path(target)
    is_new = not path.exists()
    with path.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, [field.name for field in fields(OpRow)])
        if is_new:
            writer.writeheader()
        writer.writerows(asdict(row) for row in rows)
