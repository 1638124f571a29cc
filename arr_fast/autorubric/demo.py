"""The demonstration: pairs labelled by a hidden preference, a rubric learned from 100 of them, and
what it is worth on 2,000 others. No network; killed and started again, it goes on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console

from arr_fast import __version__
from arr_fast.autorubric.call_log import Progress
from arr_fast.autorubric.comparison import (
    Comparison,
    Contestants,
    Gate,
    compare_rubrics,
    comparison_tables,
    markdown,
)
from arr_fast.autorubric.labelled import LabelledPair, Reading, read_labelled
from arr_fast.autorubric.pipeline import AutoRubric, Selection
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.autorubric.structure import Structured, candidates_of
from arr_fast.autorubric.templates import TemplateSet
from arr_fast.autorubric.text_backend import TextBackend
from arr_fast.data.record import Record
from arr_fast.data.registry import read_records
from arr_fast.data.writing import plain, replacing
from arr_fast.evals.intervals import Estimate, estimates, resample_weights
from arr_fast.evals.judging import DIRECT, LogOdds, judge_identity
from arr_fast.evals.measure import evaluate
from arr_fast.evals.metrics import credit, summarise
from arr_fast.evals.points import answer_measures, judge_points, question_rubric
from arr_fast.evals.report import render_evaluation
from arr_fast.evals.tables import Cell, Table, cell
from arr_fast.prompts import TEMPLATE_VERSION
from arr_fast.provenance import Provenance
from arr_fast.shapes.faithfulness import sample_faithfulness_pairs
from arr_fast.shapes.hidden_preference import (
    HiddenPair,
    HiddenPreference,
    oracle_credit,
    sample_pairs,
    scene_keys,
    write_pairs,
)

if TYPE_CHECKING:
    from arr_fast.judge import Judge

SCHEMA = 1
TRAIN, UNTOUCHED, FAITHFULNESS = 100, 2000, 400
# What a judge without a rubric must reach for the comparison to be fair.
FAIR = 0.9
# A text that fewer of the demonstration's pairs came to is a slip of a rewrite.
MIN_SUPPORT = 3
DATASET = "hidden preference"


@dataclass(frozen=True, slots=True, eq=False)
class DemoOutcome:
    """What the demonstration found.

    Attributes:
        report: The loop's own report.
        selection: The rubric.
        comparison: Its worth on untouched pairs.
        text: The tables as Markdown.
    """

    report: dict[str, Any]
    selection: Selection
    comparison: Comparison
    text: str


def run_demo(
    judge: Judge,
    backend: TextBackend,
    folder: Path,
    *,
    train: int = TRAIN,
    untouched: int = UNTOUCHED,
    seed: int = 0,
    resamples: int = 2000,
    settings: AutoRubricSettings | None = None,
    faithfulness: int = FAITHFULNESS,
    easy_vqa: bool = True,
    on_stage: Callable[[str], None] = lambda _: None,
    progress: Progress = lambda _done, _total: None,
) -> DemoOutcome:
    """Runs generate -> verify -> refine -> structure -> select, and evaluates.

    Writes under `folder`: data/ (the pairs), the loop's files, tables.md, demo.json, demo.html.

    Args:
        judge: Judges.
        backend: Writes.
        folder: Where everything goes; calls that it holds are not repeated.
        train: Pairs to learn from.
        untouched: Pairs to evaluate on; they share no prompt and no scene with the others.
        seed: Of the preference, the scenes, the labels and the loop.
        resamples: Bootstrap resamples.
        settings: Of the loop; None for the defaults with `seed` and MIN_SUPPORT.
        faithfulness: Pairs that differ in faithfulness to the caption alone, for the judge without
            a rubric; 0 for none.
        easy_vqa: Also measure single images, on easy-VQA's yes/no test questions.
        on_stage: Told what happens.
        progress: Told how far a stage is.
    """
    chosen = settings or AutoRubricSettings(seed=seed, min_support=MIN_SUPPORT)
    hidden = HiddenPreference.draw(seed)
    on_stage(f"draw {train} + {untouched} pairs")
    learning = sample_pairs(hidden, train, seed=seed)
    taken = frozenset().union(*(scene_keys(pair.example) for pair in learning))
    testing = sample_pairs(hidden, untouched, seed=seed + 1, taken=taken)
    reading, _ = _written(learning, folder / "data" / "train", progress)
    loop = AutoRubric(
        *(judge, backend, TemplateSet("shapes"), chosen, folder),
        on_stage=on_stage,
        progress=progress,
    )
    try:
        outcomes = loop.refine(loop.verify(loop.generate(reading.pairs)))
        structured = loop.structure(outcomes)
        selection = loop.select(outcomes, structured)
        report = loop.report(reading, outcomes, structured, selection)
        verified = [each.text for each in candidates_of(outcomes, range(len(outcomes)))]
        on_stage(f"render: {untouched} untouched pairs")
        test, records = _written(testing, folder / "data" / "untouched", progress)
        found = _contestants(
            loop, selection, structured, verified, test, testing, on_stage, progress
        )
        faithful: Estimate | None = None
        if faithfulness:
            on_stage(f"evaluate: {faithfulness} caption-faithfulness pairs")
            taken |= frozenset().union(*(scene_keys(pair.example) for pair in testing))
            plain_pairs = sample_faithfulness_pairs(faithfulness, seed=seed, taken=taken)
            faithful = _faithfulness(loop, plain_pairs, folder, resamples, seed, progress)
    finally:
        loop.close()
    comparison = compare_rubrics(
        found, resamples=resamples, seed=seed, limit=chosen.selected, folds=chosen.folds
    )
    tables = comparison_tables(comparison, DATASET)
    alone: list[tuple[Cell, ...]] = []
    if faithful is not None:
        row = f"{faithfulness} caption-faithfulness pairs, no rubric, orders averaged"
        alone.append(((row, ""), cell(faithful, "percent")))
        detail = f"{100 * faithful.value:.1f} %"
        name = f"fair: no rubric, right on {100 * FAIR:.0f} % of caption-faithfulness pairs"
        comparison.gates.append(Gate(name, detail, faithful.value >= FAIR))
    pointwise: dict[str, Estimate] = {}
    if easy_vqa:
        on_stage("evaluate: easy-VQA test questions")
        pointwise = _easy_vqa(judge, folder, resamples, seed)
        row = "easy-VQA test, yes/no questions, pointwise (training-family data)"
        alone.append(((row, ""), cell(pointwise["accuracy"], "percent")))
    if alone:
        about = "95 % intervals, bootstrap over prompts or pictures."
        tables.append(Table("The judge alone", about, ("", "accuracy"), tuple(alone)))
    text = markdown(tables)
    document = {
        "schema": f"arr_fast.rubric_demo/{SCHEMA}",
        "arr_fast_version": __version__,
        "judge": judge_identity(judge),
        "seed": seed,
        "hidden_weights": hidden.weights,
        "selected": [{"text": c.text, "weight": c.weight} for c in selection.rubric.criteria],
        "comparison": comparison.to_json(),
        "faithfulness": None if faithful is None else faithful.to_json(),
        "easy_vqa": {name: estimate.to_json() for name, estimate in pointwise.items()},
        "autorubric": report,
    }
    with replacing(folder / "demo.json") as handle:
        json.dump(plain(document), handle, indent=1, ensure_ascii=False, allow_nan=False)
        handle.write("\n")
    (folder / "tables.md").write_text(text, encoding="utf-8")
    page = _page(judge, found, selection, test.pairs, records, seed, resamples, tables)
    (folder / "demo.html").write_text(page, encoding="utf-8")
    return DemoOutcome(report, selection, comparison, text)


def _written(
    pairs: list[HiddenPair], folder: Path, progress: Progress
) -> tuple[Reading, list[Record]]:
    """Renders pairs, and reads them back as any user's data is read."""
    path = write_pairs(pairs, folder, done=lambda count: progress(count, len(pairs)))
    records = list(read_records(path))
    return read_labelled(records), records


def _faithfulness(
    loop: AutoRubric,
    pairs: list[HiddenPair],
    folder: Path,
    resamples: int,
    seed: int,
    progress: Progress,
) -> Estimate:
    """Accuracy of the plain question, orders averaged."""
    reading, _ = _written(pairs, folder / "data" / "faithfulness", progress)
    matrix = loop.verdicts.matrix(reading.pairs, [DIRECT["t2i"]], progress)
    right = credit(matrix.preference[:, 0] * matrix.label)
    draws = resample_weights(matrix.clusters, resamples, seed)
    return estimates(lambda weights: summarise({"right": right}, weights), draws)["right"]


def _easy_vqa(judge: Judge, folder: Path, resamples: int, seed: int) -> dict[str, Estimate]:
    """Accuracy on single images; what is finished stays in the folder."""
    points = list(read_records("easy-vqa:test"))
    outcome = judge_points(
        judge,
        points,
        rubric_of=question_rubric,
        label_mass=False,
        batch_size=64,
        out=folder / "easy_vqa.jsonl",
        console=Console(stderr=True),
    )
    if outcome.interrupted:
        raise KeyboardInterrupt
    odds = np.array([line["criteria"][0]["log_odds"] for line in outcome.results])
    return answer_measures(
        odds,
        np.array([point.label_score for point in points]),
        [str(point.images[0]) for point in points],
        resamples=resamples,
        seed=seed,
    )


def _contestants(
    loop: AutoRubric,
    selection: Selection,
    structured: Structured,
    verified: Sequence[str],
    test: Reading,
    testing: Sequence[HiddenPair],
    on_stage: Callable[[str], None],
    progress: Progress,
) -> Contestants:
    direct = DIRECT["t2i"]
    texts = list(dict.fromkeys([direct, *verified, *structured.texts]))
    on_stage(f"evaluate: {len(test.pairs)} pairs x {len(texts)} criteria")
    matrix = loop.verdicts.matrix(test.pairs, texts, progress)
    by_name = {f"pair {number}": pair for number, pair in enumerate(testing)}
    kept = [by_name[pair.name] for pair in test.pairs]
    return Contestants(
        matrix=matrix,
        train=selection.matrix,
        direct=direct,
        verified=tuple(verified),
        selected=tuple(criterion.text for criterion in selection.rubric.criteria),
        weights=tuple(criterion.weight for criterion in selection.rubric.criteria),
        oracle=oracle_credit(kept),
    )


def _page(
    judge: Judge,
    found: Contestants,
    selection: Selection,
    pairs: Sequence[LabelledPair],
    records: Sequence[Record],
    seed: int,
    resamples: int,
    tables: Sequence[Table],
) -> str:
    """The demo's tables, and the evaluation of the selected rubric beside the judge alone."""
    rubric, matrix = selection.rubric, found.matrix
    columns, direct = matrix.columns(found.selected), matrix.columns([found.direct])[0]
    count = len(matrix.label)
    loaded = judge.engine.loaded
    origin = Provenance(loaded.name, loaded.revision, (rubric.content_hash,), TEMPLATE_VERSION)
    odds = LogOdds(
        ids=(rubric.ids,) * count,
        ab=matrix.ab[:, columns],
        ba=matrix.ba[:, columns],
        weights=np.tile(np.asarray(found.weights), (count, 1)),
        essential=np.zeros((count, len(columns)), dtype=bool),
        holistic=None,
        direct=np.stack([matrix.ab[:, direct], matrix.ba[:, direct]], axis=1),
        provenance=(origin.to_json(),) * count,
    )
    result = evaluate(
        odds,
        matrix.label.tolist(),
        [pair.cluster for pair in pairs],
        resamples=resamples,
        seed=seed,
    )
    by_name = {record.name: record for record in records}
    return render_evaluation(
        result,
        [by_name[pair.name] for pair in pairs],
        odds,
        lambda _: rubric,
        title=f"{loaded.name}: a rubric from {len(found.train.label)} labelled pairs",
        facts=[
            ("Judge", f"{loaded.name} ({loaded.revision})"),
            ("Pairs", f"{count}, untouched, labelled by a preference hidden from the judge"),
            ("Selection", selection.weights.method),
            ("Version", f"arr_fast {__version__}, seed {seed}"),
        ],
        aggregation="log_odds_mean",
        seed=seed,
        before=tables,
    )
