"""Runs every op suite into one CSV and draws it: `python -m benches.run_ops ops.csv ops.png`.

Exits with pytest's status: a suite whose gate fails still leaves the rows that it measured.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from benches.plot_ops import plot

OPS = ("prefix_attention", "verdict_head", "sde_step", "rpo_loss")


def main(csv_path: Path, png_path: Path) -> int:
    """Measures, then plots; an older CSV of that name is replaced."""
    csv_path.unlink(missing_ok=True)
    os.environ["ARR_FAST_BENCH_CSV"] = str(csv_path.resolve())
    folder = Path(__file__).parent
    status = pytest.main([*(str(folder / f"bench_{op}.py") for op in OPS), "-q", "-s"])
    plot(csv_path, png_path)
    return int(status)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), Path(sys.argv[2])))
