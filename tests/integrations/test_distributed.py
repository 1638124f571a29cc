"""Groups that are spread over ranks: two real processes under accelerate and gloo."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from arr_fast.errors import VerdictError
from arr_fast.integrations.distributed import GroupGather
from tests.integrations.rankers import BrightnessRanker
from tests.integrations.ranks import CASES, grey

ROOT = Path(__file__).parents[2]
WORLD = 2


@pytest.fixture(scope="module")
def answers() -> dict[str, list[dict]]:
    """Per case, what each rank answered; one pair of processes runs them all."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.integrations.ranks"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(WORLD), str(port)],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(WORLD)
    ]
    found = []
    try:
        for rank in ranks:
            out, err = rank.communicate(timeout=120)
            assert rank.returncode == 0, err
            found.append(json.loads(out.splitlines()[-1]))
    finally:
        for rank in ranks:
            rank.kill()
    return {case: [each[case] for each in found] for case in CASES}


def expected(case: str) -> list[list[float | None]]:
    """Win rates from first principles: rivals are the images of the same prompt and source."""
    everyone = [
        (prompt, None if sources is None else sources[n], value)
        for prompts, values, sources in CASES[case]
        for n, (prompt, value) in enumerate(zip(prompts, values, strict=True))
    ]
    rates = []
    for prompt, source, value in everyone:
        rivals = [v for p, s, v in everyone if (p, s) == (prompt, source)]
        if None in rivals or value == 255:
            rates.append(None)
            continue
        rivals = [v for v in rivals if v != 255]
        rates.append(sum(v < value for v in rivals) / (len(rivals) - 1))
    first = len(CASES[case][0][0])
    return [rates[:first], rates[first:]]


@pytest.mark.parametrize(
    "case", ["spread", "edits", "unreadable", "abstains", "uneven", "nothing here"]
)
def test_a_spread_group_is_judged_whole_and_nothing_else_is_paired(answers, case):
    for answer, rates in zip(answers[case], expected(case), strict=True):
        assert answer["rewards"] == rates
        # An abstention gets its group's mean, 0.5 in every group with a verdict.
        group_mean = -7.0 if case == "unreadable" else 0.5
        assert answer["filled"] == [group_mean if rate is None else rate for rate in rates]
    if case == "spread":
        # The groups of three go to different ranks, and no image goes to both.
        held = [sorted(map(len, answer["seen"])) for answer in answers[case]]
        assert sorted(held) == [[2, 3], [3]], held


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("alone", "'y' has 1 image on all 2 ranks"),
        ("mixed tasks", "some ranks gave sources"),
        ("one fails", "out of memory"),
    ],
)
def test_what_cannot_be_judged_is_refused_on_every_rank(answers, case, words):
    first, second = answers[case]
    assert words in first["error"] and first == second


def test_without_a_process_group_it_is_one_rank():
    gather = GroupGather()
    judge = BrightnessRanker()
    images = [grey(v) for v in (1, 2, 3, 255)]
    assert gather.rewards(judge, ["x"] * 3, images[:3]) == [0.0, 0.5, 1.0]
    filled = gather.filled_rewards(judge, ["x", "y", "y", "x"], images, neutral=0.25)
    assert filled == [0.25, 0.0, 1.0, 0.25]
    for bad in ({"keys": ["k"]}, {"sources": images[:1]}):
        with pytest.raises(VerdictError, match="prompts has 3"):
            gather.rewards(judge, ["x"] * 3, images[:3], **bad)
    # A call that was refused must not block the next.
    assert gather.rewards(judge, ["x", "x"], images[:2]) == [0.0, 1.0]
