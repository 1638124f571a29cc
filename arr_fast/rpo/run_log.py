"""Where a run's numbers and pictures go: metrics.jsonl always, and accelerate's trackers."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from PIL import Image

from arr_fast.errors import TrainingError
from arr_fast.rpo.advantages import Advantages
from arr_fast.rpo.config import RunConfig
from arr_fast.rpo.metrics import flat_config, sample_grid, verdict_marks
from arr_fast.rpo.policies.base import Policy
from arr_fast.rpo.rollout import JudgedChunk

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Writes on rank 0.

    Args:
        config: The resolved configuration.
        accelerator: Holds the trackers.
    """

    def __init__(self, config: RunConfig, accelerator: Accelerator) -> None:
        self._config, self._accelerator = config, accelerator
        self._path = config.output / METRICS_FILE

    def start(self, iteration: int) -> None:
        """Saves the configuration, and drops what a killed run logged beyond its checkpoint."""
        if self._accelerator.is_main_process:
            self._config.save(self._config.output / "config.yaml")
            kept = self._lines_until(iteration) if iteration > 0 else []
            partial = self._path.with_suffix(".partial")
            partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
            partial.replace(self._path)
        if self._config.trackers:
            table = flat_config(self._config.model_dump(mode="json"))
            self._accelerator.init_trackers("rpo", table)

    def _lines_until(self, iteration: int) -> list[str]:
        """What was logged up to an iteration, without a last line that a crash cut short."""
        if not self._path.exists():
            return []
        lines, kept = self._path.read_text(encoding="utf-8").splitlines(), []
        for number, line in enumerate(lines, 1):
            try:
                row = json.loads(line)
            except ValueError as error:
                if number == len(lines):
                    break
                raise TrainingError(f"{self._path}:{number}: not valid JSON: {error}") from error
            if row["iteration"] <= iteration:
                kept.append(line)
        return kept

    def numbers(self, iteration: int, values: Mapping[str, float]) -> None:
        """Logs an iteration's numbers; those that are not finite are left out of the file."""
        if self._accelerator.is_main_process:
            known = {key: value for key, value in values.items() if math.isfinite(value)}
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"iteration": iteration, **known}) + "\n")
        if self._config.trackers:
            self._accelerator.log(dict(values), step=iteration)

    def grid(
        self, iteration: int, policy: Policy, chunk: JudgedChunk, given: Advantages
    ) -> Path | None:
        """Saves the first prompts of a chunk with their candidates and verdicts."""
        if not self._accelerator.is_main_process:
            return None
        sampled = chunk.trajectories
        count = min(self._config.evaluation.grid, len(sampled.batch))
        size = sampled.candidates
        images = policy.decode(sampled.final[: count * size].nan_to_num(0.0))
        rows = [images[i * size : (i + 1) * size] for i in range(count)]
        picture = sample_grid(rows, sampled.batch.prompts[:count], verdict_marks(given)[:count])
        path = self._config.output / "grids" / f"iteration-{iteration:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path)
        self._track(picture, iteration)
        return path

    def end(self) -> None:
        """Closes the trackers."""
        if self._config.trackers:
            self._accelerator.end_training()

    def _track(self, picture: Image.Image, iteration: int) -> None:
        for tracker in self._accelerator.trackers:
            if tracker.name == "tensorboard":
                pixels = np.asarray(picture)[None]
                tracker.log_images({"samples": pixels}, step=iteration, dataformats="NHWC")
