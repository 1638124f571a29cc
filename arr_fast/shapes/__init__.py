"""The bundled domain: rendered scenes of coloured shapes, their captions and criteria, and a judge.

Importing this package imports neither torch nor transformers.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from arr_fast.errors import ArrFastError


def data_directory() -> Path:
    """Where the package's pictures, curve and figures lie."""
    return Path(str(resources.files("arr_fast.shapes"))) / "data"


def weights_directory() -> Path:
    """Where the bundled judge belongs, whether it is there or not."""
    return Path(str(resources.files("arr_fast.shapes"))) / "weights" / "judge"


def judge_directory() -> Path:
    """The directory of the bundled judge, `builtin:shapes`, in the transformers format.

    Raises:
        ArrFastError: The judge is not there; the message says how to make it.
    """
    directory = weights_directory()
    for name in ("model.safetensors", "config.json"):
        if not (directory / name).is_file():
            raise ArrFastError(
                f"no bundled judge: {name} is missing in {directory}; make it with "
                "python -m arr_fast.shapes.train_judge --out RUN, then "
                "python -m arr_fast.shapes.export_judge --run RUN"
            )
    return directory


def generator_directory(name: str = "shapes") -> Path:
    """The directory of a bundled generator, for `builtin:shapes` and `builtin:shapes-edit`.

    Raises:
        ArrFastError: There is none of that name, or it is not there; the message says how to make
            it.
    """
    tasks = {"shapes": "t2i", "shapes-edit": "edit"}
    if name not in tasks:
        raise ArrFastError(f"no generator builtin:{name}; there are {', '.join(tasks)}")
    folder = "generator" if name == "shapes" else "generator_edit"
    directory = weights_directory().parent / folder
    if not (directory / "generator.json").is_file():
        raise ArrFastError(
            f"no bundled generator in {directory}; make it with python -m "
            f"arr_fast.shapes.train_generator --out RUN --task {tasks[name]} --bundle"
        )
    return directory


__all__ = ["data_directory", "generator_directory", "judge_directory", "weights_directory"]
