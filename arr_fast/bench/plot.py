"""Draws cost against the number of criteria from a benchmark CSV."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from arr_fast.bench.rows import Row, read_csv
from arr_fast.errors import MissingDependencyError


def curves(rows: Sequence[Row]) -> dict[str, list[tuple[int, float]]]:
    """Seconds against K for every engine and workload shape with at least two K.

    Args:
        rows: Benchmark rows; of equal points the last one counts.

    Returns:
        Label -> (K, seconds), by K.
    """
    points: dict[str, dict[int, float]] = defaultdict(dict)
    for row in rows:
        shape = f"prefix {row.prefix_tokens}, {row.images} images"
        if row.group > 2 or row.orders != "AB" or row.n_pairs != 1:
            continue
        points[f"{row.engine} ({shape})"][row.criteria] = row.seconds
    return {label: sorted(each.items()) for label, each in points.items() if len(each) > 1}


def plot_cost(csv_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> Path:
    """Writes a PNG with seconds per call against K, one curve per engine and shape.

    Args:
        csv_path: A file of `rows.write_csv`.
        png_path: Where to draw.

    Raises:
        MissingDependencyError: matplotlib is missing.
        ValueError: No engine was measured at two numbers of criteria.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingDependencyError("matplotlib", "dev") from error
    rows = read_csv(csv_path)
    found = curves(rows)
    if not found:
        raise ValueError(f"{csv_path}: no engine was measured at two numbers of criteria")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for label, each in sorted(found.items()):
        axes.plot([k for k, _ in each], [s for _, s in each], marker="o", label=label)
    axes.set_xlabel("criteria per pair (K)")
    axes.set_ylabel("seconds per pair")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    last = rows[-1]
    axes.set_title(f"{last.model}, {last.dtype}, {last.threads} threads\n{last.device}", fontsize=9)
    target = Path(png_path)
    figure.savefig(target, dpi=150)
    return target
