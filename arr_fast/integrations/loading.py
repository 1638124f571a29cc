"""Judges and rubrics as configuration files name them; equal configurations share one judge."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from arr_fast.rubric import Rubric

if TYPE_CHECKING:
    from arr_fast.judge import Judge

_judges: dict[tuple[Any, ...], Any] = {}
_lock = threading.Lock()


def judge_from(options: Mapping[str, Any], *, device: str = "auto") -> Judge:
    """A judge by its configuration.

    Args:
        options: `judge` (a Judge that exists already), or `model` and further arguments of
            `Judge.from_pretrained`.
        device: Where to load it, unless the options say.
    """
    given = dict(options)
    if given.get("judge") is not None:
        judge: Judge = given["judge"]
        return judge
    model = given.pop("model", "builtin:shapes")
    given.setdefault("device", device)
    key = (str(model), *sorted((name, repr(value)) for name, value in given.items()))
    with _lock:
        if key not in _judges:
            from arr_fast.judge import Judge

            _judges[key] = Judge.from_pretrained(model, **given)
        found: Judge = _judges[key]
    return found


def load_rubric(value: Any) -> Rubric | None:
    """A rubric from a Rubric, a file, a packaged name, or None for the default of the task."""
    if value is None or isinstance(value, Rubric):
        return value
    name = str(value)
    return Rubric.builtin(name) if name in Rubric.builtin_names() else Rubric.load(Path(name))
