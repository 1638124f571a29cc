"""`arr-fast demo`: bundled pairs on 20 criteria in one forward, a table, and an HTML page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from arr_fast import __version__
from arr_fast.cli import options as opt
from arr_fast.cli.options import console, err_console

if TYPE_CHECKING:
    from arr_fast.demo import DemoResult

SCHEMA = 1
# Exactness in float32, DESIGN.md 6.
TOLERANCE = 1e-4


def demo(
    html: Annotated[
        Path | None, typer.Option(help="Write the page with the pictures here.")
    ] = None,
    model: opt.Model = opt.BUILTIN,
    device: opt.Device = "auto",
    impl: opt.Impl = "auto",
    json_path: opt.JsonPath = None,
) -> None:
    """Judge bundled image pairs on 20 criteria in one forward; exit 1 if a verdict is not exact."""
    with opt.one_line_errors():
        from arr_fast.demo import demo_items, run_demo
        from arr_fast.rubric import Rubric

        items = demo_items()
        judge = opt.load_judge(
            opt.JudgeChoice(model=model, device=device, impl=impl, dtype="float32")
        )
        results = []
        for rubric_name, part in (
            ("shapes", [item for item in items if item.source is None]),
            ("shapes_edit", [item for item in items if item.source is not None]),
        ):
            if part:
                with err_console.status(f"judging {len(part)} pairs on {rubric_name}"):
                    results.append(run_demo(judge, part, Rubric.builtin(rubric_name)))
        for result in results:
            _show(result)
        if html is not None:
            html.write_text(_page(results), encoding="utf-8")
            console.print(f"page with the pictures: {html}")
        exact = all(result.cost.difference <= TOLERANCE for result in results)
        failed = any(result.verdicts.count("error") for result in results)
        if json_path is not None:
            document = {
                "schema": f"arr_fast.demo/{SCHEMA}",
                "arr_fast_version": __version__,
                "exact": exact,
                "runs": [_run_json(result) for result in results],
            }
            json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if not exact or failed:
            raise typer.Exit(1)


def _show(result: DemoResult) -> None:
    from rich.markup import escape

    from arr_fast.cli.tables import pair_table

    rewards, _ = result.verdicts.reward()
    for index, pair in enumerate(result.pairs):
        console.print(pair_table(result.verdicts.pair_json(index), escape(pair.prompt)))
        first, second = rewards[index]
        expected = result.expected[index]
        truth = f" (by construction {expected} is better)" if expected in ("A", "B") else ""
        console.print(f"reward: A {first:+.1f}, B {second:+.1f}{truth}\n")
    for line in _facts(result):
        console.print(": ".join(line))
    console.print()


def _facts(result: DemoResult) -> list[tuple[str, str]]:
    cost = result.cost
    count = len(result.pairs)
    verdicts = 2 * count * cost.criteria
    known = [
        (winner, expected)
        for winner, expected in zip(result.verdicts.winner, result.expected, strict=True)
        if expected is not None
    ]
    right = sum(winner == expected for winner, expected in known)
    return [
        ("Judged", f"{count} pairs x {cost.criteria} criteria x 2 orders = {verdicts} verdicts"),
        ("Winners as constructed", f"{right} of {len(known)}"),
        ("Forwards", str(result.forwards)),
        ("One call", f"{1e3 * cost.together:.0f} ms for all criteria (median)"),
        (
            f"{cost.criteria} separate calls",
            f"{1e3 * cost.separate:.0f} ms, {cost.separate / cost.together:.1f} times as much; "
            f"largest difference {cost.difference:.1g} in log-odds",
        ),
        (
            "One criterion alone",
            f"{1e3 * cost.single:.0f} ms; {cost.criteria} cost {cost.together / cost.single:.1f} "
            "times as much here, where an image is only a few tokens. `arr-fast bench judge` "
            "measures this ratio at 512 pixels",
        ),
    ]


def _page(results: list[DemoResult]) -> str:
    from arr_fast.report import ReportSection, render_report

    sections = [
        ReportSection(
            "Two images for a caption"
            if result.pairs[0].source is None
            else "Two edits of an image",
            result.pairs,
            result.verdicts,
            _facts(result),
        )
        for result in results
    ]
    return render_report(sections, title="Image pairs, judged on 20 criteria in one forward")


def _run_json(result: DemoResult) -> dict[str, Any]:
    from arr_fast.verdict_arrays import jsonable

    cost = result.cost
    return {
        "forwards": result.forwards,
        "seconds_together": cost.together,
        "seconds_separate": cost.separate,
        "seconds_single": cost.single,
        "criteria": cost.criteria,
        "largest_difference": jsonable(cost.difference),
        "verdicts": result.verdicts.to_json(),
    }
