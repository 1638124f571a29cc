"""An evaluation as one JSON object and as CSV rows."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from arr_fast import __version__
from arr_fast.data.writing import plain, replacing
from arr_fast.evals.calibration import Reliability
from arr_fast.evals.intervals import Estimate
from arr_fast.evals.measure import Evaluation, Measured

SCHEMA = 1
CSV_FIELDS = ("section", "name", "k", "measure", "value", "low", "high", "pairs")


def to_json(
    result: Evaluation, settings: dict[str, Any], summary: dict[str, Any]
) -> dict[str, Any]:
    """Returns the object of --json.

    Args:
        result: What was measured.
        settings: What was asked: data, format, model, revision, rubric, forms, seed, ...
        summary: What happened: pairs, errors, seconds.
    """
    document: dict[str, Any] = plain(
        {
            "schema": f"arr_fast.eval/{SCHEMA}",
            "arr_fast_version": __version__,
            "settings": settings,
            "summary": {
                **summary,
                "pairs": result.pairs,
                "label_ties": result.label_ties,
                "decided": len(result.label),
            },
            "forms": [_measured(form) for form in result.forms],
            "rules": [_measured(rule) for rule in result.rules],
            "criteria": [_measured(criterion) for criterion in result.criteria],
            "ablation": [
                {"k": count, "first": _estimates(first), "random": random}
                for count, first, random in result.ablation
            ],
            "differences": [
                {"form": form, "other": other, "value": value, "low": low, "high": high}
                for form, other, value, low, high in result.differences
            ],
        }
    )
    return document


def _measured(measured: Measured) -> dict[str, Any]:
    found: dict[str, Any] = {
        "name": measured.name,
        "pairs": measured.pairs,
        "measures": _estimates(measured.measures),
    }
    if measured.before is not None and measured.after is not None:
        found["temperature"] = measured.temperature
        found["ece"] = measured.before.ece
        found["ece_fitted"] = measured.after.ece
        found["reliability"] = _bins(measured.before)
        found["reliability_fitted"] = _bins(measured.after)
    if measured.tie_accuracy is not None:
        found["tie_accuracy"], found["tie_epsilon"] = measured.tie_accuracy
    if measured.groups is not None:
        found["group_accuracy"], found["groups"] = measured.groups
    return found


def _estimates(measures: dict[str, Estimate]) -> dict[str, Any]:
    return {name: estimate.to_json() for name, estimate in measures.items()}


def _bins(found: Reliability) -> dict[str, list[float]]:
    return {
        "count": found.count.tolist(),
        "confidence": found.confidence.tolist(),
        "accuracy": found.accuracy.tolist(),
    }


def write_csv(path: Path, result: Evaluation, settings: dict[str, Any]) -> None:
    """Writes one row per measure; what was asked stands in every row."""
    constant = {
        name: settings.get(name) for name in ("data", "model", "revision", "rubric_hash", "dtype")
    }
    constant["arr_fast_version"] = __version__
    with replacing(path) as handle:
        writer = csv.DictWriter(handle, [*CSV_FIELDS, *constant], lineterminator="\n")
        writer.writeheader()
        for row in csv_rows(result):
            writer.writerow(row | constant)


def csv_rows(result: Evaluation) -> Iterator[dict[str, Any]]:
    """Yields a row per measure, with the fields of `CSV_FIELDS`."""
    sections = {"form": result.forms, "rule": result.rules, "criterion": result.criteria}
    for section, found in sections.items():
        for measured in found:
            common = {"section": section, "name": measured.name, "pairs": measured.pairs}
            for name, estimate in measured.measures.items():
                yield common | {"measure": name} | _cells(estimate)
            for name, value in _single(measured).items():
                yield common | {"measure": name, "value": value}
    for count, first, random in result.ablation:
        common = {"section": "ablation", "k": count, "pairs": len(result.label)}
        for name in random:
            yield common | {"name": "first", "measure": name} | _cells(first[name])
            yield common | {"name": "random", "measure": name, "value": random[name]}
    for form, other, value, low, high in result.differences:
        yield {
            "section": "difference",
            "name": f"{form} - {other}",
            "measure": "debiased",
            "value": value,
            "low": low,
            "high": high,
            "pairs": len(result.label),
        }


def _single(measured: Measured) -> dict[str, float]:
    found = _measured(measured)
    names = ("temperature", "ece", "ece_fitted", "tie_accuracy", "tie_epsilon", "group_accuracy")
    return {name: found[name] for name in names if found.get(name) is not None}


def _cells(estimate: Estimate) -> dict[str, Any]:
    return {name: "" if v is None else v for name, v in estimate.to_json().items()}
