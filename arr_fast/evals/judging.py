"""Asks a judge about labelled pairs, in both orders and in up to three forms, and keeps log-odds.

    direct     one plain question, no rubric
    holistic   the whole rubric in one question
    criteria   every criterion by itself; the same forward as holistic

One line per finished pair goes to a file and is not judged again (see `arr_fast.cli.session`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from arr_fast.data.record import ItemError, Record
from arr_fast.rubric import Criterion, Rubric
from arr_fast.verdict_arrays import jsonable

if TYPE_CHECKING:
    from rich.console import Console

    from arr_fast.cli.session import Outcome, Prepared
    from arr_fast.judge import Judge
    from arr_fast.verdicts import PairVerdicts

Form = Literal["direct", "holistic", "criteria"]
FORMS: tuple[Form, ...] = ("direct", "holistic", "criteria")

DIRECT: dict[Literal["t2i", "edit"], str] = {
    "t2i": "The image is overall the better one for the caption.",
    "edit": "The image is overall the better edit for the instruction.",
}


@dataclass(frozen=True, slots=True)
class Selection:
    """The labelled pairs of a file.

    Attributes:
        pairs: Pairs, groups taken apart; ties among them.
        clusters: Per pair, what a bootstrap draws as a whole: its group, else prompt and source.
        unlabelled: Records left out because nobody labelled them.
    """

    pairs: tuple[Record, ...]
    clusters: tuple[Any, ...]
    unlabelled: int


def select_pairs(records: Sequence[Record]) -> Selection:
    """Takes groups apart and leaves out what has no label.

    Raises:
        ItemError: if no labelled pair is left.
    """
    pairs: list[Record] = []
    unlabelled = 0
    for record in records:
        if record.label_rank is None or len(record.images) < 2:
            unlabelled += 1
            continue
        pairs += record.pairs()
    if not pairs:
        raise ItemError(f"no labelled pair among {len(records)} records")
    clusters = [pair.group or (pair.prompt, str(pair.source)) for pair in pairs]
    return Selection(tuple(pairs), tuple(clusters), unlabelled)


def judge_pairs(
    judge: Judge,
    pairs: Sequence[Record],
    *,
    forms: Sequence[Form],
    rubric_of: Callable[[Record], Rubric],
    direct: str | None,
    label_mass: bool,
    batch_size: int,
    out: Path | None,
    console: Console,
) -> Outcome:
    """Judges pairs, or takes their lines from an earlier run.

    Args:
        judge: The judge.
        pairs: What to judge.
        forms: Which questions to ask.
        rubric_of: The rubric of a pair.
        direct: The plain question; None for the default of the task.
        label_mass: Also read P(any label).
        batch_size: Pairs per call.
        out: Lines of finished pairs, or None.
        console: Where progress goes.

    Returns:
        One object per pair, in order (fewer if interrupted).
    """
    from arr_fast.cli.session import run

    asked = {
        task: Rubric(
            name="direct",
            task=task,
            criteria=(Criterion(id="direct", text=direct or DIRECT[task]),),
        )
        for task in ("t2i", "edit")
    }

    def judge_batch(batch: list[Prepared]) -> list[dict[str, Any]]:
        return _judge_batch(judge, batch, forms, asked, label_mass)

    settings = {
        **judge_identity(judge),
        "forms": sorted(forms),
        "direct": [asked[task].content_hash for task in sorted(asked)],
        "label_mass": label_mass,
    }
    return run(
        pairs,
        judge_batch,
        command="eval",
        rubric_of=rubric_of,
        settings=settings,
        batch_size=batch_size,
        out=out,
        console=console,
    )


def judge_identity(judge: Judge) -> dict[str, Any]:
    """Returns what names a judge for good: model, revision, number format, prompt texts."""
    from arr_fast.prompts import TEMPLATE_VERSION

    loaded = judge.engine.loaded
    return {
        "model": loaded.name,
        "revision": loaded.revision,
        "dtype": str(loaded.dtype),
        "quantization": loaded.quantization,
        "template_version": TEMPLATE_VERSION,
    }


def _judge_batch(
    judge: Judge,
    batch: list[Prepared],
    forms: Sequence[Form],
    asked: dict[Any, Rubric],
    label_mass: bool,
) -> list[dict[str, Any]]:
    def compare(rubrics: Any, mode: Any) -> PairVerdicts:
        return judge.compare(
            [p.item.prompt for p in batch],
            [p.images[0] for p in batch],
            [p.images[1] for p in batch],
            rubrics,
            sources=None if batch[0].source is None else [p.source for p in batch],
            orders="both",
            mode=mode,
            label_mass=label_mass,
        )

    rubrics = [p.rubric for p in batch]
    with_rubric = direct = None
    if "holistic" in forms or "criteria" in forms:
        mode = (
            "both"
            if {"holistic", "criteria"} <= set(forms)
            else next(form for form in forms if form != "direct")
        )
        with_rubric = compare(rubrics, mode)
    if "direct" in forms:
        direct = compare(
            [asked["t2i" if batch[0].source is None else "edit"]] * len(batch), "criteria"
        )
    return [_line(with_rubric, direct, index, rubrics[index]) for index in range(len(batch))]


def _line(
    with_rubric: PairVerdicts | None, direct: PairVerdicts | None, index: int, rubric: Rubric
) -> dict[str, Any]:
    asked = [verdicts for verdicts in (with_rubric, direct) if verdicts is not None]
    errors = [v.errors[index] for v in asked if v.errors[index] is not None]
    if errors:
        return {"status": "error", "error": errors[0]}
    weak = any(v.status[index] == "low_label_mass" for v in asked)
    line: dict[str, Any] = {
        "status": "low_label_mass" if weak else "ok",
        "provenance": asked[0].provenance.to_json(),
    }
    if with_rubric is not None:
        count = len(rubric)
        line["criteria"] = list(rubric.ids)
        line["weights"] = [criterion.weight for criterion in rubric.criteria]
        line["essential"] = [criterion.essential for criterion in rubric.criteria]
        for name in ("log_odds_ab", "log_odds_ba", "label_mass"):
            values = getattr(with_rubric, name)
            if values is not None and values.shape[1]:
                line[name] = [jsonable(value) for value in values[index, :count]]
        if with_rubric.holistic_preference is not None and with_rubric.holistic_bias is not None:
            preference = with_rubric.holistic_preference[index]
            bias = with_rubric.holistic_bias[index]
            line["holistic"] = [jsonable(bias + preference), jsonable(bias - preference)]
    if direct is not None and direct.log_odds_ab is not None and direct.log_odds_ba is not None:
        line["direct"] = [
            jsonable(direct.log_odds_ab[index, 0]),
            jsonable(direct.log_odds_ba[index, 0]),
        ]
    return line


@dataclass(frozen=True, slots=True, eq=False)
class LogOdds:
    """What a judge said about N pairs of up to K criteria.

    Attributes:
        ids: Per pair, the criterion ids.
        ab, ba: float64 [N, K], the first-shown image's log-odds by order; NaN where absent.
        weights: float64 [N, K].
        essential: bool [N, K].
        holistic: float64 [N, 2] (AB, BA) or None.
        direct: float64 [N, 2] or None.
        provenance: Of each pair's verdicts, for the distinct sources of the numbers.
    """

    ids: tuple[tuple[str, ...], ...]
    ab: np.ndarray
    ba: np.ndarray
    weights: np.ndarray
    essential: np.ndarray
    holistic: np.ndarray | None
    direct: np.ndarray | None
    provenance: tuple[dict[str, Any], ...]

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> LogOdds:
        """Returns some of the pairs, by index or mask."""
        chosen = np.arange(len(self))[rows]
        return replace(
            self,
            ids=tuple(self.ids[i] for i in chosen),
            ab=self.ab[chosen],
            ba=self.ba[chosen],
            weights=self.weights[chosen],
            essential=self.essential[chosen],
            holistic=None if self.holistic is None else self.holistic[chosen],
            direct=None if self.direct is None else self.direct[chosen],
            provenance=tuple(self.provenance[i] for i in chosen),
        )


def read_lines(lines: Sequence[dict[str, Any]]) -> LogOdds:
    """Turns the lines of judged pairs (none with an error) into arrays."""
    with_criteria = all("log_odds_ab" in line for line in lines)
    ids = tuple(tuple(line["criteria"]) if with_criteria else () for line in lines)
    width = max((len(names) for names in ids), default=0)

    def padded(name: str, blank: float) -> np.ndarray:
        array = np.full((len(lines), width), blank)
        for row, line in zip(array, lines, strict=True):
            if with_criteria:
                values = [np.nan if value is None else value for value in line[name]]
                row[: len(values)] = values
        return array

    def column(name: str) -> np.ndarray | None:
        if not all(name in line for line in lines):
            return None
        return np.array([line[name] for line in lines], dtype=np.float64).reshape(-1, 2)

    return LogOdds(
        ids=ids,
        ab=padded("log_odds_ab", np.nan),
        ba=padded("log_odds_ba", np.nan),
        weights=padded("weights", 0.0),
        essential=padded("essential", 0.0) > 0.0,
        holistic=column("holistic"),
        direct=column("direct"),
        provenance=tuple(line["provenance"] for line in lines),
    )
