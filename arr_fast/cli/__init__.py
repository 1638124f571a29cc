"""The command line: `arr-fast COMMAND --help`. Heavy imports happen inside the commands."""

from __future__ import annotations

import io
import sys
from typing import Annotated

import typer

from arr_fast import __version__
from arr_fast.cli import benching, dataset, demo, info, judging, rubric, training, verify
from arr_fast.cli.kernels import kernels_app
from arr_fast.data import cli as data_cli
from arr_fast.evals import cli as evals_cli
from arr_fast.serve import cli as serve_cli

app = typer.Typer(
    name="arr-fast",
    help="Many rubric criteria over image pairs, read in one forward of a vision-language model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _print_version(asked: bool) -> None:
    if asked:
        typer.echo(f"arr-fast {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="And exit.")
    ] = False,
) -> None:
    del version
    # An id or a path may hold what the terminal cannot spell; that must not end a run.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


app.command("demo")(demo.demo)
app.command("compare")(judging.compare)
app.command("score")(judging.score)
app.command("rank")(judging.rank)
app.command("verify")(verify.verify)
app.command("eval")(evals_cli.evaluate)
app.command("train")(training.train)
app.command("sample")(training.sample)
app.command("info")(info.info)
app.command("judge-dataset")(dataset.judge_dataset)
app.command("serve")(serve_cli.serve)
app.add_typer(benching.app, name="bench")
app.add_typer(data_cli.app, name="data")
app.add_typer(kernels_app, name="kernels")
app.add_typer(rubric.app, name="rubric")
