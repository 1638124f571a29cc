"""Draws the op suites' CSV: `python -m benches.plot_ops ops.csv ops.png`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Column of the CSV: unit, its label.
COLUMNS = {"ratio": (1.0, "seconds over ours"), "peak_bytes": (1e6, "peak MB above inputs")}


def plot(csv_path: Path, png_path: Path) -> None:
    """One bar per implementation, a row of panels per op and shape: time and peak memory."""
    with csv_path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise ValueError(f"{csv_path} holds no rows")
    panels: dict[str, dict[str, dict[str, str]]] = {}
    for row in rows:  # of equal measurements the last one counts
        title = f"{row['op']} {row['shape']} {row['dtype']}"
        panels.setdefault(title, {})[row["impl"]] = row
    figure = Figure(figsize=(11, 0.6 + 1.5 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(panels), len(COLUMNS), squeeze=False)
    for line, (title, found) in zip(grid, panels.items(), strict=True):
        for axes, (column, (unit, label)) in zip(line, COLUMNS.items(), strict=True):
            axes.barh(list(found), [float(row[column] or "nan") / unit for row in found.values()])
            axes.set_title(title, fontsize=8)
            axes.set_xlabel(label, fontsize=7)
            axes.tick_params(labelsize=7)
    figure.suptitle(f"{rows[-1]['device']}, {rows[-1]['threads']} threads", fontsize=8)
    figure.savefig(png_path, dpi=150)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
