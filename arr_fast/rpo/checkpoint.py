"""Checkpoints: written whole or not at all, checked when read.

    RUN/checkpoints/iteration-000020/
        manifest.json   format, iteration, and size and sha256 of every file
        config.yaml     the resolved configuration
        policy/         the trained weights in the format of the model's own library
        state.pt        optimizer, scheduler, RNG, prompt walk, EMA, rubric hashes, counters

A checkpoint is built in a hidden folder beside its place, flushed to disk and renamed, so a crash
or a full disk leaves the previous ones as they were.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from arr_fast.errors import CheckpointError

FORMAT = 1
FOLDER = "checkpoints"
_NAME = re.compile(r"iteration-(\d{6,})")
MANIFEST = "manifest.json"
SUPERSEDED = "superseded-"

logger = logging.getLogger("arr_fast")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint that was read and found whole.

    Attributes:
        path: Its folder.
        iteration: Rollouts done.
        state: What `save_checkpoint` was given.
    """

    path: Path
    iteration: int
    state: dict[str, Any]

    @property
    def policy(self) -> Path:
        """The folder of the trained weights."""
        return self.path / "policy"


def list_checkpoints(run: Path) -> list[Path]:
    """Finished checkpoints of a run, oldest first."""
    folder = run / FOLDER
    found = [p for p in folder.iterdir() if _NAME.fullmatch(p.name)] if folder.is_dir() else []
    return sorted(found, key=lambda p: int(p.name.removeprefix("iteration-")))


def save_checkpoint(
    run: Path,
    iteration: int,
    state: Mapping[str, Any],
    *,
    config_yaml: str,
    save_policy: Callable[[Path], None],
    keep: int = 2,
) -> Path:
    """Writes a checkpoint and deletes the oldest ones beyond `keep`.

    Later ones, of a run that was taken up again from an earlier one, are renamed to superseded-*.

    Args:
        run: The run's directory.
        iteration: Rollouts done; names the checkpoint.
        state: Tensors and plain values.
        config_yaml: The resolved configuration.
        save_policy: Writes the trained weights into a folder.
        keep: How many to keep.

    Returns:
        The checkpoint's folder.

    Raises:
        CheckpointError: It cannot be written (a full disk); names the last usable one.
    """
    target = run / FOLDER / f"iteration-{iteration:06d}"
    partial = target.with_name(f".{target.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        (partial / "policy").mkdir(parents=True)
        (partial / "config.yaml").write_text(config_yaml, encoding="utf-8")
        save_policy(partial / "policy")
        torch.save(dict(state), partial / "state.pt")
        files = sorted(p for p in partial.rglob("*") if p.is_file())
        manifest = {
            "format": FORMAT,
            "iteration": iteration,
            "files": {
                str(p.relative_to(partial)): {"bytes": p.stat().st_size, "sha256": _digest(p)}
                for p in files
            },
        }
        (partial / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        for path in (*files, partial / MANIFEST, partial):
            _flush(path)
        shutil.rmtree(target, ignore_errors=True)
        os.replace(partial, target)
        _flush(target.parent)
    # torch.save and safetensors report a full disk as errors of their own kinds.
    except Exception as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise CheckpointError(f"cannot write {target}: {error}{_usable(run)}") from error
    found = list_checkpoints(run)
    for later in found[found.index(target) + 1 :]:
        aside = later.with_name(SUPERSEDED + later.name)
        shutil.rmtree(aside, ignore_errors=True)
        later.rename(aside)
        logger.warning("%s is of the course that was left: now %s", later, aside.name)
    for old in list_checkpoints(run)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Reads a checkpoint after checking every file of it.

    Raises:
        CheckpointError: It is missing, of another format, or damaged; names the file and the other
            checkpoints of the run.
    """
    hint = _usable(path.parent.parent, without=path)
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        found_format, files = manifest["format"], dict(manifest["files"])
        iteration = int(manifest["iteration"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} cannot be read: {error}{hint}") from error
    if found_format != FORMAT:
        raise CheckpointError(
            f"{path} has format {found_format}, this version reads {FORMAT}{hint}"
        )
    for name, about in files.items():
        file = path / name
        if not file.is_file():
            raise CheckpointError(f"{path} is damaged: {name} is missing{hint}")
        if file.stat().st_size != about["bytes"] or _digest(file) != about["sha256"]:
            raise CheckpointError(f"{path} is damaged: {name} is not what was written{hint}")
    state: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    return Checkpoint(path, iteration, state)


def latest_checkpoint(run: Path) -> Checkpoint:
    """Reads the newest checkpoint of a run.

    Raises:
        CheckpointError: There is none, or it is damaged.
    """
    found = list_checkpoints(run)
    if not found:
        raise CheckpointError(f"{run} has no checkpoint to resume from")
    return load_checkpoint(found[-1])


def rng_state() -> dict[str, Any]:
    """The state of every generator that code of this process may draw from."""
    version, keys, gauss = random.getstate()
    name, words, *rest = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(keys), gauss],
        "numpy": [str(name), torch.from_numpy(np.array(words, dtype=np.int64)), *rest],
    }


def restore_rng(state: Mapping[str, Any]) -> None:
    """The inverse of `rng_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, keys, gauss = state["python"]
    random.setstate((version, tuple(keys), gauss))
    name, words, *rest = state["numpy"]
    np.random.set_state((name, words.numpy().astype(np.uint32), *rest))


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _usable(run: Path, without: Path | None = None) -> str:
    others = [p for p in list_checkpoints(run) if p != without]
    return f"; the last usable one may be {others[-1]}" if others else ""
