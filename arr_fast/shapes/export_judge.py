"""Writes a run's weights as a checkpoint: `python -m arr_fast.shapes.export_judge --run DIR`.

Several runs, each gone on from the one before, give the mean of their ends. Weights are stored in
float16 (half the size) and computed with in float32; what is measured and shipped are the rounded
ones. The last run's curve goes beside them, as CSV and as a picture.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch

from arr_fast.shapes.model import build_model, save_checkpoint
from arr_fast.shapes.run_state import load_state
from arr_fast.shapes.tokenizer import build_tokenizer

WEIGHTS = Path(__file__).parent / "weights" / "judge"
CURVES = Path(__file__).parent / "data"
PANELS = (
    ("loss", "training losses", ("verdict", "caption", "probe")),
    ("stage 1", "vision: held-out accuracy", ("object", "shape", "count", "row", "blur")),
    ("held out", "held-out accuracy, one order", ("pair", "point", "tie")),
)


def export(runs: Sequence[Path], out: Path) -> str:
    """Writes the mean of the runs' last weights as a checkpoint and returns what it is.

    Raises:
        FileNotFoundError: A run has no state.
    """
    states = []
    for run in runs:
        state = load_state(run / "state.pt")
        if state is None:
            raise FileNotFoundError(f"{run / 'state.pt'} does not exist")
        states.append(state)
    weights = [state["model"] for state in states]
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    model.load_state_dict(
        {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}
    )
    save_checkpoint(model.eval(), tokenizer, out, torch.float16)
    ends = (f"{s['stage']} step {s['step']}, {s['cpu_seconds']:.0f} CPU seconds" for s in states)
    return "; ".join(ends)


def plot_curve(source: Path, picture: Path) -> None:
    """Draws a run's CSV: losses, stage 1, and held-out accuracy against CPU seconds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    series: dict[str, list[tuple[float, float]]] = defaultdict(list)
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            series[row["name"]].append((float(row["cpu_seconds"]) / 60, float(row["value"])))
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(13, 3.6))
    for axis, (_, title, names) in zip(axes, PANELS, strict=True):
        for name in names:
            if series[name]:
                axis.plot(*zip(*series[name], strict=True), label=name, linewidth=1)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("CPU minutes of worker 0")
        axis.legend(fontsize=8)
    axes[0].set_ylim(0, 2)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    pyplot.close(figure)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True, nargs="+")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--curves", type=Path, default=CURVES)
    args = parser.parse_args()
    print(f"{export(args.run, args.out)} -> {args.out}")
    curve = args.run[-1] / "curve.csv"
    (args.curves / "judge_curve.csv").write_bytes(curve.read_bytes())
    plot_curve(curve, args.curves / "judge_curve.png")


if __name__ == "__main__":
    main()
