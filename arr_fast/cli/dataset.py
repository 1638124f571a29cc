"""`arr-fast judge-dataset`: parquet or jsonl in, verdicts out, by a pool of Ray actors."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from arr_fast.cli import options as opt
from arr_fast.cli.options import console
from arr_fast.errors import ArrFastError

KindChoice = Literal["compare", "score", "rank"]
LINES = (".jsonl", ".ndjson", ".json")


@opt.takes_judge
def judge_dataset(
    data: Annotated[
        Path, typer.Argument(metavar="IN", help="A .parquet or .jsonl file, or a folder of them.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder of parquet files.")],
    kind: Annotated[
        KindChoice, typer.Option(help="Two images per row, one, or two and more.")
    ] = "compare",
    choice: opt.JudgeChoice = opt.DEFAULT_JUDGE,
    rubric: opt.RubricName = None,
    replicas: Annotated[int, typer.Option(min=1, help="Actors, each with a judge.")] = 1,
    batch_size: opt.BatchSize = 16,
    gpus_per_replica: Annotated[
        float | None, typer.Option(min=0.0, help="0.5 shares a GPU; default 1 or 0.")
    ] = None,
    cpus_per_replica: Annotated[float, typer.Option(min=0.0, help="Cores that Ray reserves.")] = 1,
    ray_address: Annotated[
        str | None, typer.Option(help="A running cluster; default: one of our own.")
    ] = None,
) -> None:
    """Judge a data set with a pool of Ray actors; exit 1 if any row has no verdict."""
    with opt.one_line_errors():
        from arr_fast.serve.ray_dataset import Work, judge_dataset
        from arr_fast.serve.ray_serve import connect, require_ray

        require_ray()
        files = sorted(p for p in data.iterdir() if p.is_file()) if data.is_dir() else [data]
        endings = {file.suffix.lower() for file in files}
        is_parquet = endings == {".parquet"}
        if not files or not (is_parquet or endings <= set(LINES)):
            raise ArrFastError(
                f"{data}: expected .parquet or .jsonl files, found {endings or None}"
            )
        if out.exists() and any(out.iterdir()):
            raise ArrFastError(f"{out} is not empty")
        import ray

        mine = connect(ray_address, cpus_per_replica * replicas)
        try:
            read = ray.data.read_parquet if is_parquet else ray.data.read_json
            folder = data if data.is_dir() else data.parent
            work = Work(
                kind,
                choice.arguments(),
                rubric=None if rubric is None else _whole_path(rubric),
                folder=str(folder.absolute()),
            )
            judged = judge_dataset(
                read([str(file.absolute()) for file in files]),
                work,
                replicas=replicas,
                batch_size=batch_size,
                gpus=gpus_per_replica,
                cpus=cpus_per_replica,
            ).materialize()
            judged.write_parquet(str(out.absolute()))
            by_status: Counter[str] = Counter()
            table: Any
            for table in judged.iter_batches(batch_format="pyarrow", batch_size=4096):
                by_status.update(table.column("status").to_pylist())
        finally:
            if mine:
                ray.shutdown()
        said = ", ".join(f"{n} {status}" for status, n in sorted(by_status.items()))
        console.print(f"{sum(by_status.values())} rows -> {out}: {said}", soft_wrap=True)
        if by_status["error"]:
            raise typer.Exit(1)


def _whole_path(rubric: str) -> str:
    """Actors run in folders of their own."""
    return str(Path(rubric).absolute()) if Path(rubric).suffix else rubric
