"""The measures as rows of text: what the terminal and the page show alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from arr_fast.evals.intervals import Estimate
from arr_fast.evals.measure import Evaluation, Measured

# (measure, what it is called, how it is written)
MEASURES = (
    ("forward", "accuracy, forward", "percent"),
    ("reverse", "accuracy, reverse", "percent"),
    ("mean", "accuracy, mean of both", "percent"),
    ("both", "right in both orders", "percent"),
    ("debiased", "accuracy, orders averaged", "percent"),
    ("gap", "gap forward - reverse", "points"),
    ("preferred_gap", "gap preferred first - second", "points"),
    ("consistent", "orders agree", "percent"),
    ("consistent_right", "accuracy where they agree", "percent"),
    ("tie", "undecided", "percent"),
    ("position_bias", "position bias, log-odds", "number"),
    ("bias_ratio", "|bias| / |preference|", "number"),
    ("brier", "Brier score", "number"),
    ("brier_fitted", "Brier score, fitted T", "number"),
)
RULE_MEASURES = {
    "mean": "mean",
    "debiased": "averaged",
    "forward": "forward",
    "reverse": "reverse",
    "both": "both right",
    "consistent": "agree",
}
# A cell: the value, and its interval in small print ("" for none).
Cell = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Table:
    """A table of text."""

    title: str
    about: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]


def tables(result: Evaluation) -> list[Table]:
    """Returns the tables of an evaluation that have anything in them."""
    found = [forms_table(result), rules_table(result), ablation_table(result)]
    return [table for table in (*found, differences_table(result)) if table.rows]


def forms_table(result: Evaluation) -> Table:
    """A row per measure, a column per form."""
    rows = []
    for name, title, kind in MEASURES:
        cells = [cell(form.measures.get(name), kind) for form in result.forms]
        if any(value for value, _ in cells):
            rows.append(((title, ""), *cells))
    for title, values in _single(result.forms):
        if any(values):
            rows.append(((title, ""), *((value, "") for value in values)))
    return Table(
        "Accuracy, position bias, calibration",
        f"{len(result.label)} pairs that people decided"
        + (f" and {result.label_ties} that they call a tie" if result.label_ties else "")
        + "; 95 % bootstrap intervals over prompts.",
        ("", *(form.name for form in result.forms)),
        tuple(rows) if result.forms else (),
    )


def _single(forms: list[Measured]) -> list[tuple[str, list[str]]]:
    def values(show: object) -> list[str]:
        return [show(form) if form.before is not None else "" for form in forms]  # type: ignore[operator]

    return [
        ("ECE", values(lambda f: f"{f.before.ece:.3f}")),
        ("ECE, fitted T", values(lambda f: f"{f.after.ece:.3f}")),
        ("temperature T", values(lambda f: f"{f.temperature:.3g}")),
        (
            "accuracy with ties (acc*)",
            values(lambda f: f"{100 * f.tie_accuracy[0]:.1f} %" if f.tie_accuracy else ""),
        ),
        (
            "items with every pair right",
            values(lambda f: f"{100 * f.groups[0]:.1f} % of {f.groups[1]}" if f.groups else ""),
        ),
    ]


def rules_table(result: Evaluation) -> Table:
    """A row per aggregation rule."""
    rows = tuple(
        ((rule.name, ""), *(cell(rule.measures[name], "percent") for name in RULE_MEASURES))
        for rule in result.rules
    )
    return Table(
        "Accuracy by aggregation rule",
        "From the same verdicts per criterion: the mean of both orders, the orders averaged before "
        "the rule, each order alone, both right, both agree.",
        ("rule", *RULE_MEASURES.values()),
        rows,
    )


def ablation_table(result: Evaluation) -> Table:
    """A row per number of criteria."""
    rows = tuple(
        (
            (str(count), ""),
            *(cell(first[name], "percent") for name in ("forward", "reverse", "mean", "debiased")),
            (f"{100 * random['mean']:.1f} %", ""),
            (f"{100 * random['debiased']:.1f} %", ""),
        )
        for count, first, random in result.ablation
    )
    return Table(
        "Accuracy against the number of criteria",
        "The first K of the rubric, and the average over random K.",
        ("K", "forward", "reverse", "mean", "orders averaged", "random: mean", "random: averaged"),
        rows,
    )


def differences_table(result: Evaluation) -> Table:
    """A row per two forms, on the same pairs."""
    rows = tuple(
        ((f"{form} - {other}", ""), cell(Estimate(value, low, high), "points"))
        for form, other, value, low, high in result.differences
    )
    return Table(
        "Differences in accuracy",
        "Orders averaged, same pairs; McNemar's 95 % interval.",
        ("", "points"),
        rows,
    )


def cell(estimate: Estimate | None, kind: str) -> Cell:
    """Returns (value, interval) as text; ("", "") for nothing."""
    if estimate is None or not np.isfinite(estimate.value):
        return "", ""
    value = written(estimate.value, kind)
    if not np.isfinite(estimate.low):
        return value, ""
    ends = (written(end, kind).removesuffix(" %") for end in (estimate.low, estimate.high))
    return value, " to ".join(ends)


def written(value: float, kind: str) -> str:
    """Returns a number as percent, signed points, or itself."""
    if kind == "percent":
        return f"{100 * value:.1f} %"
    return f"{100 * value:+.1f}" if kind == "points" else f"{value:.3f}"
