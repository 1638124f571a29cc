"""Draws the training curve of a judge."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

from arr_fast.errors import MissingDependencyError

# (title, unit of the vertical axis, (split, names of values))
PANELS = (
    ("judge stage, training", "loss, nats", ("train", ("verdict", "caption", "probe"))),
    ("judge stage, held out", "share", ("held_out", ("pair", "point", "tie"))),
)


def plot_curve(curve: Path, out: Path) -> None:
    """Plots losses and held-out shares of the judge stage over its steps.

    Args:
        curve: A CSV of `arr_fast.shapes.run_state.Curve`.
        out: The picture; its suffix says the format.

    Raises:
        MissingDependencyError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingDependencyError("matplotlib", "plot") from None
    series: dict[tuple[str, str], list[tuple[int, float]]] = defaultdict(list)
    with curve.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["stage"] == "judge":
                point = int(row["step"]), float(row["value"])
                series[row["split"], row["name"]].append(point)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, (title, unit, (split, names)) in zip(figure.subplots(1, 2), PANELS, strict=True):
        for name in names:
            points = sorted(series[split, name])
            axes.plot([p[0] for p in points], [p[1] for p in points], label=name)
        axes.set(title=title, xlabel="step", ylabel=unit)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(out, dpi=90)
