"""Options that several commands share, and the way from them to a judge."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from arr_fast.errors import ArrFastError

if TYPE_CHECKING:
    from arr_fast.data.items import InputItem
    from arr_fast.judge import Judge
    from arr_fast.rubric import Rubric

OrdersChoice = Literal["both", "AB", "BA"]
ModeChoice = Literal["criteria", "holistic", "both"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationChoice = Literal["none", "int8", "fp8"]

BUILTIN = "builtin:shapes"

Model = Annotated[str, typer.Option(help="builtin:shapes, a directory, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter to merge into the weights.")]
Dtype = Annotated[DtypeChoice, typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Impl = Annotated[str, typer.Option(help="auto, torch, triton, flash, xformers or reference.")]
Quantization = Annotated[QuantizationChoice, typer.Option(help="Linear weights, by torchao.")]
RubricName = Annotated[
    str | None, typer.Option("--rubric", help="A file, or the name of a packaged rubric.")
]
Orders = Annotated[OrdersChoice, typer.Option(help="both removes position bias.")]
Mode = Annotated[ModeChoice, typer.Option(help="One verdict per criterion, one in all, or both.")]
JsonPath = Annotated[
    Path | None, typer.Option("--json", help="Write one versioned object with everything.")
]
OutPath = Annotated[
    Path | None,
    typer.Option("--out", help="Append one line per item; an interrupted run goes on from here."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Items per call of the judge.")]

console = Console()
# Progress and errors keep out of the way of what is piped.
err_console = Console(stderr=True)


@contextmanager
def one_line_errors() -> Iterator[None]:
    """Prints deliberate errors as one line and exits with 1; others keep their traceback."""
    try:
        yield
    except (ArrFastError, ValueError, OSError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        err_console.print(f"[bold red]error:[/] {escape(text)}", soft_wrap=True)
        raise typer.Exit(1) from None


def quiet_libraries() -> None:
    """Keeps what libraries say while they load (optional binaries, bars) out of the output."""
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()


def load_judge(
    model: str,
    *,
    revision: str | None = None,
    adapter: str | None = None,
    dtype: str = "auto",
    device: str = "auto",
    impl: str = "auto",
    quantization: str = "none",
) -> Judge:
    """Loads a judge by command-line options."""
    with err_console.status(f"loading {model}"):
        quiet_libraries()
        from arr_fast.judge import Judge

        options: dict[str, Any] = {} if quantization == "none" else {"quantization": quantization}
        return Judge.from_pretrained(
            model,
            revision=revision,
            adapter=adapter,
            dtype=dtype,
            device=device,
            impl=impl,
            **options,
        )


class RubricBook:
    """Finds the rubric of an item: its own, the command's, or the default for model and task."""

    def __init__(self, chosen: str | None, model: str) -> None:
        self._chosen = chosen
        self._prefix = "shapes" if model == BUILTIN else ""
        self._loaded: dict[tuple[str, str], Rubric] = {}

    def __call__(self, item: InputItem) -> Rubric:
        """Returns the rubric of an item.

        Raises:
            RubricError: if it is missing, malformed or for the other task.
        """
        from arr_fast.errors import RubricError
        from arr_fast.rubric import Rubric

        task: Literal["t2i", "edit"] = "t2i" if item.source is None else "edit"
        name = item.rubric or self._chosen or self._default(task)
        key = (name, task)
        if key not in self._loaded:
            if name in Rubric.builtin_names():
                rubric = Rubric.builtin(name)
            elif Path(name).suffix:
                rubric = Rubric.load(name, task=task if name.endswith((".txt", ".md")) else None)
            else:
                rubric = Rubric.builtin(name)
            if rubric.task != task:
                needs = "a source image" if rubric.task == "edit" else "no source image"
                raise RubricError(f"{item.name}: rubric {name!r} needs {needs}")
            self._loaded[key] = rubric
        return self._loaded[key]

    def _default(self, task: str) -> str:
        if not self._prefix:
            return task
        return self._prefix if task == "t2i" else f"{self._prefix}_edit"
