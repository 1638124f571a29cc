"""Draws the op suites' CSV: `python -m benches.plot_ops ops.csv ops.png`."""

from __future__ import annotations

import csv
import sys
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot(csv_path: Path, png_path: Path) -> None:
    """One bar per implementation, a panel per op and shape: seconds over ours."""
    with csv_path.open(newline="") as stream:
        rows = list(csv.DictReader(stream))
    if not rows:
        raise ValueError(f"{csv_path} holds no rows")
    panels: dict[str, dict[str, float]] = {}
    for row in rows:  # of equal measurements the last one counts
        title = f"{row['op']} {row['shape']} {row['dtype']}"
        panels.setdefault(title, {})[row["impl"]] = float(row["ratio"])
    figure = Figure(figsize=(8, 0.6 + 1.5 * len(panels)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, ratios) in zip(
        figure.subplots(len(panels), squeeze=False).flat, panels.items(), strict=True
    ):
        axes.barh(list(ratios), list(ratios.values()))
        axes.set_title(title, fontsize=8)
        axes.set_xlabel("seconds over ours", fontsize=7)
        axes.tick_params(labelsize=7)
    figure.suptitle(f"{rows[-1]['device']}, {rows[-1]['threads']} threads", fontsize=8)
    figure.savefig(png_path, dpi=150)


if __name__ == "__main__":
    plot(Path(sys.argv[1]), Path(sys.argv[2]))
