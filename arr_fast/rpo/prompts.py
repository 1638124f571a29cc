"""Prompt sets and the order in which a run walks through them.

The order is a function of the seed and of what was tied before; its state fits a checkpoint. Every
rank holds the whole state and takes its own slice.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from arr_fast.errors import ConfigError

BUILTIN = "builtin:"
HELD_OUT = "-held-out"
BUILTIN_COUNT = 4096


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt.

    Attributes:
        id: Stable number, unique in its set; with seed and iteration it keys the noise.
        text: Prompt or edit instruction.
        source: The image to edit, or its file, or None.
        metadata: What the judge may want: "rubric", expected objects.
    """

    id: int
    text: str
    source: Image.Image | Path | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    def image(self) -> Image.Image | None:
        """The image to edit, read from its file where it has one.

        Raises:
            ConfigError: The file cannot be read.
        """
        if not isinstance(self.source, Path):
            return self.source
        try:
            with Image.open(self.source) as opened:
                return opened.convert("RGB")
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"prompt {self.id}: image {self.source}: {error}") from error


def load_prompts(source: str, *, count: int | None = None, seed: int = 0) -> list[Prompt]:
    """Reads or draws prompts.

    Args:
        source: "builtin:shapes" or "builtin:shapes-edit", each also with "-held-out"; a .txt file
            with a prompt per line; a .jsonl file of objects with prompt, and image for editing.
        count: How many, from the start of a file; None is all of a file, 4096 of a builtin source.
        seed: Of a builtin source.

    Raises:
        ConfigError: An unknown source, a missing file, an empty line (with its number), or a
            row that is no prompt.
    """
    if source.startswith(BUILTIN):
        return _builtin(source, count or BUILTIN_COUNT, seed)
    path = Path(source)
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot read prompts: {error}") from error
    if not lines:
        raise ConfigError(f"{source} holds no prompts")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise ConfigError(f"{source}:{number}: empty line; every line is a prompt")
    if path.suffix == ".txt":
        return [Prompt(number, line.strip()) for number, line in enumerate(lines[:count])]
    if path.suffix == ".jsonl":
        return [_row(path, number, line) for number, line in enumerate(lines[:count])]
    raise ConfigError(f"{source}: prompts are builtin:..., .txt or .jsonl")


def _row(path: Path, number: int, line: str) -> Prompt:
    where = f"{path}:{number + 1}"
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON: {error}") from error
    text = row.get("prompt") if isinstance(row, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: expected an object with a prompt that is not empty")
    file = None
    if row.get("image") is not None:
        file = path.parent / str(row["image"])
        try:
            # Reads the header only: a set can be larger than memory.
            with Image.open(file):
                pass
        except (OSError, ValueError, SyntaxError) as error:
            raise ConfigError(f"{where}: image {file}: {error}") from error
    rest = {key: value for key, value in row.items() if key not in ("prompt", "image")}
    return Prompt(number, text.strip(), file, rest)


def source_images(prompts: Sequence[Prompt]) -> list[Image.Image] | None:
    """The images to edit of several prompts; None for text-to-image."""
    found = [prompt.image() for prompt in prompts]
    return [image for image in found if image is not None] or None


def _builtin(source: str, count: int, seed: int) -> list[Prompt]:
    from arr_fast.shapes.generator_data import GeneratorTask, sample_prompts
    from arr_fast.shapes.scene import Split

    name = source.removeprefix(BUILTIN)
    split: Split = "held_out" if name.endswith(HELD_OUT) else "train"
    tasks: dict[str, GeneratorTask] = {"shapes": "t2i", "shapes-edit": "edit"}
    stem = name.removesuffix(HELD_OUT)
    if stem not in tasks:
        raise ConfigError(f"unknown prompts {source!r}; there are {', '.join(tasks)}")
    drawn = sample_prompts(count, seed=seed, split=split, task=tasks[stem])
    return [
        Prompt(number, each.text, each.source, {"rubric": each.rubric})
        for number, each in enumerate(drawn)
    ]


class PromptWalk:
    """Walks through prompts in shuffled epochs and sets aside those that are always tied.

    Args:
        prompts: The set.
        seed: Of the order.
        tied_limit: A prompt tied so many times in a row is set aside; None never.
        rest: For how many epochs.
    """

    def __init__(
        self, prompts: Sequence[Prompt], *, seed: int, tied_limit: int | None = None, rest: int = 2
    ) -> None:
        if not prompts:
            raise ConfigError("a run needs at least one prompt")
        self.prompts = list(prompts)
        self.by_id = {prompt.id: prompt for prompt in self.prompts}
        self._seed, self._limit, self._rest = seed, tied_limit, rest
        self._epoch, self._place = 0, 0
        self._tied: dict[int, int] = {}
        self._resting: dict[int, int] = {}
        self._order = self._shuffled(0)

    @property
    def epoch(self) -> int:
        """Finished walks through the set."""
        return self._epoch

    @property
    def set_aside(self) -> int:
        """How many prompts rest at the moment."""
        return sum(until > self._epoch for until in self._resting.values())

    def take(self, count: int) -> list[Prompt]:
        """The next prompts; the same one may come twice where the set is small."""
        taken: list[Prompt] = []
        while len(taken) < count:
            if self._place == len(self._order):
                self._epoch += 1
                self._place, self._order = 0, self._shuffled(self._epoch)
                continue
            taken.append(self.prompts[self._order[self._place]])
            self._place += 1
        return taken

    def note(self, prompts: Sequence[Prompt], tied: Sequence[bool]) -> None:
        """Tells which prompts were tied; a decided one starts afresh."""
        if self._limit is None:
            return
        for prompt, is_tied in zip(prompts, tied, strict=True):
            self._tied[prompt.id] = self._tied.get(prompt.id, 0) + 1 if is_tied else 0
            if self._tied[prompt.id] >= self._limit:
                self._tied[prompt.id] = 0
                self._resting[prompt.id] = self._epoch + 1 + self._rest

    def state(self) -> dict[str, Any]:
        """What `restore` needs."""
        return {
            "epoch": self._epoch,
            "place": self._place,
            "order": list(self._order),
            "tied": dict(self._tied),
            "resting": dict(self._resting),
            "count": len(self.prompts),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Takes up a saved state.

        Raises:
            ConfigError: It belongs to another number of prompts.
        """
        if state["count"] != len(self.prompts):
            raise ConfigError(
                f"the checkpoint walked through {state['count']} prompts, now there are "
                f"{len(self.prompts)}"
            )
        self._epoch, self._place = state["epoch"], state["place"]
        self._order = list(state["order"])
        self._tied, self._resting = dict(state["tied"]), dict(state["resting"])

    def _shuffled(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
        order = torch.randperm(len(self.prompts), generator=generator).tolist()
        awake = [i for i in order if self._resting.get(self.prompts[i].id, 0) <= epoch]
        # Where everything rests, nothing does.
        return awake or order
