"""Checkpoints and curves of a training run: written atomically, resumed to the bit."""

from __future__ import annotations

import csv
import os
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

CURVE_FIELDS = ("stage", "step", "cpu_seconds", "split", "name", "value")


def save_state(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a state beside `path` and renames it, so that a crash leaves the previous one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".partial")
    torch.save(dict(state), partial)
    os.replace(partial, path)


def load_state(path: Path) -> dict[str, Any] | None:
    """A saved state, or None when there is none."""
    if not path.exists():
        return None
    loaded: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def resumed_plan(
    path: Path, given: Mapping[str, Any], may_change: Collection[str]
) -> dict[str, Any]:
    """The plan of the run whose state lies at `path`, with what the command line gives instead.

    Args:
        path: The state, with its plan under "plan".
        given: Options that were given.
        may_change: Those of them that another part of the run may have otherwise.

    Raises:
        ValueError: Nothing to resume, or an option that would make it another run.
    """
    state = load_state(path)
    if state is None:
        raise ValueError(f"nothing to resume: there is no {path}")
    plan: dict[str, Any] = state["plan"]
    for name, value in given.items():
        if name not in may_change and plan[name] != value:
            raise ValueError(f"the run in {path.parent} has {name} {plan[name]}, got {value}")
    return {**plan, **given}


@dataclass(slots=True)
class Curve:
    """A CSV of named values over steps, in long form.

    Attributes:
        path: The CSV file; rows are appended.
        spent: CPU seconds that earlier parts of the run used.
    """

    path: Path
    spent: float = 0.0
    _start: float = field(default_factory=time.process_time)

    def cpu_seconds(self) -> float:
        """CPU seconds over all threads since the run began; a paused process spends none."""
        return self.spent + time.process_time() - self._start

    def add(self, stage: str, step: int, split: str, values: Mapping[str, float]) -> None:
        """Appends one row per value."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = not self.path.exists()
        with self.path.open("a", newline="") as file:
            writer = csv.writer(file)
            if fresh:
                writer.writerow(CURVE_FIELDS)
            seconds = f"{self.cpu_seconds():.0f}"
            for name, value in values.items():
                writer.writerow([stage, step, seconds, split, name, f"{value:.4f}"])

    def truncate(self, stage: str, step: int) -> None:
        """Drops the rows of a stage after a step: what a killed run had logged beyond its state."""
        if not self.path.exists():
            return
        with self.path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        kept = [r for r in rows if r["stage"] != stage or int(r["step"]) <= step]
        with self.path.open("w", newline="") as file:
            writer = csv.DictWriter(file, CURVE_FIELDS)
            writer.writeheader()
            writer.writerows(kept)
