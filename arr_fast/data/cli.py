"""`arr-fast data check | convert | formats`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import track
from rich.table import Table

from arr_fast.data.record import ItemError, Record

app = typer.Typer(no_args_is_help=True, help="Read, check and convert preference data.")
SHOWN = 20

_Format = Annotated[
    str | None, typer.Option("--format", help="Name of its format; recognised by default.")
]


@app.command("formats")
def formats() -> None:
    """List the formats."""
    from arr_fast.data.registry import FORMATS

    table = Table("format", "what it is", "written")
    for found in FORMATS.values():
        table.add_row(found.name, found.about, "yes" if found.write else "no")
    Console().print(table)


@app.command("check")
def check(
    path: Annotated[str, typer.Argument(help="A file or folder, or easy-vqa:test.")],
    format_name: _Format = None,
    images: Annotated[
        bool, typer.Option("--images/--no-images", help="Open and decode every image.")
    ] = True,
    json_path: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Count records and name what is wrong; exit 1 if anything could not be judged."""
    from arr_fast.cli.options import console, one_line_errors
    from arr_fast.data.check import check as check_file

    with one_line_errors():
        report = check_file(path, format_name, images=images)
        table = Table("", "", show_header=False, box=None)
        table.add_row("format", report.format)
        table.add_row("records", str(report.records))
        for name in ("kinds", "tasks", "labels"):
            counts = getattr(report, name)
            table.add_row(name, ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items())))
        table.add_row("images", f"{report.images} distinct" + ("" if images else ", not opened"))
        for name, found in report.findings().items():
            table.add_row(name, str(len(found)))
        table.add_row("result", "[green]pass[/]" if report.passed else "[red]FAIL[/]")
        console.print(table)
        for name, found in report.findings().items():
            for line in found[:SHOWN]:
                console.print(f"[yellow]{name}[/] {escape(line)}", soft_wrap=True)
            if len(found) > SHOWN:
                console.print(f"... and {len(found) - SHOWN} more {name} (--json has them all)")
        if json_path is not None:
            text = json.dumps(report.to_json(), indent=1, ensure_ascii=False)
            json_path.write_text(text + "\n", encoding="utf-8")
        if not report.passed:
            raise typer.Exit(1)


@app.command("convert")
def convert(
    source: Annotated[str, typer.Argument(metavar="IN", help="A file, folder or easy-vqa:test.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="A new file or folder.")],
    from_format: Annotated[
        str | None, typer.Option("--from", help="Format of IN; recognised by default.")
    ] = None,
    to_format: Annotated[str, typer.Option("--to", help="Format of OUT.")] = "arr",
    skip_errors: Annotated[
        bool, typer.Option("--skip-errors", help="Leave malformed rows out (they are named).")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite OUT.")] = False,
) -> None:
    """Write the records of one format in another; paths stay valid, nothing is downloaded."""
    from arr_fast.cli.options import console, err_console, one_line_errors
    from arr_fast.data.registry import format_named, read_records, write_records

    def skipped(error: ItemError) -> None:
        err_console.print(f"[yellow]skipped[/] {escape(str(error))}", soft_wrap=True)

    with one_line_errors():
        format_named(to_format)
        if target.exists() and not force and not (target.is_dir() and not any(target.iterdir())):
            raise ItemError(f"{target} exists; --force overwrites it")
        if to_format == "arr" and target.suffix.lower() not in (".json", ".jsonl", ".ndjson"):
            raise ItemError(f"{target}: expected a name that ends in .json or .jsonl")
        records = read_records(source, from_format, on_error=skipped if skip_errors else None)
        count = write_records(_shown(records, err_console), target, to_format)
        if not count:
            raise ItemError(f"{source}: holds no items")
        console.print(f"{count} records -> {target} ({to_format})", soft_wrap=True)


def _shown(records: Iterator[Record], console: Console) -> Iterable[Record]:
    return track(records, "converting", console=console, transient=True)
