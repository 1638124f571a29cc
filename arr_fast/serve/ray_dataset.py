"""Offline judging of parquet and jsonl files by a pool of Ray actors, through ray.data.

Each actor loads a judge once and then takes batches of rows; ray.data reads, feeds and writes, and
gives the batch of an actor that died to another. Rows have the project's own field names or those
of the Auto-Rubric reference (see data/arr_json.py); images are paths, data URLs, bytes, or Hugging
Face's {"bytes": ...}. Other formats become these by `arr-fast data convert`.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from arr_fast.data.arr_json import PROMPT, parse
from arr_fast.data.fields import Row
from arr_fast.data.record import EmbeddedImage, ImageRef, ItemError, Place, Record
from arr_fast.errors import ArrFastError, BadImageError, RubricError
from arr_fast.images import CanonicalImage, to_image
from arr_fast.rubric_book import RubricBook
from arr_fast.serve.ray_serve import gpus_or_default, require_ray

if TYPE_CHECKING:
    from ray.data import Dataset

    from arr_fast.rubric import Rubric

Kind = Literal["compare", "score", "rank"]
KINDS: tuple[Kind, ...] = ("compare", "score", "rank")


@dataclass(frozen=True, slots=True)
class Work:
    """What every actor of a pool does.

    Attributes:
        kind: "compare" two images of a row, "score" one, or "rank" two or more.
        judge: Arguments of `Judge.from_pretrained`, `model` among them.
        rubric: A file, the name of a packaged rubric, or None for the default of the task.
        folder: What relative paths of images begin at.
        options: Further arguments of the judge's method.
    """

    kind: Kind
    judge: Mapping[str, Any]
    rubric: str | None = None
    folder: str = "."
    options: Mapping[str, Any] | None = None


def judge_dataset(
    dataset: Dataset,
    work: Work,
    *,
    replicas: int = 1,
    batch_size: int = 16,
    gpus: float | None = None,
    cpus: float = 1.0,
) -> Dataset:
    """Adds verdicts to a dataset, lazily.

    Args:
        dataset: Rows with a prompt and images.
        work: What to do with them.
        replicas: Actors in the pool.
        batch_size: Rows per call of a judge.
        gpus: GPUs of an actor; see `RayScale.gpus`.
        cpus: Cores of an actor.

    Returns:
        A dataset with a row for each row of the input: `name`, `prompt`, `status` (ok | tie |
        low_label_mass | error), `error`, `winner` and `probability` (compare), `score` (compare and
        score), `ranking` and `win_rate` (rank), and `verdict`, the whole object as JSON. A row
        without an `id` or `pair_id` is named by its actor and its place in what that one took:
        Ray tells an actor nothing of its rows' places in their files.

    Raises:
        ArrFastError: An unknown kind.
        MissingDependencyError: The extra `ray` is not installed.
    """
    if work.kind not in KINDS:
        raise ArrFastError(f"kind must be one of {', '.join(KINDS)}, got {work.kind!r}")
    require_ray()
    from ray.data import ActorPoolStrategy

    judged: Dataset = dataset.map_batches(
        JudgeActor,
        fn_constructor_args=(work,),
        batch_size=batch_size,
        batch_format="pyarrow",
        compute=ActorPoolStrategy(size=replicas),
        num_gpus=gpus_or_default(gpus),
        num_cpus=cpus,
    )
    return judged


class JudgeActor:
    """One actor of the pool: a judge, and rows in, verdicts out.

    Args:
        work: What to do.
    """

    def __init__(self, work: Work) -> None:
        from arr_fast.judge import Judge

        self._work = work
        self._judge = Judge.from_pretrained(**work.judge)
        self._rubric_of = RubricBook(work.rubric, str(work.judge["model"]))
        # Names of rows must not meet those of another actor, which counts its own rows.
        self._source = f"row-{uuid.uuid4().hex[:8]}"
        self._seen = 0

    def __call__(self, table: Any) -> Any:
        """Judges a pyarrow table of rows; returns a table with one row of verdicts for each."""
        import pyarrow

        rows = table.to_pylist()
        answers = self.judge_rows(rows)
        return pyarrow.Table.from_pylist(answers, schema=_schema(self._work.kind))

    def judge_rows(self, rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Verdicts of rows, in order; a row that cannot be read gets status "error"."""
        answers: list[dict[str, Any]] = [{} for _ in rows]
        tasks: dict[str, list[_Item]] = {}
        for number, values in enumerate(rows):
            # A parquet column that most rows leave empty is null here, which means absent.
            given = {name: value for name, value in values.items() if value is not None}
            place = Place(self._source, self._seen + number + 1)
            row = Row(place, Path(self._work.folder), given)
            try:
                item = self._item(number, row)
            except (ItemError, RubricError, BadImageError) as error:
                answers[number] = {
                    "name": _writable(row.name("id", "pair_id")),
                    "prompt": _prompt(row),
                    "status": "error",
                    "error": str(error),
                }
            else:
                # A call has sources for all or for none.
                tasks.setdefault(item.record.task, []).append(item)
        self._seen += len(rows)
        for items in tasks.values():
            for item, answer in zip(items, self._judged(items), strict=True):
                record = item.record
                answers[item.number] = {"name": record.name, "prompt": record.prompt, **answer}
        return answers

    def _item(self, number: int, row: Row) -> _Item:
        record, place = parse(row), row.place
        count = len(record.images)
        wanted = {"compare": count == 2, "score": count == 1, "rank": count >= 2}
        if not wanted[self._work.kind]:
            raise ItemError(f"{place}: has {count} images, which {self._work.kind} cannot take")
        images = tuple(_image(ref, f"{place}: image {n}") for n, ref in enumerate(record.images))
        source = None if record.source is None else _image(record.source, f"{place}: source")
        return _Item(number, record, self._rubric_of(record), images, source)

    def _judged(self, items: Sequence[_Item]) -> list[dict[str, Any]]:
        prompts = [item.record.prompt for item in items]
        rubrics = [item.rubric for item in items]
        options: dict[str, Any] = dict(self._work.options or {})
        if items[0].source is not None:
            options["sources"] = [item.source for item in items]
        columns = [list(column) for column in zip(*(item.images for item in items), strict=False)]
        if self._work.kind == "compare":
            pairs = self._judge.compare(prompts, columns[0], columns[1], rubrics, **options)
            return [_row(pairs.pair_json(n)) for n in range(len(items))]
        if self._work.kind == "score":
            points = self._judge.score(prompts, columns[0], rubrics, **options)
            return [_row(points.image_json(n)) for n in range(len(items))]
        groups = self._judge.rank(prompts, [item.images for item in items], rubrics, **options)
        return [_group_row(groups.group_json(n)) for n in range(len(items))]


@dataclass(frozen=True, slots=True)
class _Item:
    """A row that can be judged; `number` is its place in the batch."""

    number: int
    record: Record
    rubric: Rubric
    images: tuple[CanonicalImage, ...]
    source: CanonicalImage | None


def _prompt(row: Row) -> str | None:
    """The prompt of a row that cannot be judged, if it has one."""
    found = next((row.values[name] for name in PROMPT if name in row.values), None)
    return _writable(found) if isinstance(found, str) else None


def _writable(text: str) -> str:
    """Text without the lone surrogates that may be what is wrong with a row."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _image(image: ImageRef, name: str) -> CanonicalImage:
    return to_image(image.data if isinstance(image, EmbeddedImage) else image, name=name)


def _row(verdict: dict[str, Any]) -> dict[str, Any]:
    columns = ("status", "error", "winner", "probability", "score")
    return {**{n: verdict.get(n) for n in columns}, "verdict": json.dumps(verdict)}


def _group_row(verdict: dict[str, Any]) -> dict[str, Any]:
    failed = [pair["error"] for pair in verdict["pairs"] if pair["status"] == "error"]
    return {
        "status": "error" if failed else "ok",
        "error": failed[0] if failed else None,
        "ranking": verdict["ranking"],
        "win_rate": verdict["win_rate"],
        "verdict": json.dumps(verdict),
    }


def _schema(kind: Kind) -> Any:
    """Equal for every batch, whatever its rows hold: files of one dataset must agree."""
    import pyarrow as pa

    columns = {"name": pa.string(), "prompt": pa.string(), "status": pa.string()}
    columns["error"] = pa.string()
    if kind == "compare":
        columns.update(winner=pa.string(), probability=pa.float64())
    if kind == "rank":
        columns.update(ranking=pa.list_(pa.int64()), win_rate=pa.list_(pa.float64()))
    else:
        columns["score"] = pa.float64()
    return pa.schema([*columns.items(), ("verdict", pa.string())])
