"""The whole loop over one folder: every stage can be run again and repeats no finished call."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from arr_fast import __version__
from arr_fast.autorubric.call_log import CallLog, Progress
from arr_fast.autorubric.cross_validation import CrossValidation, cross_validate
from arr_fast.autorubric.generate import PairCriteria, generate
from arr_fast.autorubric.labelled import LabelledPair, Reading, cluster_numbers
from arr_fast.autorubric.redundancy import redundant_pairs
from arr_fast.autorubric.refine import PairOutcome, outcomes_of, refine
from arr_fast.autorubric.select import (
    PathStep,
    Weights,
    biased_criteria,
    greedy_report,
    solve,
)
from arr_fast.autorubric.settings import AutoRubricSettings
from arr_fast.autorubric.structure import (
    Structured,
    StructuredCriterion,
    candidates_of,
    structure,
    to_rubric,
)
from arr_fast.autorubric.templates import Exemplar, TemplateSet
from arr_fast.autorubric.text_backend import TextBackend
from arr_fast.autorubric.verdict_log import ScoreMatrix, VerdictLog
from arr_fast.autorubric.verify import verify
from arr_fast.autorubric.wording import rubric_warnings
from arr_fast.autorubric.writer import Writer
from arr_fast.data.writing import plain, replacing
from arr_fast.errors import ArrFastError
from arr_fast.prompts import Task
from arr_fast.rubric import Rubric

if TYPE_CHECKING:
    from arr_fast.judge import Judge

SCHEMA = 1
CALLS, VERDICTS, PAIRS = "calls.jsonl", "verdicts.jsonl", "pairs.jsonl"
STRUCTURED, RUBRIC, REPORT = "structured.yaml", "rubric.yaml", "report.json"
PROMPT_RUBRICS = "prompt_rubrics.jsonl"
OnStage = Callable[[str], None]


@dataclass(frozen=True, slots=True, eq=False)
class Selection:
    """The final rubric and how it came about.

    Attributes:
        rubric: With weights, and a temperature fitted on the pairs.
        weights: Of every structured criterion.
        matrix: Pairs x structured criteria.
        cross_validation: Of the procedure.
        path: Accuracy along greedy selection.
    """

    rubric: Rubric
    weights: Weights
    matrix: ScoreMatrix
    cross_validation: CrossValidation
    path: tuple[PathStep, ...]


class AutoRubric:
    """Composes the stages; each returns typed data and takes what the one before returned.

    Args:
        judge: Verifies and scores.
        backend: Writes; may be None where nothing is written (structured text is only selected).
        templates: What the writer is asked.
        settings: See `AutoRubricSettings`.
        folder: Where calls, verdicts and results are kept; None keeps them in memory.
        exemplars: A guide for the writer.
        budget: Most calls of the writer in this process.
        batch_size: Pairs per call of the judge.
        on_stage: Told what happens.
        progress: Told how far a stage's calls are.
    """

    def __init__(
        self,
        judge: Judge,
        backend: TextBackend,
        templates: TemplateSet,
        settings: AutoRubricSettings,
        folder: Path | None = None,
        *,
        exemplars: Sequence[Exemplar] = (),
        budget: int | None = None,
        batch_size: int = 16,
        on_stage: OnStage | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings = settings
        self.templates = templates
        self.folder = folder
        self.exemplars = exemplars
        self._calls = CallLog(None if folder is None else folder / CALLS)
        self._verdicts = CallLog(None if folder is None else folder / VERDICTS)
        self.writer = Writer(backend, self._calls, budget)
        self.verdicts = VerdictLog(judge, self._verdicts, batch_size)
        self._on_stage = on_stage or (lambda _: None)
        self._progress = progress
        self._seconds: dict[str, float] = {}
        self._nested = 0.0

    def close(self) -> None:
        """Closes the logs."""
        self._calls.close()
        self._verdicts.close()

    def generate(self, pairs: Sequence[LabelledPair]) -> list[PairCriteria]:
        """Writes criteria for every pair (eq. 6)."""
        with _Timed(self, f"generate: {len(pairs)} pairs"):
            states = generate(
                *(self.writer, self.templates, pairs, self.settings, self.exemplars),
                self._progress,
            )
        self._write_lines(PAIRS, [state.to_json() for state in states])
        return states

    def verify(self, states: Sequence[PairCriteria]) -> list[PairOutcome]:
        """Judges every pair by its own criteria (eq. 7)."""
        with _Timed(self, "verify"):
            checks = verify(
                self.verdicts,
                states,
                require_consistent=self.settings.require_consistent,
                progress=self._progress,
            )
        outcomes = outcomes_of(states, checks, self.settings.refinements)
        self._write_lines(PAIRS, [outcome.to_json() for outcome in outcomes])
        return outcomes

    def refine(self, outcomes: Sequence[PairOutcome]) -> list[PairOutcome]:
        """Rewrites what failed, at most T_max times (eq. 8)."""
        with _Timed(self, "refine"):
            done = refine(
                self.writer,
                self.templates,
                self.verdicts,
                outcomes,
                self.settings,
                self.exemplars,
                lambda number, count: self._on_stage(f"refine {number}: {count} pairs"),
                self._progress,
            )
        self._write_lines(PAIRS, [outcome.to_json() for outcome in done])
        return done

    def structure(
        self, outcomes: Sequence[PairOutcome], rows: Sequence[int] | None = None
    ) -> Structured:
        """Merges and orders the verified criteria of pairs (eq. 9, 10).

        Args:
            outcomes: Of all pairs.
            rows: Which pairs may contribute; all by default.
        """
        everything = rows is None
        chosen = range(len(outcomes)) if rows is None else rows
        with _Timed(self, f"structure: {len(chosen)} pairs"):
            found = structure(
                candidates_of(outcomes, chosen),
                outcomes,
                self._task([outcome.criteria.pair for outcome in outcomes]),
                self.settings,
                self.writer,
                self.templates,
            )
        if everything and self.folder is not None:
            task = self._task([outcome.criteria.pair for outcome in outcomes])
            rubric = to_rubric(found.criteria, name="structured", task=task)
            rubric.save(self.folder / STRUCTURED)
            rubric.save((self.folder / STRUCTURED).with_suffix(".txt"))
        return found

    def select(self, outcomes: Sequence[PairOutcome], structured: Structured) -> Selection:
        """Chooses and weighs criteria (eq. 5) on the matrix of all pairs; see `select`.

        Args:
            outcomes: Of all pairs; also of discarded ones, whose labels count in selection. Pairs
                that the judge cannot judge are left out; the report names them.
            structured: The structured criteria.

        Raises:
            ArrFastError: No criterion agrees with the labels more often than not.
            ValueError: Too few pairs for cross-validation.
        """
        settings = self.settings
        with _Timed(self, f"select: {len(outcomes)} pairs x {len(structured.criteria)} criteria"):
            outcomes = self._judgeable(outcomes, structured.texts)
            pairs = [outcome.criteria.pair for outcome in outcomes]
            options = {"limit": settings.selected, "folds": settings.folds, "seed": settings.seed}
            matrix = self.verdicts.matrix(pairs, structured.texts)
            tested = cross_validate(
                matrix.label,
                cluster_numbers(pairs),
                lambda rows: self.structure(outcomes, rows).texts,
                lambda texts: self.verdicts.matrix(pairs, texts, self._progress),
                **options,
            )
            weights = solve(matrix, tested.best, **options)
            path = tuple(greedy_report(matrix, **options))
        if not len(weights.chosen):
            raise ArrFastError("no criterion points to what people prefer; nothing to select")
        rubric = self._final_rubric(structured, matrix, weights, self._task(pairs))
        if self.folder is not None:
            rubric.save(self.folder / RUBRIC)
            rubric.save((self.folder / RUBRIC).with_suffix(".txt"))
        return Selection(rubric, weights, matrix, tested, path)

    def prompt_rubrics(self, outcomes: Sequence[PairOutcome]) -> dict[str, Rubric]:
        """Per prompt the rubric of its verified prompt-specific criteria, by pair name."""
        found = {}
        for outcome in outcomes:
            if outcome.status == "verified":
                pair, texts = outcome.criteria.pair, outcome.criteria.texts
                found[pair.name] = prompt_rubric(pair.prompt, texts, pair.task)
        rows = [
            {"pair": name, "rubric": rubric.model_dump(mode="json", exclude_defaults=True)}
            for name, rubric in found.items()
        ]
        self._write_lines(PROMPT_RUBRICS, rows)
        return found

    def report(
        self,
        reading: Reading,
        outcomes: Sequence[PairOutcome],
        structured: Structured | None = None,
        selection: Selection | None = None,
    ) -> dict[str, Any]:
        """Everything worth knowing about a run, as one JSON object; also written to the folder."""
        document: dict[str, Any] = {
            "schema": f"arr_fast.autorubric/{SCHEMA}",
            "arr_fast_version": __version__,
            "settings": self.settings.model_dump(mode="json"),
            "writer": self.writer.backend.identity,
            "pairs": {"used": len(outcomes), "ties": reading.ties, **reading.problems()},
            "verification": verification_report(outcomes),
            "unjudged": dict(self.verdicts.failures),
            "cost": {
                "writer": self.writer.cost.to_json(),
                "judge": self.verdicts.cost.to_json(),
                "seconds": {name: round(value, 3) for name, value in self._seconds.items()},
            },
        }
        if structured is not None:
            document["structure"] = {
                "method": structured.method,
                "criteria": len(structured.criteria),
                "notes": list(structured.notes),
            }
        if selection is not None:
            document["selection"] = selection_report(selection)
        document = plain(document)
        if self.folder is not None:
            with replacing(self.folder / REPORT) as handle:
                json.dump(document, handle, indent=1, ensure_ascii=False, allow_nan=False)
                handle.write("\n")
        return document

    def _judgeable(
        self, outcomes: Sequence[PairOutcome], texts: Sequence[str]
    ) -> list[PairOutcome]:
        odds = self.verdicts.log_odds(
            [outcome.criteria.pair for outcome in outcomes],
            [texts] * len(outcomes),
            self._progress,
        )
        return [o for o, row in zip(outcomes, odds, strict=True) if np.isfinite(row).all()]

    def _final_rubric(
        self, structured: Structured, matrix: ScoreMatrix, weights: Weights, task: Task
    ) -> Rubric:
        """The chosen criteria with their weights; a temperature for the default rule."""
        chosen = [int(k) for k in weights.chosen]
        kept: list[StructuredCriterion] = [structured.criteria[k] for k in chosen]
        values = weights.weights[chosen]
        # Only ratios of weights move a verdict of log_odds_mean: the mean weight is 1.
        unit = float(np.abs(values).mean())
        rubric = to_rubric(kept, name="auto-rubric", task=task, weights=(values / unit).tolist())
        # Z = sum w x / sum |w|, and the fitted log-odds are sum w x: T = 1 / sum |w|.
        temperature = 1.0 / float(np.abs(values).sum())
        revision = self.verdicts.judge.engine.loaded.revision
        return rubric.with_calibration(
            revision, "log_odds_mean", temperature=temperature, margin=0.0
        )

    @staticmethod
    def _task(pairs: Sequence[LabelledPair]) -> Task:
        tasks = {pair.task for pair in pairs}
        if len(tasks) > 1:
            raise ArrFastError("the data mixes edits and text-to-image pairs; run them apart")
        return next(iter(tasks), "t2i")

    def _write_lines(self, name: str, rows: Sequence[dict[str, Any]]) -> None:
        if self.folder is not None:
            with replacing(self.folder / name) as handle:
                for row in rows:
                    handle.write(json.dumps(plain(row), ensure_ascii=False) + "\n")


def prompt_rubric(prompt: str, texts: Sequence[str], task: Task) -> Rubric:
    """A rubric of equal weights for one prompt."""
    criteria = [StructuredCriterion(text, "", "mid", (text,), 1) for text in texts]
    rubric = to_rubric(criteria, name=prompt[:80] or "prompt", task=task)
    plain_criteria = [
        criterion.model_copy(update={"theme": None, "provenance": None})
        for criterion in rubric.criteria
    ]
    return rubric.model_copy(update={"criteria": tuple(plain_criteria)})


def verification_report(outcomes: Sequence[PairOutcome]) -> dict[str, Any]:
    """Pass rate unrefined, refinements used, discards, unusable answers with their raw text."""
    status = Counter(outcome.status for outcome in outcomes)
    first = sum(o.status == "verified" and o.criteria.round == 0 for o in outcomes)
    rounds = Counter(o.criteria.round for o in outcomes if o.status == "verified")
    return {
        "status": dict(status),
        "passed_unrefined": first,
        "pass_rate_unrefined": first / len(outcomes) if outcomes else None,
        "refinements": sum(o.criteria.round for o in outcomes),
        "verified_by_round": {str(number): rounds[number] for number in sorted(rounds)},
        "discard_rate": status["discarded"] / len(outcomes) if outcomes else None,
        "unusable_answers": [
            {"pair": o.criteria.pair.name, "round": number, "problem": problem, "raw": raw}
            for o in outcomes
            for number, problem, raw in o.unusable
        ],
    }


def selection_report(selection: Selection) -> dict[str, Any]:
    """What selection saw: cross-validation, the path, redundancy, position bias, warnings."""
    return {
        "method": selection.weights.method,
        "criteria": list(selection.rubric.ids),
        "cross_validation": selection.cross_validation.to_json(),
        "path": [step.to_json() for step in selection.path],
        "redundant": [
            list(each)
            for each in redundant_pairs(selection.matrix.texts, selection.matrix.preference)
        ],
        "position_biased": [
            {"text": text, "bias_over_preference": ratio, "orders_agree": agree}
            for text, ratio, agree in biased_criteria(selection.matrix)
        ],
        "warnings": rubric_warnings(selection.rubric),
    }


class _Timed:
    """Adds a stage's wall time to the pipeline's, under the first word of its name.

    A stage inside another counts once, as itself.
    """

    def __init__(self, owner: AutoRubric, name: str) -> None:
        self._owner, self._name = owner, name

    def __enter__(self) -> None:
        self._owner._on_stage(self._name)
        self._before, self._owner._nested = self._owner._nested, 0.0
        self._start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        seconds = self._owner._seconds
        name = self._name.partition(":")[0]
        whole = time.perf_counter() - self._start
        seconds[name] = seconds.get(name, 0.0) + whole - self._owner._nested
        self._owner._nested = self._before + whole
