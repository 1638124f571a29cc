"""`arr-fast compare | score | rank`: from items to verdicts, tables and files."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from arr_fast import __version__
from arr_fast.cli import options as opt
from arr_fast.cli.options import JSON_ERRORS, console, err_console
from arr_fast.data.items import InputItem, ItemError, read_items

if TYPE_CHECKING:
    from arr_fast.aggregation import AggregationName
    from arr_fast.cli.session import Outcome, Prepared
    from arr_fast.judge import Judge

Items = Annotated[
    Path | None, typer.Argument(help="A .jsonl or .json file of items; else use the options.")
]
Prompt = Annotated[str | None, typer.Option(help="Caption, or edit instruction.")]
Source = Annotated[str | None, typer.Option(help="Source image of an edit.")]
LabelMass = Annotated[
    bool, typer.Option("--label-mass", help="Also read P(any label); flags odd verdicts.")
]
SCHEMA = 1


@opt.takes_judge
def compare(
    items: Items = None,
    prompt: Prompt = None,
    a: Annotated[str | None, typer.Option("--a", help="First image.")] = None,
    b: Annotated[str | None, typer.Option("--b", help="Second image.")] = None,
    source: Source = None,
    rubric: opt.RubricName = None,
    orders: opt.Orders = "both",
    mode: opt.Mode = "criteria",
    aggregation: Annotated[
        str | None, typer.Option(help="Rule from verdicts to a winner; see the README.")
    ] = None,
    label_mass: LabelMass = False,
    choice: opt.JudgeChoice = opt.DEFAULT_JUDGE,
    batch_size: opt.BatchSize = 16,
    json_path: opt.JsonPath = None,
    out: opt.OutPath = None,
) -> None:
    """Judge pairs of images, criterion by criterion."""
    from arr_fast.cli.tables import show_compare

    with opt.one_line_errors():
        rule = _rule(aggregation, mode)
        pictures = [path for path in (a, b) if path is not None]
        work = _work(items, prompt, pictures, source, 2, "--prompt, --a and --b")
        judge = opt.load_judge(choice)

        def judge_batch(batch: list[Prepared]) -> list[dict[str, Any]]:
            verdicts = judge.compare(
                [p.item.prompt for p in batch],
                [p.images[0] for p in batch],
                [p.images[1] for p in batch],
                [p.rubric for p in batch],
                sources=_sources(batch),
                orders=orders,
                mode=mode,
                label_mass=label_mass,
                aggregation=rule,
            )
            rewards = verdicts.reward()
            common = {
                "aggregation": verdicts.aggregation,
                "provenance": verdicts.provenance.to_json(),
            }
            return [
                {
                    **verdicts.pair_json(i),
                    "reward": [float(x) for x in rewards.reward[i]],
                    "reward_weight": float(rewards.weight[i]),
                    **common,
                }
                for i in range(len(batch))
            ]

        settings = {
            "orders": orders,
            "mode": mode,
            "aggregation": aggregation,
            "label_mass": label_mass,
        }
        _execute(
            "compare",
            work,
            judge,
            judge_batch,
            show_compare,
            settings=settings,
            rubric_of=opt.RubricBook(rubric, choice.model),
            batch_size=batch_size,
            out=out,
            json_path=json_path,
        )


@opt.takes_judge
def score(
    items: Items = None,
    prompt: Prompt = None,
    image: Annotated[str | None, typer.Option(help="The image.")] = None,
    source: Source = None,
    rubric: opt.RubricName = None,
    label_mass: LabelMass = False,
    choice: opt.JudgeChoice = opt.DEFAULT_JUDGE,
    batch_size: opt.BatchSize = 16,
    json_path: opt.JsonPath = None,
    out: opt.OutPath = None,
) -> None:
    """Score single images: P(yes) for every criterion."""
    from arr_fast.cli.tables import show_score

    with opt.one_line_errors():
        pictures = [image] if image is not None else []
        work = _work(items, prompt, pictures, source, 1, "--prompt and --image")
        judge = opt.load_judge(choice)

        def judge_batch(batch: list[Prepared]) -> list[dict[str, Any]]:
            verdicts = judge.score(
                [p.item.prompt for p in batch],
                [p.images[0] for p in batch],
                [p.rubric for p in batch],
                sources=_sources(batch),
                label_mass=label_mass,
            )
            common = {"provenance": verdicts.provenance.to_json()}
            return [{**verdicts.image_json(i), **common} for i in range(len(batch))]

        settings = {"label_mass": label_mass}
        _execute(
            "score",
            work,
            judge,
            judge_batch,
            show_score,
            settings=settings,
            rubric_of=opt.RubricBook(rubric, choice.model),
            batch_size=batch_size,
            out=out,
            json_path=json_path,
        )


@opt.takes_judge
def rank(
    images: Annotated[
        list[str], typer.Argument(help="Two or more images; or one .jsonl or .json file of items.")
    ],
    prompt: Prompt = None,
    source: Source = None,
    rubric: opt.RubricName = None,
    orders: opt.Orders = "both",
    mode: opt.Mode = "criteria",
    aggregation: Annotated[str | None, typer.Option(help="As in compare.")] = None,
    choice: opt.JudgeChoice = opt.DEFAULT_JUDGE,
    batch_size: opt.BatchSize = 4,
    json_path: opt.JsonPath = None,
    out: opt.OutPath = None,
) -> None:
    """Rank groups of candidates by all of their pairs."""
    from arr_fast.cli.tables import show_rank

    with opt.one_line_errors():
        rule = _rule(aggregation, mode)
        is_file = prompt is None and len(images) == 1
        items = Path(images[0]) if is_file else None
        pictures = [] if is_file else images
        work = _work(items, prompt, pictures, source, None, "--prompt and two or more images")
        judge = opt.load_judge(choice)

        def judge_batch(batch: list[Prepared]) -> list[dict[str, Any]]:
            groups = judge.rank(
                [p.item.prompt for p in batch],
                [p.images for p in batch],
                [p.rubric for p in batch],
                sources=_sources(batch),
                orders=orders,
                mode=mode,
                aggregation=rule,
            )
            common = {"provenance": groups.provenance.to_json()}
            results = []
            for index in range(len(batch)):
                result = groups.group_json(index)
                failed = [pair["error"] for pair in result["pairs"] if pair["error"]]
                status = {"status": "error", "error": failed[0]} if failed else {"status": "ok"}
                results.append({**status, **result, **common})
            return results

        settings = {"orders": orders, "mode": mode, "aggregation": aggregation}
        _execute(
            "rank",
            work,
            judge,
            judge_batch,
            show_rank,
            settings=settings,
            rubric_of=opt.RubricBook(rubric, choice.model),
            batch_size=batch_size,
            out=out,
            json_path=json_path,
        )


def _rule(aggregation: str | None, mode: str) -> AggregationName | None:
    """Checks the name of a rule, and that the mode yields what it needs."""
    from arr_fast.aggregation import AGGREGATIONS

    # Learned weights belong to a call of the library; a file for them has no format yet.
    usable = {name: name for name in AGGREGATIONS if name != "learned"}
    if aggregation is None:
        return None
    if aggregation not in usable:
        raise ItemError(f"--aggregation must be one of {', '.join(usable)}, got {aggregation!r}")
    if aggregation == "holistic" and mode == "criteria":
        raise ItemError("--aggregation holistic needs --mode holistic or both")
    if aggregation != "holistic" and mode == "holistic":
        raise ItemError(f"--aggregation {aggregation} needs --mode criteria or both")
    return usable[aggregation]


def _work(
    items: Path | None,
    prompt: str | None,
    images: Sequence[str],
    source: str | None,
    count: int | None,
    needed: str,
) -> list[InputItem]:
    """Items from a file, or the one item that the options describe."""
    if items is not None:
        if prompt is not None or images or source is not None:
            raise ItemError(f"give a file of items or {needed}, not both")
        return read_items(items, count=count)
    enough = len(images) == count if count is not None else len(images) >= 2
    if prompt is None or not prompt.strip() or not enough:
        raise ItemError(f"give a file of items, or {needed}")
    return [InputItem("item", prompt, tuple(images), source)]


def _sources(batch: Sequence[Prepared]) -> list[Any] | None:
    return None if batch[0].source is None else [p.source for p in batch]


def _execute(
    command: str,
    work: list[InputItem],
    judge: Judge,
    judge_batch: Callable[[list[Prepared]], list[dict[str, Any]]],
    show: Callable[[Sequence[dict[str, Any]], Console], None],
    *,
    settings: dict[str, Any],
    rubric_of: opt.RubricBook,
    batch_size: int,
    out: Path | None,
    json_path: Path | None,
) -> None:
    """Runs a command over its items, prints, writes and sets the exit code."""
    from arr_fast.cli.session import run
    from arr_fast.cli.tables import show_summary
    from arr_fast.prompts import TEMPLATE_VERSION

    loaded = judge.engine.loaded
    identity = {
        **settings,
        "model": loaded.name,
        "revision": loaded.revision,
        "dtype": str(loaded.dtype),
        "quantization": loaded.quantization,
        "device": str(loaded.device),
        "impl": judge.engine.impl,
        "template_version": TEMPLATE_VERSION,
    }
    outcome = run(
        work,
        judge_batch,
        command=command,
        rubric_of=rubric_of,
        settings=identity,
        batch_size=batch_size,
        out=out,
        console=err_console,
    )
    if outcome.results:
        show(outcome.results, console)
    show_summary(outcome, len(work), err_console)
    if json_path is not None:
        document = _document(command, identity, outcome, len(work))
        text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
        json_path.write_text(text + "\n", encoding="utf-8", errors=JSON_ERRORS)
    if outcome.exit_code:
        raise typer.Exit(outcome.exit_code)


def _document(
    command: str, settings: dict[str, Any], outcome: Outcome, total: int
) -> dict[str, Any]:
    """The object of --json: schema, version, settings, summary, items."""
    return {
        "schema": f"arr_fast.{command}/{SCHEMA}",
        "arr_fast_version": __version__,
        "settings": settings,
        "summary": {
            "items": total,
            "judged": len(outcome.results) - outcome.skipped,
            "resumed": outcome.skipped,
            "interrupted": outcome.interrupted,
            "status": outcome.counts,
            "seconds": round(outcome.seconds, 3),
        },
        "items": outcome.results,
    }
