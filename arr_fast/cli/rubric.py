"""`arr-fast rubric`: from labelled pairs, or prompts alone, to a verified and selected rubric."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.markup import escape
from rich.table import Table

from arr_fast import __version__
from arr_fast.cli import options as opt
from arr_fast.cli.options import JSON_ERRORS, console, err_console
from arr_fast.cli.stages import Stages
from arr_fast.errors import ArrFastError

if TYPE_CHECKING:
    from arr_fast.autorubric.labelled import Reading
    from arr_fast.autorubric.pipeline import AutoRubric, Selection
    from arr_fast.autorubric.refine import PairOutcome
    from arr_fast.autorubric.structure import Structured
    from arr_fast.autorubric.templates import Exemplar, TemplateSet
    from arr_fast.autorubric.text_backend import TextBackend
    from arr_fast.judge import Judge
    from arr_fast.rubric import Rubric

app = typer.Typer(
    help="Write, verify, refine, structure and select criteria.", no_args_is_help=True
)

Stage = Literal["generate", "verify", "refine", "structure", "select", "run"]
STAGES: dict[Stage, str] = {
    "generate": "Write criteria for every labelled pair (or, with --zero-shot, for every prompt).",
    "verify": "Judge every pair by its own criteria: do they recover the label?",
    "refine": "Rewrite what failed, at most --refinements times.",
    "structure": "Merge verified criteria into one hierarchical rubric.",
    "select": "Choose and weigh criteria by cross-validated accuracy; writes rubric.yaml.",
    "run": "All stages in a row.",
}
WriterKind = Literal["local", "openai"]
KEY_VARIABLE = "OPENAI_API_KEY"
PROMPTS_SCHEMA = 1


@dataclass(slots=True)
class _Request:
    """The options of a stage."""

    data: str
    format: str | None
    limit: int | None
    folder: Path
    zero_shot: bool
    writer: WriterKind
    writer_model: str | None
    base_url: str | None
    concurrency: int
    attempts: int
    timeout: float
    budget: int | None
    template_set: str | None
    templates: Path | None
    guide: Path | None
    batch_size: int
    json_path: Path | None
    judge: opt.JudgeChoice
    settings: dict[str, Any] = field(default_factory=dict)


def _stage_command(stage: Stage) -> Callable[..., None]:
    @opt.takes_judge
    def command(
        data: Annotated[str, typer.Argument(metavar="PAIRS", help="Labelled data of any format.")],
        folder: Annotated[
            Path,
            typer.Option("--dir", help="Keeps every finished call; run again to go on from it."),
        ],
        judge: opt.JudgeChoice = opt.DEFAULT_JUDGE,
        writer: Annotated[
            WriterKind, typer.Option(help="local: the judge's own model; openai: an endpoint.")
        ] = "local",
        writer_model: Annotated[
            str | None, typer.Option(help="Name of the endpoint's model.")
        ] = None,
        base_url: Annotated[
            str | None, typer.Option(help=f"The endpoint; its key comes from {KEY_VARIABLE}.")
        ] = None,
        zero_shot: Annotated[
            bool, typer.Option("--zero-shot", help="From prompts alone, with generate.")
        ] = False,
        specific: Annotated[
            bool, typer.Option("--specific", help="Criteria per prompt in place of general ones.")
        ] = False,
        criteria: Annotated[int, typer.Option("--criteria", "-k", help="Per pair.")] = 5,
        refinements: Annotated[int, typer.Option(help="Most rewrites per pair.")] = 5,
        min_support: Annotated[
            int, typer.Option(help="Fewest pairs behind a criterion of the structured rubric.")
        ] = 1,
        selected: Annotated[int, typer.Option(help="Most criteria of the rubric.")] = 20,
        folds: Annotated[int, typer.Option(help="Of cross-validation.")] = 5,
        temperature: Annotated[float, typer.Option(help="Of first answers; 0 is greedy.")] = 0.0,
        refine_temperature: Annotated[float, typer.Option(help="Of rewrites.")] = 0.7,
        max_tokens: Annotated[int, typer.Option(help="Longest answer.")] = 1024,
        require_consistent: Annotated[
            bool, typer.Option("--require-consistent", help="Both orders must recover the label.")
        ] = False,
        seed: Annotated[int, typer.Option(min=0, help="Of sampling and folds.")] = 0,
        template_set: Annotated[
            str | None, typer.Option(help="default or shapes; by default what fits the writer.")
        ] = None,
        templates: Annotated[
            Path | None, typer.Option(help="Folder whose templates replace the packaged ones.")
        ] = None,
        guide: Annotated[
            Path | None,
            typer.Option(help="Exemplars, JSONL: prompt, preferred, dispreferred, rationale."),
        ] = None,
        concurrency: Annotated[int, typer.Option(min=1, help="Calls in flight.")] = 8,
        attempts: Annotated[int, typer.Option(min=1, help="Calls per request at most.")] = 5,
        timeout: Annotated[float, typer.Option(help="Seconds per call.")] = 120.0,
        budget: Annotated[
            int | None, typer.Option(min=0, help="Most requests sent in this process.")
        ] = None,
        format_name: Annotated[
            str | None, typer.Option("--format", help="Data format; recognised by default.")
        ] = None,
        limit: Annotated[int | None, typer.Option(min=1, help="Only the first records.")] = None,
        batch_size: opt.BatchSize = 16,
        json_path: opt.JsonPath = None,
    ) -> None:
        with opt.one_line_errors():
            if writer == "local" and (writer_model is not None or base_url is not None):
                raise ValueError("--writer-model and --base-url need --writer openai")
            request = _Request(
                *(data, format_name, limit, folder, zero_shot, writer, writer_model),
                *(base_url, concurrency, attempts, timeout, budget, template_set, templates),
                *(guide, batch_size, json_path),
                judge=judge,
                settings={
                    **{"criteria": criteria, "refinements": refinements, "general": not specific},
                    **{"temperature": temperature, "refine_temperature": refine_temperature},
                    **{"max_tokens": max_tokens, "require_consistent": require_consistent},
                    **{"selected": selected, "folds": folds, "seed": seed},
                    **{"min_support": min_support},
                },
            )
            _run_prompts(request, stage) if zero_shot else _run_pairs(request, stage)

    return command


for _name, _help in STAGES.items():
    app.command(_name, help=_help)(_stage_command(_name))


@app.command()
def show(
    rubric: Annotated[
        Path, typer.Argument(help="A rubric file, or the folder of a run.", metavar="RUBRIC")
    ],
    text: Annotated[bool, typer.Option("--text", help="Numbered Theme/Tip text.")] = False,
) -> None:
    """Print a rubric, what its words give away, and how a run came to it."""
    with opt.one_line_errors():
        from arr_fast.autorubric.pipeline import REPORT, RUBRIC, STRUCTURED
        from arr_fast.rubric import Rubric

        path = rubric
        if rubric.is_dir():
            found = [rubric / name for name in (RUBRIC, STRUCTURED) if (rubric / name).is_file()]
            if not found:
                raise ArrFastError(f"{rubric}: no {RUBRIC} and no {STRUCTURED} in it yet")
            path = found[0]
            if (rubric / REPORT).is_file() and not text:
                _print_report(json.loads((rubric / REPORT).read_text(encoding="utf-8")))
        loaded = Rubric.load(path)
        if text:
            typer.echo(loaded.to_text(), nl=False)
        else:
            _print_rubric(loaded)


@app.command()
def demo(
    folder: Annotated[
        Path, typer.Option("--dir", help="Where everything goes; run again to go on from it.")
    ] = Path("rubric-demo"),
    model: opt.Model = opt.BUILTIN,
    train: Annotated[int, typer.Option(min=10, help="Labelled pairs to learn from.")] = 100,
    untouched: Annotated[int, typer.Option(min=10, help="Pairs to evaluate on.")] = 2000,
    seed: Annotated[int, typer.Option(min=0, help="Of preference, scenes and labels.")] = 0,
    resamples: Annotated[int, typer.Option(min=0, help="Bootstrap resamples.")] = 2000,
    faithfulness: Annotated[
        int, typer.Option(min=0, help="Pairs for the judge without a rubric; 0 for none.")
    ] = 400,
    easy_vqa: Annotated[
        bool, typer.Option("--easy-vqa/--no-easy-vqa", help="Also measure single images.")
    ] = True,
    batch_size: opt.BatchSize = 16,
) -> None:
    """Learn a hidden preference from 100 pairs, measure on 2,000; exits 1 if a bar is missed."""
    with opt.one_line_errors():
        from arr_fast.autorubric.demo import run_demo
        from arr_fast.autorubric.local_backend import LocalBackend

        judge = opt.load_judge(opt.JudgeChoice(model=model))
        with Stages(err_console) as stages:
            outcome = run_demo(
                judge,
                LocalBackend(judge, batch_size=batch_size),
                folder,
                train=train,
                untouched=untouched,
                seed=seed,
                resamples=resamples,
                faithfulness=faithfulness,
                easy_vqa=easy_vqa,
                on_stage=stages.begin,
                progress=stages.advance,
            )
        _print_report(outcome.report)
        _print_rubric(outcome.selection.rubric)
        typer.echo(outcome.text)
        for gate in outcome.comparison.gates:
            mark = "[green]passed[/]" if gate.passed else "[bold red]missed[/]"
            console.print(f"{mark}  {escape(gate.name)}: {escape(gate.detail)}")
        console.print(f"written to {folder}/: rubric.yaml, tables.md, demo.json, demo.html")
        if not outcome.comparison.passed:
            raise typer.Exit(1)


def _run_pairs(request: _Request, stage: Stage) -> None:
    from arr_fast.autorubric.labelled import read_labelled
    from arr_fast.autorubric.pipeline import AutoRubric
    from arr_fast.autorubric.settings import AutoRubricSettings
    from arr_fast.data.registry import read_records

    settings = AutoRubricSettings(**request.settings)
    if not settings.general and stage in ("structure", "select"):
        raise ArrFastError(f"{stage} is for general criteria; --specific ends with refine")
    reading = read_labelled(islice(read_records(request.data, request.format), request.limit))
    for kind, found in reading.problems().items():
        for line in found[:20]:
            err_console.print(f"[yellow]{kind}:[/] {escape(line)}", soft_wrap=True)
    if not reading.pairs:
        raise ArrFastError(f"{request.data}: no labelled pair to learn from")
    exemplars, templates = _exemplars(request.guide), _templates(request)
    judge = opt.load_judge(request.judge)
    with Stages(err_console) as stages:
        loop = AutoRubric(
            judge,
            _backend(request, judge),
            templates,
            settings,
            request.folder,
            exemplars=exemplars,
            budget=request.budget,
            batch_size=request.batch_size,
            on_stage=stages.begin,
            progress=stages.advance,
        )
        try:
            document = _stages(loop, reading, stage)
        finally:
            loop.close()
    _print_report(document)
    if request.json_path is not None:
        _write_json(document, request.json_path)
    unanswered = document["verification"]["status"].get("unanswered", 0)
    if unanswered:
        raise ArrFastError(f"{unanswered} pairs got no answer; run again to ask for them anew")


def _stages(loop: AutoRubric, reading: Reading, stage: Stage) -> dict[str, Any]:
    """Runs the loop up to a stage; earlier ones come from the log of calls."""
    from arr_fast.autorubric.refine import outcomes_of
    from arr_fast.autorubric.verify import unverified

    structured: Structured | None = None
    selection: Selection | None = None
    states = loop.generate(reading.pairs)
    if stage == "generate":
        outcomes: list[PairOutcome] = outcomes_of(
            states, [unverified(state) for state in states], loop.settings.refinements
        )
        return loop.report(reading, outcomes)
    outcomes = loop.verify(states)
    if stage != "verify":
        outcomes = loop.refine(outcomes)
    if not loop.settings.general:
        loop.prompt_rubrics(outcomes)
    elif stage in ("structure", "select", "run"):
        structured = loop.structure(outcomes)
        if stage != "structure":
            selection = loop.select(outcomes, structured)
            _print_rubric(selection.rubric)
    return loop.report(reading, outcomes, structured, selection)


def _run_prompts(request: _Request, stage: Stage) -> None:
    from arr_fast.autorubric.call_log import CallLog
    from arr_fast.autorubric.generate import generate_from_prompts
    from arr_fast.autorubric.pipeline import CALLS, PROMPT_RUBRICS, prompt_rubric
    from arr_fast.autorubric.settings import AutoRubricSettings
    from arr_fast.autorubric.writer import Writer
    from arr_fast.data.record import image_bytes
    from arr_fast.data.registry import read_records
    from arr_fast.data.writing import plain, write_json_rows
    from arr_fast.images import to_image

    if stage != "generate":
        raise ArrFastError("--zero-shot is an option of generate: there is no label to verify by")
    prompts: dict[tuple[str, str], Any] = {}
    for record in islice(read_records(request.data, request.format), request.limit):
        source = None
        if record.source is not None:
            source = to_image(image_bytes(record.source), name=f"{record.name}: source image")
        key = record.prompt, source.content_hash if source is not None else ""
        prompts.setdefault(key, (record.prompt, source))
    if not prompts:
        raise ArrFastError(f"{request.data}: holds no prompts")
    exemplars, templates = _exemplars(request.guide), _templates(request)
    judge = opt.load_judge(request.judge) if request.writer == "local" else None
    settings = AutoRubricSettings(**{**request.settings, "general": False})
    with CallLog(request.folder / CALLS) as log, Stages(err_console) as stages:
        writer = Writer(_backend(request, judge), log, request.budget)
        items = list(prompts.values())
        stages.begin(f"generate: {len(items)} prompts")
        found = generate_from_prompts(writer, templates, items, settings, exemplars, stages.advance)
    rows = []
    for (prompt, source), each in zip(items, found, strict=True):
        row: dict[str, Any] = {"prompt": prompt, "problem": each.problem or None, "raw": each.raw}
        if each.texts:
            rubric = prompt_rubric(prompt, each.texts, "edit" if source is not None else "t2i")
            row["rubric"] = rubric.model_dump(mode="json", exclude_defaults=True)
        rows.append(row)
    write_json_rows(rows, request.folder / PROMPT_RUBRICS)
    failed = sum(not each.texts for each in found)
    if request.json_path is not None:
        document = {
            "schema": f"arr_fast.rubric_prompts/{PROMPTS_SCHEMA}",
            "arr_fast_version": __version__,
            "settings": settings.model_dump(mode="json"),
            "writer": writer.backend.identity,
            "cost": writer.cost.to_json(),
            "failed": failed,
            "prompts": rows,
        }
        _write_json(plain(document), request.json_path)
    cost = ", ".join(f"{name} {value:g}" for name, value in writer.cost.to_json().items())
    console.print(f"{len(found) - failed} of {len(found)} prompts have criteria; {cost}")
    if failed:
        raise ArrFastError(f"{failed} prompts have no criteria; see {PROMPT_RUBRICS}")


def _write_json(document: dict[str, Any], path: Path) -> None:
    text = json.dumps(document, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8", errors=JSON_ERRORS)


def _backend(request: _Request, judge: Judge | None) -> TextBackend:
    if request.writer == "local":
        from arr_fast.autorubric.local_backend import LocalBackend

        assert judge is not None
        return LocalBackend(judge, batch_size=request.batch_size)
    from arr_fast.autorubric.openai_backend import OpenAIBackend

    if request.writer_model is None:
        raise ArrFastError("--writer openai needs --writer-model")
    return OpenAIBackend(
        request.writer_model,
        base_url=request.base_url,
        concurrency=request.concurrency,
        attempts=request.attempts,
        timeout=request.timeout,
    )


def _templates(request: _Request) -> TemplateSet:
    from arr_fast.autorubric.templates import TemplateSet

    fits = (
        "shapes" if request.writer == "local" and request.judge.model == opt.BUILTIN else "default"
    )
    return TemplateSet(request.template_set or fits, request.templates)


def _exemplars(guide: Path | None) -> list[Exemplar]:
    if guide is None:
        return []
    from arr_fast.autorubric.guide import read_guide

    return read_guide(guide)


def _print_report(document: dict[str, Any]) -> None:
    verification = document["verification"]
    status = ", ".join(f"{count} {name}" for name, count in verification["status"].items())
    rate = verification["pass_rate_unrefined"]
    lines = [("pairs", f"{document['pairs']['used']}: {status}")]
    if rate is not None:
        lines.append(("pass unrefined", f"{100 * rate:.1f} %"))
        lines.append(("refinements", str(verification["refinements"])))
        lines.append(("discarded", f"{100 * verification['discard_rate']:.1f} %"))
    lines.append(("unusable answers", str(len(verification["unusable_answers"]))))
    for name in ("writer", "judge"):
        cost = document["cost"][name]
        lines.append((name, ", ".join(f"{key} {value:g}" for key, value in cost.items())))
    if "structure" in document:
        made = document["structure"]
        lines.append(("structure", f"{made['criteria']} criteria by {made['method']}"))
        lines += [("", note) for note in made["notes"]]
    if "selection" in document:
        chosen = document["selection"]
        for name, result in chosen["cross_validation"]["methods"].items():
            mark = " (chosen)" if name == chosen["method"] else ""
            accuracy = f"{100 * result['accuracy']:.1f} % of held-out pairs{mark}"
            lines.append((f"{name}, cross-validated", accuracy))
        lines += [("warning", warning) for warning in chosen["warnings"]]
    table = Table(show_header=False)
    for name, value in lines:
        table.add_row(name, escape(value))
    console.print(table)


def _print_rubric(rubric: Rubric) -> None:
    from arr_fast.autorubric.wording import rubric_warnings

    table = Table("weight", "level", "theme", "criterion", title=f"{rubric.name} ({rubric.task})")
    for criterion in rubric.criteria:
        text = escape("\n".join([criterion.text, *(f"- {tip}" for tip in criterion.tips)]))
        weight = f"{criterion.weight:.2f}"
        table.add_row(weight, criterion.level, escape(criterion.theme or ""), text)
    console.print(table)
    for warning in rubric_warnings(rubric):
        err_console.print(f"[yellow]warning:[/] {escape(warning)}", soft_wrap=True)
