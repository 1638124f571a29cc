"""`arr-fast eval`: how good a judge is on labelled data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from arr_fast import __version__
from arr_fast.cli import options as opt
from arr_fast.cli.options import console, err_console
from arr_fast.data.record import ItemError, Record

if TYPE_CHECKING:
    from arr_fast.cli.session import Outcome
    from arr_fast.evals.intervals import Estimate
    from arr_fast.evals.measure import Evaluation
    from arr_fast.judge import Judge

POINT_SCHEMA = 1
RuleChoice = Literal["log_odds_mean", "log_odds_sum", "weighted_sum", "majority", "veto"]


@dataclass(slots=True)
class _Request:
    """What was asked, beside the judge."""

    data: str
    format: str | None
    limit: int | None
    forms: str
    direct: str | None
    aggregation: RuleChoice
    label_mass: bool
    batch_size: int
    resamples: int
    seed: int
    shown: int
    min_accuracy: float | None
    out: Path | None
    json_path: Path | None
    csv_path: Path | None
    html_path: Path | None
    settings: dict[str, Any] = field(default_factory=dict)


@opt.takes_judge
def evaluate(
    data: Annotated[
        str, typer.Argument(metavar="PAIRS", help="Labelled data of any format, or easy-vqa:test.")
    ],
    rubric: opt.RubricName = None,
    format_name: Annotated[
        str | None, typer.Option("--format", help="Data format; recognised by default.")
    ] = None,
    forms: Annotated[
        str, typer.Option(help="Comma-separated: direct (no rubric), holistic, criteria.")
    ] = "direct,holistic,criteria",
    direct: Annotated[
        str | None, typer.Option("--direct-text", help="The question asked without a rubric.")
    ] = None,
    aggregation: Annotated[
        RuleChoice, typer.Option(help="Rule of the form criteria; all rules are compared.")
    ] = "log_odds_mean",
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only the first records of the file.")
    ] = None,
    label_mass: Annotated[
        bool, typer.Option("--label-mass/--no-label-mass", help="Also read P(any label).")
    ] = True,
    resamples: Annotated[int, typer.Option(min=0, help="Bootstrap resamples.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of resamples, folds, random subsets.")] = 0,
    shown: Annotated[int, typer.Option("--show", min=0, help="Pairs on the HTML page.")] = 24,
    min_accuracy: Annotated[
        float | None, typer.Option(help="Exit 1 if the last form's mean accuracy is lower.")
    ] = None,
    choice: opt.JudgeChoice = opt.DEFAULT_JUDGE,
    batch_size: opt.BatchSize = 16,
    out: opt.OutPath = None,
    json_path: opt.JsonPath = None,
    csv_path: Annotated[
        Path | None, typer.Option("--csv", help="Write one row per measure.")
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", help="Write a self-contained page.")
    ] = None,
) -> None:
    """Measure a judge: accuracy, position bias, calibration, with intervals."""
    from arr_fast.data.registry import read_records

    with opt.one_line_errors():
        request = _Request(
            *(data, format_name, limit, forms, direct, aggregation, label_mass, batch_size),
            *(resamples, seed, shown, min_accuracy, out, json_path, csv_path, html_path),
        )
        records = list(islice(read_records(data, format_name), limit))
        if not records:
            raise ItemError(f"{data}: holds no items")
        judge = opt.load_judge(choice)
        loaded = judge.engine.loaded
        request.settings = {
            "data": data,
            "model": loaded.name,
            "revision": loaded.revision,
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "quantization": loaded.quantization or "none",
            "seed": seed,
            "resamples": resamples,
        }
        book = opt.RubricBook(rubric, choice.model)
        if all(record.kind == "point" for record in records):
            _points(judge, records, book, request)
        else:
            _pairs(judge, records, book, request)


def _pairs(judge: Judge, records: list[Record], book: opt.RubricBook, request: _Request) -> None:
    from arr_fast.evals.documents import to_json, write_csv
    from arr_fast.evals.judging import FORMS, judge_pairs, read_lines, select_pairs
    from arr_fast.evals.measure import evaluate as measure
    from arr_fast.evals.tables import tables

    names = [name.strip() for name in request.forms.split(",") if name.strip()]
    asked = [form for form in FORMS if form in names]
    if not asked or set(names) - set(FORMS):
        raise ItemError(f"--forms: expected some of {','.join(FORMS)}, got {request.forms!r}")
    selected = select_pairs(records)
    outcome = judge_pairs(
        judge,
        selected.pairs,
        forms=asked,
        rubric_of=book,
        direct=request.direct,
        label_mass=request.label_mass,
        batch_size=request.batch_size,
        out=request.out,
        console=err_console,
    )
    good = _finished(outcome, len(selected.pairs))
    pairs = [selected.pairs[i] for i in good]
    odds = read_lines([outcome.results[i] for i in good])
    result = measure(
        odds,
        [pair.preference or 0 for pair in pairs],
        [selected.clusters[i] for i in good],
        [pair.group for pair in pairs],
        aggregation=request.aggregation,
        resamples=request.resamples,
        seed=request.seed,
    )
    hashes = dict.fromkeys(book(pair).content_hash for pair in pairs)
    settings = {
        **request.settings,
        "forms": asked,
        "aggregation": request.aggregation,
        "rubric_hash": next(iter(hashes)) if len(hashes) == 1 else f"{len(hashes)} rubrics",
    }
    summary = _summary(outcome) | {"unlabelled": selected.unlabelled}
    for table in tables(result):
        _print_table(table)
    if request.json_path is not None:
        _write_json(request.json_path, to_json(result, settings, summary))
    if request.csv_path is not None:
        write_csv(request.csv_path, result, settings)
    if request.html_path is not None:
        _write_page(request, result, pairs, odds, book, settings, summary)
    accuracy = result.forms[-1].measures["mean"].value if result.forms else None
    _exit(outcome, accuracy, request.min_accuracy)


def _points(judge: Judge, records: list[Record], book: opt.RubricBook, request: _Request) -> None:
    import numpy as np

    from arr_fast.evals.points import (
        answer_measures,
        judge_points,
        question_rubric,
        score_measures,
    )

    points = [record for record in records if record.label_score is not None]
    if not points:
        raise ItemError(f"{request.data}: no image has a label_score")
    questions = all(point.criterion is not None for point in points)
    if questions and any(point.label_score not in (0.0, 1.0) for point in points):
        raise ItemError(f"{request.data}: label_score: expected 1 or 0 beside a criterion")
    if request.html_path is not None or request.csv_path is not None:
        raise ItemError("--html and --csv are for pairs; single images have --json")
    outcome = judge_points(
        judge,
        points,
        rubric_of=question_rubric if questions else book,
        label_mass=request.label_mass,
        batch_size=request.batch_size,
        out=request.out,
        console=err_console,
    )
    good = _finished(outcome, len(points))
    lines = [outcome.results[i] for i in good]
    labels = np.array([points[i].label_score for i in good], dtype=np.float64)
    if questions:
        odds = np.array([line["criteria"][0]["log_odds"] for line in lines], dtype=np.float64)
        measures = answer_measures(
            odds,
            labels,
            [str(points[i].images[0]) for i in good],
            resamples=request.resamples,
            seed=request.seed,
        )
    else:
        measures = score_measures(np.array([line["score"] for line in lines]), labels)
    _print_measures(measures, len(good))
    if request.json_path is not None:
        document = {
            "schema": f"arr_fast.eval_points/{POINT_SCHEMA}",
            "arr_fast_version": __version__,
            "settings": request.settings,
            "summary": {**_summary(outcome), "images": len(good)},
            "measures": {name: estimate.to_json() for name, estimate in measures.items()},
        }
        _write_json(request.json_path, document)
    accuracy = measures["accuracy"].value if questions else None
    _exit(outcome, accuracy, request.min_accuracy)


def _finished(outcome: Outcome, expected: int) -> list[int]:
    """Places of the lines without an error; measures of half a run would mislead."""
    from arr_fast.cli.tables import show_summary

    show_summary(outcome, expected, err_console)
    if outcome.interrupted:
        raise typer.Exit(outcome.exit_code)
    failed = [line for line in outcome.results if line["status"] == "error"]
    for line in failed[:20]:
        text = f"[red]{escape(str(line['id']))}:[/] {escape(str(line['error']))}"
        err_console.print(text, soft_wrap=True)
    good = [i for i, line in enumerate(outcome.results) if line["status"] != "error"]
    if not good:
        raise ItemError("nothing could be judged")
    return good


def _summary(outcome: Outcome) -> dict[str, Any]:
    return {
        "status": outcome.counts,
        "resumed": outcome.skipped,
        "seconds": round(outcome.seconds, 3),
    }


def _exit(outcome: Outcome, accuracy: float | None, least: float | None) -> None:
    if least is not None and (accuracy is None or accuracy < least):
        shown = "none" if accuracy is None else f"{accuracy:.4f}"
        raise ItemError(f"accuracy {shown} is under --min-accuracy {least}")
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _write_json(path: Path, document: dict[str, Any]) -> None:
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    path.write_text(text + "\n", encoding="utf-8")


def _write_page(
    request: _Request,
    result: Evaluation,
    pairs: Sequence[Record],
    odds: Any,
    book: opt.RubricBook,
    settings: dict[str, Any],
    summary: dict[str, Any],
) -> None:
    from arr_fast.evals.report import render_evaluation

    assert request.html_path is not None
    rubric = settings["rubric_hash"]
    counts = ", ".join(f"{n} {status}" for status, n in sorted(summary["status"].items()))
    page = render_evaluation(
        result,
        pairs,
        odds,
        book,
        title=f"{settings['model']} on {Path(request.data).name}",
        facts=[
            ("Judge", f"{settings['model']} ({settings['revision']}), {settings['dtype']}"),
            ("Data", request.data),
            ("Pairs", f"{counts}; {summary['unlabelled']} records without a label left out"),
            ("Rubric", rubric[:12] if len(rubric) == 64 else rubric),
            ("Version", f"arr_fast {__version__}, seed {request.seed}"),
        ],
        aggregation=request.aggregation,
        shown=request.shown,
        seed=request.seed,
    )
    request.html_path.write_text(page, encoding="utf-8")


def _print_table(table: Any) -> None:
    shown = Table(*table.head, title=f"{table.title}\n{table.about}", title_justify="left")
    for row in table.rows:
        shown.add_row(*(f"{value} [dim]{low}[/]" if low else escape(value) for value, low in row))
    console.print(shown)


def _print_measures(measures: dict[str, Estimate], count: int) -> None:
    from arr_fast.evals.tables import cell

    shown = Table("measure", "value", title=f"{count} images", title_justify="left")
    for name, estimate in measures.items():
        value, ends = cell(estimate, "number")
        shown.add_row(name, f"{value} [dim]{ends}[/]" if ends else value)
    console.print(shown)
