"""The bundled domain: rendered scenes of coloured shapes, their captions and criteria, and a judge.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def judge_directory() -> Path:
    """The directory of the bundled judge, `builtin:shapes`, in the transformers format.

    Raises:
        FileNotFoundError: The package was installed without its weights.
    """
    directory = Path(str(resources.files("arr_fast.shapes"))) / "weights" / "judge"
    if not (directory / "model.safetensors").exists():
        raise FileNotFoundError(
            f"no bundled judge in {directory}; train one: python -m arr_fast.shapes.train_judge"
        )
    return directory


__all__ = ["judge_directory"]
