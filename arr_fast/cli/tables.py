"""Results as rich tables: one item in full, many in a line each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from arr_fast.cli.session import Outcome

MANY = 40
_COLOURS = {"ok": "green", "tie": "yellow", "low_label_mass": "magenta", "error": "red"}


def number(value: float | None, digits: int = 2, sign: bool = False) -> str:
    """Returns a number for a cell; a dash for None."""
    if value is None:
        return "-"
    return f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"


def verdict(preference: float | None) -> str:
    """Names the image that a preference favours."""
    if preference is None:
        return "-"
    return "A" if preference > 0 else "B" if preference < 0 else "tie"


def show_compare(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints pair verdicts."""
    if len(results) == 1:
        for result in results:
            console.print(pair_table(result, escape(result["prompt"])))
        return
    rows = Table("item", "winner", "P(A)", "Z", "consistent", "status")
    for result in results[:MANY]:
        judged = [c["consistent"] for c in result.get("criteria", ()) if "consistent" in c]
        rows.add_row(
            escape(result["id"]),
            result.get("winner") or "-",
            number(result.get("probability")),
            number(result.get("score"), sign=True),
            f"{sum(map(bool, judged))}/{len(judged)}" if judged else "-",
            _status(result),
        )
    _print_rows(rows, results, console)


def pair_table(result: dict[str, Any], title: str) -> Table:
    """Returns the table of one pair: a row per criterion, the aggregate below."""
    table = Table(title=title, title_justify="left", show_footer=True)
    table.add_column("criterion", footer=f"P(A) = {number(result.get('probability'))}")
    table.add_column("preference", number(result.get("score"), sign=True), justify="right")
    table.add_column("bias", "", justify="right")
    table.add_column("verdict", result.get("winner") or result["status"])
    for criterion in result.get("criteria", ()):
        preference = criterion.get("preference")
        flips = criterion.get("consistent") is False
        table.add_row(
            escape(criterion["id"]),
            number(preference, sign=True),
            number(criterion.get("position_bias"), sign=True),
            verdict(preference) + (" (orders disagree)" if flips else ""),
        )
    if result.get("holistic_preference") is not None:
        whole = result["holistic_preference"]
        bias = number(result.get("holistic_bias"), sign=True)
        table.add_row("whole rubric", number(whole, sign=True), bias, verdict(whole))
    if result.get("error"):
        table.caption = escape(result["error"])
    return table


def show_score(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints verdicts on single images."""
    if len(results) == 1:
        result = results[0]
        title = escape(result["prompt"])
        table = Table(title=title, title_justify="left", show_footer=True)
        table.add_column("criterion", footer=f"score, {result['status']}")
        table.add_column("P(yes)", number(result.get("score")), justify="right")
        for criterion in result.get("criteria", ()):
            table.add_row(escape(criterion["id"]), number(criterion["probability"]))
        if result.get("error"):
            table.caption = escape(result["error"])
        console.print(table)
        return
    rows = Table("item", "score", "lowest criterion", "status")
    for result in results[:MANY]:
        judged = [c for c in result.get("criteria", ()) if c["probability"] is not None]
        lowest = min(judged, key=lambda c: c["probability"], default=None)
        rows.add_row(
            escape(result["id"]),
            number(result.get("score")),
            f"{escape(lowest['id'])} {number(lowest['probability'])}" if lowest else "-",
            _status(result),
        )
    _print_rows(rows, results, console)


def show_rank(results: Sequence[dict[str, Any]], console: Console) -> None:
    """Prints rankings."""
    if len(results) == 1 and results[0]["status"] != "error":
        result = results[0]
        table = Table("place", "image", "score", "win rate", title=escape(result["prompt"]))
        for place, candidate in enumerate(result["ranking"], start=1):
            table.add_row(
                str(place),
                escape(result["images"][candidate]),
                number(result["bradley_terry"][candidate], sign=True),
                number(result["win_rate"][candidate]),
            )
        console.print(table)
        return
    rows = Table("item", "ranking (best first)", "status")
    for result in results[:MANY]:
        order = " > ".join(str(candidate) for candidate in result.get("ranking", ()))
        rows.add_row(escape(result["id"]), order or "-", _status(result))
    _print_rows(rows, results, console)


def show_summary(outcome: Outcome, total: int, console: Console) -> None:
    """Prints one line: how many items, by status, and how long it took."""
    parts = [f"{count} {status}" for status, count in sorted(outcome.counts.items())]
    resumed = f", {outcome.skipped} resumed" if outcome.skipped else ""
    done = len(outcome.results)
    console.print(f"{done}/{total} items: {', '.join(parts)}{resumed}, {outcome.seconds:.1f} s")
    if outcome.interrupted:
        console.print("interrupted; the same command with --out goes on from here")


def _print_rows(rows: Table, results: Sequence[dict[str, Any]], console: Console) -> None:
    console.print(rows)
    if len(results) > MANY:
        console.print(f"... and {len(results) - MANY} more (--out or --json has them all)")
    for result in [r for r in results if r.get("error")][:MANY]:
        console.print(f"[red]{escape(result['id'])}:[/] {escape(result['error'])}", soft_wrap=True)


def _status(result: dict[str, Any]) -> str:
    status = result["status"]
    return f"[{_COLOURS.get(status, 'white')}]{status}[/]"
