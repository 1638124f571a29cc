"""Which rubric an item of a file is judged by."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from arr_fast.data.record import Record
    from arr_fast.rubric import Rubric

BUILTIN = "builtin:shapes"


class RubricBook:
    """Finds the rubric of an item: its own, the command's, or the default for model and task."""

    def __init__(self, chosen: str | None, model: str) -> None:
        self._chosen = chosen
        self._prefix = "shapes" if model == BUILTIN else ""
        self._loaded: dict[tuple[str, str], Rubric] = {}

    def __call__(self, item: Record) -> Rubric:
        """Returns the rubric of an item.

        Raises:
            RubricError: if it is missing, malformed or for the other task.
        """
        from arr_fast.errors import RubricError
        from arr_fast.rubric import Rubric

        task: Literal["t2i", "edit"] = "t2i" if item.source is None else "edit"
        name = item.rubric or self._chosen or self._default(task)
        key = (name, task)
        if key not in self._loaded:
            if name in Rubric.builtin_names():
                rubric = Rubric.builtin(name)
            elif Path(name).suffix:
                rubric = Rubric.load(name, task=task if name.endswith((".txt", ".md")) else None)
            else:
                rubric = Rubric.builtin(name)
            if rubric.task != task:
                needs = "a source image" if rubric.task == "edit" else "no source image"
                raise RubricError(f"{item.name}: rubric {name!r} needs {needs}")
            self._loaded[key] = rubric
        return self._loaded[key]

    def _default(self, task: str) -> str:
        if not self._prefix:
            return task
        return self._prefix if task == "t2i" else f"{self._prefix}_edit"
