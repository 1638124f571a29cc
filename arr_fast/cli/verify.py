"""`arr-fast verify`: replays verdicts with independent plain transformers forwards."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.progress import track
from rich.table import Table

from arr_fast import __version__
from arr_fast.cli import options as opt
from arr_fast.cli.options import console, err_console
from arr_fast.data.items import InputItem, ItemError, read_items

if TYPE_CHECKING:
    from arr_fast.judge import Judge
    from arr_fast.trace import VerdictTrace

SCHEMA = 1
# Other types have no bound that holds for every model.
TOLERANCES = {"float32": 1e-4}
# Below this gap between router logits, float32 rounding may pick another expert on either side.
ROUTER_GAP = 1e-5
EXCLUDED_SHARE = 0.05


def verify(
    items: Annotated[
        Path | None, typer.Argument(help="Pairs to judge (as compare); else the bundled ones.")
    ] = None,
    model: opt.Model = opt.BUILTIN,
    n: Annotated[int, typer.Option("--n", min=1, help="Verdicts to replay.")] = 50,
    tolerance: Annotated[
        float | None, typer.Option(help="Largest allowed |difference| in log-odds.")
    ] = None,
    rubric: opt.RubricName = None,
    revision: opt.Revision = None,
    adapter: opt.Adapter = None,
    dtype: Annotated[
        opt.DtypeChoice, typer.Option(help="Of both sides; other than float32, give --tolerance.")
    ] = "float32",
    device: opt.Device = "auto",
    impl: opt.Impl = "auto",
    compile: opt.Compile = "off",
    json_path: opt.JsonPath = None,
) -> None:
    """Replay a sample of verdicts with plain transformers; exit 1 above the tolerance."""
    with opt.one_line_errors():
        bound = tolerance if tolerance is not None else TOLERANCES.get(dtype)
        if bound is None:
            raise ItemError(f"--dtype {dtype} has no bound of its own; give --tolerance")
        pairs = _pairs(items)
        judge = opt.load_judge(
            opt.JudgeChoice(
                model=model,
                revision=revision,
                adapter=adapter,
                dtype=dtype,
                device=device,
                impl=impl,
                compile=compile,
            )
        )
        traces = _sample(_traces(judge, pairs, opt.RubricBook(rubric, model), n), n)
        rows, excluded = _replay(judge, traces, revision, adapter, bound)
        if not rows:
            raise ItemError(f"all {len(excluded)} verdicts hang on a router near-tie")
        # A NaN on either side is the largest difference there is.
        worst = max(
            rows, key=lambda row: math.inf if row["difference"] is None else row["difference"]
        )
        flips = [
            row
            for row in rows
            if row["difference"] is not None
            and row["engine"] * row["transformers"] < 0
            and abs(row["transformers"]) > 2 * bound
        ]
        largest = math.inf if worst["difference"] is None else worst["difference"]
        few = len(excluded) <= EXCLUDED_SHARE * (len(rows) + len(excluded))
        passed = largest <= bound and not flips and few
        table = Table("", "", show_header=False, box=None)
        table.add_row("model", f"{judge.engine.loaded.name} ({judge.engine.loaded.revision})")
        table.add_row("verdicts replayed", str(len(rows)))
        table.add_row("largest |difference|", f"{largest:.3g} in log-odds")
        table.add_row(
            "of", f"item {worst['item']}, criterion {worst['criterion']}, {worst['order']}"
        )
        table.add_row("tolerance", f"{bound:.3g}")
        table.add_row("sign flips", str(len(flips)))
        if excluded:
            table.add_row("excluded", f"{len(excluded)} that hang on an expert router's near-tie")
        table.add_row("result", "[green]pass[/]" if passed else "[red]FAIL[/]")
        console.print(table)
        if json_path is not None:
            document = {
                "schema": f"arr_fast.verify/{SCHEMA}",
                "arr_fast_version": __version__,
                "model": judge.engine.loaded.name,
                "revision": judge.engine.loaded.revision,
                "dtype": dtype,
                "impl": judge.engine.impl,
                "tolerance": bound,
                "largest_difference": worst["difference"],
                "flips": len(flips),
                "excluded": excluded,
                "passed": passed,
                "verdicts": rows,
            }
            json_path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        if not passed:
            raise typer.Exit(1)


def _pairs(path: Path | None) -> list[InputItem]:
    from arr_fast.demo import demo_items

    return demo_items() if path is None else read_items(path, count=2)


def _traces(
    judge: Judge, pairs: list[InputItem], rubric_of: opt.RubricBook, n: int
) -> list[VerdictTrace]:
    """Traces of pairs in both orders with the holistic leaf, and of their first images alone."""
    from dataclasses import replace

    from arr_fast.data.record import ImageRef, image_bytes
    from arr_fast.images import CanonicalImage, to_image

    def read(image: ImageRef, name: str) -> list[CanonicalImage]:
        return [to_image(image_bytes(image), name=name)]

    found: list[VerdictTrace] = []
    for number, pair in enumerate(pairs):
        rubric = rubric_of(pair)
        sources = None if pair.source is None else read(pair.source, f"{pair.name}: source image")
        first, second = (
            read(image, f"{pair.name}: image {n}") for n, image in enumerate(pair.images)
        )
        prompts = [pair.prompt]
        traces = judge.trace(prompts, first, second, rubric, sources=sources, mode="both")
        traces += judge.trace(prompts, first, rubric=rubric, sources=sources)
        found += [replace(trace, item=number) for trace in traces]
        if len(found) >= 20 * n:
            break
    return found


def _sample(traces: list[VerdictTrace], n: int) -> list[VerdictTrace]:
    """n traces, evenly spread over items, orders and criteria."""
    if len(traces) <= n:
        return traces
    return [traces[i * len(traces) // n] for i in range(n)]


def _replay(
    judge: Judge,
    traces: list[VerdictTrace],
    revision: str | None,
    adapter: str | None,
    bound: float,
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Returns a row per verdict, and apart those whose experts rounding may have changed."""
    from arr_fast.replay import Replayer
    from arr_fast.verdict_arrays import jsonable

    loaded = judge.engine.loaded
    replayer = Replayer.from_pretrained(
        loaded.path, dtype=loaded.dtype, device=loaded.device, revision=revision, adapter=adapter
    )
    rows: list[dict[str, Any]] = []
    excluded: list[dict[str, Any]] = []
    for trace in track(traces, "replaying", console=err_console, transient=True):
        expected = replayer.log_odds(trace)
        difference = abs(trace.log_odds - expected)
        near_tie = difference > bound and replayer.router_gaps(trace) < ROUTER_GAP
        (excluded if near_tie else rows).append(
            {
                "item": trace.item,
                "criterion": trace.criterion,
                "order": trace.order,
                "tokens": len(trace.input_ids),
                "engine": jsonable(trace.log_odds),
                "transformers": jsonable(expected),
                "difference": jsonable(difference),
            }
        )
    return rows, excluded
