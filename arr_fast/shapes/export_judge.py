"""Writes a run's weights as a checkpoint: `python -m arr_fast.shapes.export_judge --run DIR`.

Several runs, each gone on from the one before, give the mean of their ends; a checkpoint counts as
such an end. Weights are stored in float16 (half the size) and computed with in float32; what is
measured and shipped are the rounded ones. The last run's curve goes beside them, as CSV and as a
picture.
"""

from __future__ import annotations

import argparse
import csv
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

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
        FileNotFoundError: A run has no state, a checkpoint no weights.
    """
    ends = [_end(run) for run in runs]
    weights = [end[0] for end in ends]
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, seed=0)
    model.load_state_dict(
        {name: torch.stack([w[name] for w in weights]).mean(0) for name in weights[0]}
    )
    save_checkpoint(model.eval(), tokenizer, out, torch.float16)
    return "; ".join(text for _, text in ends)


def _end(run: Path) -> tuple[dict[str, Tensor], str]:
    """The last weights of a run, or those of a checkpoint, and what they are."""
    state = load_state(run / "state.pt")
    if state is not None:
        about = f"{state['stage']} step {state['step']}, {state['cpu_seconds']:.0f} CPU seconds"
        return state["model"], about
    if not (run / "model.safetensors").is_file():
        raise FileNotFoundError(f"{run} holds neither state.pt nor model.safetensors")
    weights = {k: v.float() for k, v in load_file(run / "model.safetensors").items()}
    # A checkpoint leaves out the head, which is tied to the embeddings.
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"]
    return weights, str(run)


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
