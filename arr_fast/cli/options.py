"""Options that several commands share, and the way from them to a judge."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer
from rich.console import Console
from rich.markup import escape

from arr_fast.errors import ArrFastError
from arr_fast.rubric_book import BUILTIN, RubricBook

if TYPE_CHECKING:
    from arr_fast.judge import Judge

__all__ = ["BUILTIN", "RubricBook"]

OrdersChoice = Literal["both", "AB", "BA"]
ModeChoice = Literal["criteria", "holistic", "both"]
DtypeChoice = Literal["auto", "float32", "bfloat16", "float16"]
QuantizationChoice = Literal["none", "int8", "fp8"]
CompileChoice = Literal["off", "auto", "on"]

Model = Annotated[str, typer.Option(help="builtin:shapes, a directory, or a hub id.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Adapter = Annotated[str | None, typer.Option(help="PEFT adapter to merge into the weights.")]
Dtype = Annotated[DtypeChoice, typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Impl = Annotated[str, typer.Option(help="auto, torch, triton, flash, xformers or reference.")]
Quantization = Annotated[QuantizationChoice, typer.Option(help="Linear weights, by torchao.")]
Compile = Annotated[
    CompileChoice, typer.Option(help="Decoder layers; auto: where a C++ compiler is found.")
]
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

# For files of JSON: a lone surrogate (of a file name, say) becomes "\udc80", as JSON spells it.
JSON_ERRORS = "backslashreplace"

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


@dataclass(frozen=True, slots=True)
class JudgeChoice:
    """Which judge a command loads: the options that `takes_judge` adds to it."""

    model: Model = BUILTIN
    revision: Revision = None
    adapter: Adapter = None
    dtype: Dtype = "auto"
    device: Device = "auto"
    impl: Impl = "auto"
    quantization: Quantization = "none"
    compile: Compile = "off"

    def arguments(self) -> dict[str, Any]:
        """Arguments of `Judge.from_pretrained`."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        if self.quantization == "none":
            del named["quantization"]
        named["compile"] = {"off": False, "on": True}.get(self.compile, self.compile)
        return named


DEFAULT_JUDGE = JudgeChoice()


def takes_judge(command: Callable[..., None]) -> Callable[..., None]:
    """Gives a command one option per field of `JudgeChoice`, in place of its argument of that type.

    Typer reads a command's signature, so the signature is what is rewritten.
    """
    declared = list(inspect.signature(command, eval_str=True).parameters.values())
    (chosen,) = [p.name for p in declared if p.annotation is JudgeChoice]
    hints = get_type_hints(JudgeChoice, include_extras=True)
    fields = [
        inspect.Parameter(f.name, f.kind, default=f.default, annotation=hints[f.name])
        for f in inspect.signature(JudgeChoice).parameters.values()
    ]
    shown = [p for each in declared for p in (fields if each.name == chosen else [each])]

    @functools.wraps(command)
    def with_judge(**given: Any) -> None:
        loading = {field.name: given.pop(field.name) for field in fields}
        command(**given, **{chosen: JudgeChoice(**loading)})

    signature = inspect.Signature(
        [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in shown], return_annotation=None
    )
    # Typer looks at both.
    with_judge.__signature__ = signature  # type: ignore[attr-defined]
    with_judge.__annotations__ = {p.name: p.annotation for p in shown}
    return with_judge


def load_judge(choice: JudgeChoice, **engine: Any) -> Judge:
    """Loads the judge that a command's options name; `engine` are fields of `EngineConfig`."""
    with err_console.status(f"loading {choice.model}"):
        quiet_libraries()
        from arr_fast.judge import Judge

        return Judge.from_pretrained(**choice.arguments(), **engine)
