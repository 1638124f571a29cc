"""Writes a run's weights as a checkpoint: `python -m arr_fast.shapes.export_judge --run DIR`.

Beside the checkpoint goes the run's curve, as CSV and as a plot.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch

from arr_fast.errors import ArrFastError
from arr_fast.shapes import data_directory, weights_directory
from arr_fast.shapes.model import build_model, save_checkpoint
from arr_fast.shapes.run_state import load_state
from arr_fast.shapes.tokenizer import build_tokenizer


def export(run: Path, directory: Path) -> tuple[str, int]:
    """Exports the newest state of a run.

    Weights are stored in float16, which halves the package, and load as float32: a difference of
    1e-3 of a weight at most, below what verdicts resolve.

    Args:
        run: Directory of `arr_fast.shapes.train_judge`.
        directory: Where the checkpoint goes; created where missing.

    Returns:
        The stage and step that were exported.

    Raises:
        ArrFastError: The run has no state.
    """
    state = load_state(run / "state.pt")
    if state is None:
        raise ArrFastError(f"no state.pt in {run}, expected a run of arr_fast.shapes.train_judge")
    tokenizer = build_tokenizer()
    model = build_model(tokenizer, 0)
    model.load_state_dict(state["model"])
    save_checkpoint(model, tokenizer, directory, torch.float16)
    return str(state["stage"]), int(state["step"])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=weights_directory())
    parser.add_argument("--curve", type=Path, default=data_directory() / "judge_curve.csv")
    args = parser.parse_args()
    stage, step = export(args.run, args.out)
    print(f"{stage} step {step} in {args.out}")
    curve = args.run / "curve.csv"
    if curve.exists():
        from arr_fast.shapes.curve_plot import plot_curve

        args.curve.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(curve, args.curve)
        plot_curve(args.curve, args.curve.with_suffix(".png"))
        print(f"curve in {args.curve} and {args.curve.with_suffix('.png')}")


if __name__ == "__main__":
    main()
