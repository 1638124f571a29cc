"""`arr-fast bench ...`: measurements side by side, gated on agreement."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from arr_fast.cli import options as opt
from arr_fast.cli.options import console, err_console

app = typer.Typer(no_args_is_help=True, help="Measure engines side by side, gated on agreement.")


@app.command("judge")
def judge(
    model: opt.Model = "random:qwen3_vl-29m",
    workload: Annotated[
        str,
        typer.Option(
            help="Names, comma-separated; NAME-sweep: K = 1 to 64; acceptance: the whole table."
        ),
    ] = "design9",
    engines: Annotated[
        str, typer.Option(help="Comma-separated; an unknown name lists what there is.")
    ] = "ours,transformers,transformers-kv-copied",
    repeats: Annotated[int, typer.Option(min=1, help="Timed runs of each point.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    memory: Annotated[bool, typer.Option(help="Also measure peak memory.")] = True,
    vllm_python: Annotated[
        str | None, typer.Option(help="Interpreter that has vLLM, for the vllm engine.")
    ] = None,
    impl: opt.Impl = "auto",
    quantization: opt.Quantization = "none",
    csv: Annotated[Path | None, typer.Option(help="Append rows here.")] = None,
    png: Annotated[
        Path | None, typer.Option(help="Plot cost against K; needs --csv and several K.")
    ] = None,
    json_path: opt.JsonPath = None,
) -> None:
    """Time judges on one workload; nothing is timed unless all engines agree. Exit 1 otherwise."""
    with opt.one_line_errors():
        names = _names(workload)
        has_curve = len(names) > 1 or any(n == "acceptance" or n.endswith("-sweep") for n in names)
        if png is not None and (csv is None or not has_curve):
            raise ValueError("--png needs --csv and several K: --workload NAME-sweep, for example")
        opt.quiet_libraries()
        from arr_fast.bench.judge import run_judge_bench
        from arr_fast.bench.plot import curves

        settings: dict[str, Any] = {"impl": impl}
        if quantization != "none":
            settings["quantization"] = quantization
        result = run_judge_bench(
            model,
            workload,
            _names(engines),
            repeats=repeats,
            threads=threads,
            memory=memory,
            vllm_python=vllm_python,
            judge_options=settings,
            csv=csv,
            json_path=json_path,
            png=png,
            say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )
        if result.exit_code:
            raise typer.Exit(result.exit_code)
        if png is not None and not curves(result.rows):
            raise ValueError(f"{png} was not drawn: no shape was measured at two K")


@app.command("serve")
def serve(
    model: Annotated[
        str, typer.Option(help="Loaded twice: by the server, and in process to compare with.")
    ] = "random:qwen3_vl-tiny",
    clients: Annotated[int, typer.Option(min=2, help="Clients at once.")] = 64,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="Of the crowd; one client alone gets a quarter of it.")
    ] = 120.0,
    malformed: Annotated[float, typer.Option(min=0.0, max=0.5, help="Share of requests.")] = 0.05,
    leaving: Annotated[
        float, typer.Option(min=0.0, max=0.5, help="Share of requests whose client leaves.")
    ] = 0.05,
    max_queue: Annotated[int, typer.Option(min=1, help="Bound of the server's queue.")] = 48,
    seed: Annotated[int, typer.Option(min=0, help="Of requests and choices.")] = 0,
    json_path: opt.JsonPath = None,
) -> None:
    """Load a server of its own and hold it to its promises. Exit 1 if one is broken."""
    with opt.one_line_errors():
        opt.quiet_libraries()
        from arr_fast.bench.serve import Load, run_serve_bench, table_of

        load = Load(
            model=model,
            clients=clients,
            seconds=seconds,
            malformed=malformed,
            leaving=leaving,
            max_queue=max_queue,
            seed=seed,
        )
        result = run_serve_bench(load, json_path=json_path, say=err_console.print)
        console.print(table_of(result))
        for problem in result.problems:
            console.print(problem, markup=False, highlight=False, soft_wrap=True)
        if result.exit_code:
            raise typer.Exit(result.exit_code)


@app.command("rpo")
def rpo(
    workload: Annotated[
        str, typer.Option(help="tiny (overhead-bound), shapes (compute-bound); comma-separated.")
    ] = "tiny,shapes",
    engines: Annotated[
        str, typer.Option(help="Comma-separated: ours, ours-eager, ours-serial, reference-loop.")
    ] = "ours,ours-eager,ours-serial,reference-loop",
    pairs: Annotated[int, typer.Option(min=1, help="Per iteration.")] = 16,
    chunks: Annotated[int, typer.Option(min=1, help="Per iteration.")] = 8,
    micro_batch: Annotated[int, typer.Option(min=1, help="Rows per training forward.")] = 16,
    repeats: Annotated[int, typer.Option(min=1, help="Timed iterations of each.")] = 5,
    judge_seconds: Annotated[
        float, typer.Option(min=0.0, help="Per pair, of a judge that sleeps.")
    ] = 0.0,
    judge_model: Annotated[
        str | None, typer.Option("--judge", help="A real judge instead: builtin:shapes.")
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Default: all cores.")] = None,
    csv: Annotated[Path | None, typer.Option(help="Append rows here.")] = None,
    json_path: opt.JsonPath = None,
) -> None:
    """Time one RPO iteration; nothing is timed unless all gradients agree. Exit 1 otherwise."""
    with opt.one_line_errors():
        if judge_model is not None and judge_seconds:
            raise ValueError("--judge-seconds is for the judge that sleeps, not for --judge")
        opt.quiet_libraries()
        from arr_fast.bench.rpo import run_rpo_bench

        judge = None
        if judge_model is not None:
            from arr_fast.integrations.rpo_reward import build_rewards
            from arr_fast.rpo.judge_config import JudgeConfig, JudgeOptions

            # The generator is untrained: orders disagree, and the mean of both decides.
            options = JudgeOptions(inconsistent="keep")
            section = JudgeConfig(model=judge_model, device="cpu", options=options)
            judge = build_rewards({"rubric": section}, [])[0]["rubric"]
        run_rpo_bench(
            _names(workload),
            _names(engines),
            pairs=pairs,
            chunks=chunks,
            micro_batch=micro_batch,
            repeats=repeats,
            judge=judge,
            judge_name=judge_model or "sleeping",
            judge_seconds=judge_seconds,
            threads=threads,
            csv_path=csv,
            json_path=json_path,
            say=lambda line: console.print(line, markup=False, highlight=False, soft_wrap=True),
        )


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]
