"""Measures a judge on held-out scenes: `python -m arr_fast.shapes.evaluate [--model M]`.

Scenes with held-out attribute combinations, criteria in held-out phrasings, and only criteria whose
truth the renderer's data decides. Pairs are judged in both single orders, so that position bias is
measured and not averaged away.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from arr_fast.judge import Judge
from arr_fast.rubric import Criterion, Rubric
from arr_fast.shapes import easy_vqa
from arr_fast.shapes.pairs import KIND_WEIGHTS, Example, sample_edit_pair, sample_pair
from arr_fast.shapes.render import render
from arr_fast.shapes.scene import Split

TIE_BOUND = 1.0
CHUNK = 64
EVALUATION_SEED = 20_000


@dataclass(frozen=True, slots=True)
class PairRecord:
    """One criterion on one pair.

    Attributes:
        kind: Kind of claim.
        truths: Truth on the first and second picture.
        forward: Log-odds that the first picture wins, when it is shown first.
        reverse: Log-odds that the second picture wins, when it is shown first.
    """

    kind: str
    truths: tuple[bool, bool]
    forward: float
    reverse: float

    @property
    def decided(self) -> bool:
        """Whether exactly one picture meets the criterion."""
        return self.truths[0] != self.truths[1]

    @property
    def preference(self) -> float:
        """Log-odds for the first picture, averaged over both orders."""
        return (self.forward - self.reverse) / 2


@dataclass(frozen=True, slots=True)
class PointRecord:
    """One criterion on one picture: its kind, its truth, the log-odds of yes."""

    kind: str
    truth: bool
    log_odds: float


def make_examples(
    seed: int, count: int, split: Split = "held_out", edits: float = 0.3
) -> list[Example]:
    """Pairs of a split with at least one criterion, a share of them edits."""
    rng = np.random.default_rng([EVALUATION_SEED, seed])
    found: list[Example] = []
    while len(found) < count:
        sampler = sample_edit_pair if len(found) < edits * count else sample_pair
        example = sampler(rng, split, 16, KIND_WEIGHTS)
        if example.criteria:
            found.append(example)
    return found


def rubric_of(example: Example) -> Rubric:
    """The example's criteria as a rubric."""
    criteria = tuple(
        Criterion(id=f"{number}-{c.kind}", text=c.text) for number, c in enumerate(example.criteria)
    )
    task = example.task
    return Rubric(name="held-out", task=task, criteria=criteria)


def _chunks(examples: Sequence[Example]) -> Iterable[list[Example]]:
    """Runs of examples of one task."""
    for is_edit in (False, True):
        chosen = [e for e in examples if (e.source is not None) == is_edit]
        for begin in range(0, len(chosen), CHUNK):
            yield chosen[begin : begin + CHUNK]


def _sources(chunk: Sequence[Example]) -> list[Any] | None:
    if chunk[0].source is None:
        return None
    return [render(e.source) for e in chunk if e.source is not None]


def pair_records(judge: Judge, examples: Sequence[Example]) -> list[PairRecord]:
    """Judges every pair in both orders."""
    records = []
    for chunk in _chunks(examples):
        captions = [e.caption for e in chunk]
        first, second = ([render(e.scenes[i]) for e in chunk] for i in (0, 1))
        rubrics = [rubric_of(e) for e in chunk]
        verdicts = judge.compare(captions, first, second, rubrics, sources=_sources(chunk))
        assert verdicts.log_odds_ab is not None and verdicts.log_odds_ba is not None
        for row, example in enumerate(chunk):
            for column, criterion in enumerate(example.criteria):
                forward = float(verdicts.log_odds_ab[row, column])
                reverse = float(verdicts.log_odds_ba[row, column])
                a, b = criterion.truths
                records.append(PairRecord(criterion.kind, (a, b), forward, reverse))
    return records


def point_records(judge: Judge, examples: Sequence[Example]) -> list[PointRecord]:
    """Judges the first picture of every example alone."""
    records = []
    for chunk in _chunks(examples):
        verdicts = judge.score(
            [e.caption for e in chunk],
            [render(e.scenes[0]) for e in chunk],
            [rubric_of(e) for e in chunk],
            sources=_sources(chunk),
        )
        for row, example in enumerate(chunk):
            for column, criterion in enumerate(example.criteria):
                z = float(verdicts.log_odds[row, column])
                records.append(PointRecord(criterion.kind, criterion.truths[0], z))
    return records


def easy_vqa_records(judge: Judge, limit: int | None = None) -> list[PointRecord]:
    """Yes/no questions of easy-VQA's test split, `limit` pictures of it."""
    records = []
    pictures = easy_vqa.pictures("test")[:limit]
    for begin in range(0, len(pictures), CHUNK):
        chunk = pictures[begin : begin + CHUNK]
        rubrics = [
            Rubric(
                name="easy-vqa",
                task="t2i",
                criteria=tuple(
                    Criterion(id=str(n), text=q.text) for n, q in enumerate(p.questions)
                ),
            )
            for p in chunk
        ]
        captions = [easy_vqa.NEUTRAL_CAPTION] * len(chunk)
        verdicts = judge.score(captions, [p.load("test") for p in chunk], rubrics)
        for row, picture in enumerate(chunk):
            for column, question in enumerate(picture.questions):
                z = float(verdicts.log_odds[row, column])
                records.append(PointRecord("easy_vqa", question.answer, z))
    return records


def _mean(values: Iterable[bool]) -> float:
    listed = list(values)
    return float(np.mean(listed)) if listed else float("nan")


def summarise(
    pairs: Sequence[PairRecord], points: Sequence[PointRecord], vqa: Sequence[PointRecord]
) -> dict[str, Any]:
    """All figures as one JSON-ready object; shares are between 0 and 1."""
    decided = [r for r in pairs if r.decided]
    ties = [r for r in pairs if not r.decided]

    def forward(r: PairRecord) -> bool:
        return (r.forward > 0) == r.truths[0]

    def reverse(r: PairRecord) -> bool:
        return (r.reverse > 0) == r.truths[1]

    def averaged(r: PairRecord) -> bool:
        return (r.preference > 0) == r.truths[0]

    by_kind: dict[str, list[PairRecord]] = defaultdict(list)
    for record in decided:
        by_kind[record.kind].append(record)
    point_kinds: dict[str, list[PointRecord]] = defaultdict(list)
    for point in points:
        point_kinds[point.kind].append(point)
    singles = [z for r in decided for z in ((r.forward, r.truths[0]), (r.reverse, r.truths[1]))]
    won_first = _mean(z > 0 for z, wins in singles if wins)
    won_second = _mean(z < 0 for z, wins in singles if not wins)
    return {
        "version": 1,
        "pairwise": {
            "criteria": len(decided),
            "accuracy_forward": _mean(map(forward, decided)),
            "accuracy_reverse": _mean(map(reverse, decided)),
            "accuracy_both": _mean(map(averaged, decided)),
            "accuracy_first_wins": won_first,
            "accuracy_second_wins": won_second,
            "consistency": _mean(r.forward * r.reverse < 0 for r in decided),
            "kinds": {
                kind: {
                    "criteria": len(rs),
                    "single": _mean([*map(forward, rs), *map(reverse, rs)]),
                    "both": _mean(map(averaged, rs)),
                }
                for kind, rs in sorted(by_kind.items())
            },
        },
        "ties": {
            "criteria": len(ties),
            "within_1_single": _mean(
                abs(z) <= TIE_BOUND for r in ties for z in (r.forward, r.reverse)
            ),
            "within_1_both": _mean(abs(r.preference) <= TIE_BOUND for r in ties),
        },
        "pointwise": {
            "criteria": len(points),
            "accuracy": _mean((p.log_odds > 0) == p.truth for p in points),
            "kinds": {
                kind: {
                    "criteria": len(ps),
                    "accuracy": _mean((p.log_odds > 0) == p.truth for p in ps),
                }
                for kind, ps in sorted(point_kinds.items())
            },
        },
        "easy_vqa": {
            "questions": len(vqa),
            "accuracy": _mean((p.log_odds > 0) == p.truth for p in vqa),
        },
    }


def print_tables(figures: dict[str, Any], console: Console) -> None:
    """The figures as two tables."""
    pairwise, pointwise = figures["pairwise"], figures["pointwise"]
    table = Table(title="Accuracy on held-out scenes and phrasings, by kind of criterion")
    for column in ("kind", "pairs", "one order", "both orders", "pictures", "pointwise"):
        table.add_column(column, justify="left" if column == "kind" else "right")
    for kind in sorted({*pairwise["kinds"], *pointwise["kinds"]}):
        pair, point = pairwise["kinds"].get(kind), pointwise["kinds"].get(kind)
        cells = ["", "", ""]
        if pair:
            cells = [f"{pair['criteria']}", f"{pair['single']:.1%}", f"{pair['both']:.1%}"]
        cells += [f"{point['criteria']}", f"{point['accuracy']:.1%}"] if point else ["", ""]
        table.add_row(kind, *cells)
    console.print(table)
    lines = {
        "pairwise, forward / reverse / both": ("forward", "reverse", "both"),
        "pairwise, first / second shown wins": ("first_wins", "second_wins"),
    }
    for name, keys in lines.items():
        values = (pairwise[f"accuracy_{key}"] for key in keys)
        console.print(f"{name}: " + " / ".join(f"{v:.1%}" for v in values))
    console.print(f"consistent over both orders: {pairwise['consistency']:.1%}")
    ties = figures["ties"]
    console.print(
        f"ties within {TIE_BOUND} of zero, one order / both: "
        f"{ties['within_1_single']:.1%} / {ties['within_1_both']:.1%}"
    )
    console.print(f"pointwise: {pointwise['accuracy']:.1%} of {pointwise['criteria']}")
    vqa = figures["easy_vqa"]
    console.print(f"easy-VQA yes/no test: {vqa['accuracy']:.1%} of {vqa['questions']}")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="builtin:shapes")
    parser.add_argument("--pairs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=["held_out", "train"], default="held_out")
    parser.add_argument("--easy-vqa", type=int, default=1000, help="pictures of the test split")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    judge = Judge.from_pretrained(args.model)
    examples = make_examples(args.seed, args.pairs, args.split)
    figures = summarise(
        pair_records(judge, examples),
        point_records(judge, examples),
        easy_vqa_records(judge, args.easy_vqa) if args.easy_vqa else [],
    )
    print_tables(figures, Console())
    if args.json:
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
