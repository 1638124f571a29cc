"""pytest-benchmark suite of one RPO iteration: `pytest benches/bench_rpo.py`.

Every contender is gated on its gradient before it is timed; the ratio to ours, measured in
alternation, stands in `extra_info`. `arr-fast bench rpo` prints the split into sampling, judging
and training.
"""

from __future__ import annotations

import os
from statistics import median
from typing import Any

import pytest

from arr_fast.bench.rpo import ENGINES, TOLERANCE, WORKLOADS, Contest, SleepingJudge

PAIRS = int(os.environ.get("ARR_FAST_BENCH_PAIRS", "8"))
ALTERNATIONS = 3


@pytest.fixture(scope="module", params=list(WORKLOADS))
def contest(request: pytest.FixtureRequest) -> Contest:
    return Contest(request.param, PAIRS, min(PAIRS, 4), 16, SleepingJudge(0.0))


@pytest.mark.parametrize("engine", ENGINES)
def test_iteration(engine: str, benchmark: Any, contest: Contest) -> None:
    run, ours = contest.contender(engine), contest.contender("ours")
    expected = contest.gradient(contest.contender("reference-loop"))
    difference = float((contest.gradient(run) - expected).norm() / expected.norm())
    assert difference <= TOLERANCE
    contest.gradient(ours)
    ratios = [run()["total"] / ours()["total"] for _ in range(ALTERNATIONS)]
    benchmark.extra_info.update(gradient_difference=difference, times_ours=median(ratios))
    benchmark.pedantic(run, rounds=3, warmup_rounds=0)
