"""The demonstration: bundled pairs, 20 criteria, one forward, and what 20 calls would cost."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arr_fast.data.items import InputItem, ItemError, read_items
from arr_fast.images import CanonicalImage, to_image
from arr_fast.pairwise import PairVerdicts
from arr_fast.report import ReportPair
from arr_fast.rubric import Rubric

if TYPE_CHECKING:
    from arr_fast.judge import Judge

REPEATS = 3


@dataclass(frozen=True, slots=True)
class Cost:
    """Seconds for all pairs, images encoded beforehand in every case; medians of one run.

    Attributes:
        together: One call with all criteria.
        separate: As many calls as criteria, one criterion each.
        single: One call with one criterion.
        criteria: How many criteria.
        difference: Largest |log-odds together - separate|, over verdicts and orders; NaN if any is.
    """

    together: float
    separate: float
    single: float
    criteria: int
    difference: float


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demonstration shows: pairs of one task, their verdicts, and the cost.

    Attributes:
        pairs: What was judged.
        expected: The winner of each pair by construction; None where the data does not say.
        verdicts: The verdicts.
        forwards: Decoder forwards of the one call that gave them.
        cost: Of that call and of the alternatives.
    """

    pairs: tuple[ReportPair, ...]
    expected: tuple[str | None, ...]
    verdicts: PairVerdicts
    forwards: int
    cost: Cost


def demo_items() -> list[InputItem]:
    """Returns the bundled pairs.

    Raises:
        ItemError: if the package was installed without its data.
    """
    folder = Path(str(resources.files("arr_fast"))) / "shapes" / "data" / "demo"
    files = sorted(folder.glob("*.jsonl"))
    if not files:
        raise ItemError(f"no bundled pairs in {folder}; is arr-fast installed with its data?")
    return [item for file in files for item in read_items(file, count=2)]


def run_demo(judge: Judge, items: list[InputItem], rubric: Rubric) -> DemoResult:
    """Judges pairs of one task and times the alternatives side by side.

    Args:
        judge: The judge.
        items: Pairs, all with a source image or none.
        rubric: For their task.
    """
    pairs = tuple(_read(item, rubric) for item in items)
    before = judge.stats()["forwards"]
    verdicts = _compare(judge, pairs, rubric)
    forwards = judge.stats()["forwards"] - before
    winners = {"a": "A", "b": "B", "tie": "tie"}
    expected = tuple(winners.get(str(item.metadata.get("better"))) for item in items)
    return DemoResult(pairs, expected, verdicts, forwards, _cost(judge, pairs, rubric))


def _read(item: InputItem, rubric: Rubric) -> ReportPair:
    first, second = (to_image(path, name=item.name) for path in item.images)
    source: CanonicalImage | None = None
    if item.source is not None:
        source = to_image(item.source, name=item.name)
    return ReportPair(item.prompt, first, second, rubric, source)


def _compare(judge: Judge, pairs: tuple[ReportPair, ...], rubric: Rubric) -> PairVerdicts:
    sources = None if pairs[0].source is None else [pair.source for pair in pairs]
    return judge.compare(
        [pair.prompt for pair in pairs],
        [pair.image_a for pair in pairs],
        [pair.image_b for pair in pairs],
        rubric,
        sources=sources,
    )


def _cost(judge: Judge, pairs: tuple[ReportPair, ...], rubric: Rubric) -> Cost:
    alone = [Rubric(name=c.id, task=rubric.task, criteria=(c,)) for c in rubric.criteria]

    def separately() -> list[PairVerdicts]:
        return [_compare(judge, pairs, single) for single in alone]

    # One of each before the clock runs: image features are then cached for all.
    together, separate = _compare(judge, pairs, rubric), separately()
    seconds: dict[str, list[float]] = {"together": [], "separate": [], "single": []}
    for _ in range(REPEATS):
        seconds["together"].append(_timed(lambda: _compare(judge, pairs, rubric)))
        seconds["separate"].append(_timed(separately))
        seconds["single"].append(_timed(lambda: _compare(judge, pairs, alone[0])))
    return Cost(
        together=statistics.median(seconds["together"]),
        separate=statistics.median(seconds["separate"]),
        single=statistics.median(seconds["single"]),
        criteria=len(alone),
        difference=_largest_difference(together, separate),
    )


def _largest_difference(together: PairVerdicts, separate: list[PairVerdicts]) -> float:
    worst = 0.0
    for k, single in enumerate(separate):
        for joint, own in (
            (together.log_odds_ab, single.log_odds_ab),
            (together.log_odds_ba, single.log_odds_ba),
        ):
            if joint is not None and own is not None:
                # Not max(), which drops a NaN.
                worst = np.maximum(worst, np.abs(joint[:, k] - own[:, 0]).max())
    return float(worst)


def _timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start
