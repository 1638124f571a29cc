"""Weights that change or go away under a running judge: updates, sleep and wake."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from arr_fast.engine.engine import Engine
from arr_fast.engine.packed_linear import release_linears, repack_linears
from arr_fast.errors import ArrFastError


class WeightKeeper:
    """Owns the life of an engine's weights.

    Args:
        engine: The engine; its caches are dropped whenever the weights change.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.level = 0
        self._revision = engine.loaded.revision
        self._updates = 0

    def check_awake(self) -> None:
        """Raises an ArrFastError while asleep."""
        if self.level:
            raise ArrFastError(f"the judge sleeps (level {self.level}); call wake() first")

    def update(self, source: str | Path | Mapping[str, Tensor]) -> None:
        """Copies new values into the weights and starts a new epoch.

        The loaded model's revision becomes "<revision of the checkpoint>#update<n>".

        Args:
            source: A checkpoint directory of the same architecture, or a state dict.

        Raises:
            ValueError: Missing, unknown or misshapen tensors; nothing is changed then.
            ArrFastError: The judge is quantised, or asleep.
        """
        if self.engine.loaded.quantization:
            raise ArrFastError("weights of a quantised judge cannot be updated; load it anew")
        with self.engine.lock:
            self.check_awake()
            if isinstance(source, Mapping):
                state = dict(source)
            else:
                state = _read_checkpoint(self.engine.loaded.model, Path(source))
            targets = self._targets()
            _check_state(state, targets)
            with torch.no_grad():
                for name, value in state.items():
                    targets[name].copy_(value)
            self._updates += 1
            self.engine.loaded = dataclasses.replace(
                self.engine.loaded, revision=f"{self._revision}#update{self._updates}"
            )
            self.engine.reset_weights()

    def sleep(self, level: int) -> None:
        """Moves weights to host memory (1) or drops them (2); drops packed copies and caches.

        A judge that sleeps as deep already stays as it is.
        """
        if level not in (1, 2):
            raise ValueError(f"level must be 1 or 2, got {level}")
        if level == 2 and self.engine.loaded.quantization:
            raise ArrFastError("a quantised judge can sleep only at level 1")
        with self.engine.lock:
            if level == 2 and self._updates:
                raise ArrFastError("weights were updated in memory; sleep(2) would lose them")
            if self.level >= level:
                return
            self.engine.forget_weights()
            model = self.engine.loaded.model
            if level == 1:
                model.to("cpu")
            else:
                for parameter in model.parameters():
                    parameter.data = torch.empty(0, dtype=parameter.dtype)
            release_linears(self.engine.adapter.layers)
            if self.engine.loaded.device.type == "cuda":
                torch.cuda.empty_cache()
            self.level = level

    def wake(self) -> None:
        """Brings the weights back."""
        with self.engine.lock:
            if not self.level:
                return
            loaded = self.engine.loaded
            if self.level == 2:
                fresh = dict(loaded.reload().named_parameters(remove_duplicate=False))
                for name, parameter in loaded.model.named_parameters():
                    parameter.data = fresh[name].data
            # Buffers too: on the way through level 1 they were moved.
            loaded.model.to(loaded.device)
            repack_linears(self.engine.adapter.layers)
            self.level = 0

    def _targets(self) -> dict[str, Tensor]:
        model = self.engine.loaded.model
        targets = dict(model.named_parameters(remove_duplicate=False))
        return {**targets, **dict(model.named_buffers())}


def _read_checkpoint(model: Any, directory: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint in this model's own names, through transformers' own conversion."""
    if not directory.is_dir():
        raise ValueError(f"{directory} is not a checkpoint directory")
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise ValueError(f"{directory} holds no safetensors file")
    state: dict[str, Tensor] = {}
    for file in files:
        state.update(load_file(file))
    names = dict(model.named_parameters(remove_duplicate=False))
    if set(state) <= set(names):
        return state
    fresh = type(model).from_pretrained(directory, dtype=model.dtype)
    return dict(fresh.named_parameters())


def _check_state(state: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> None:
    unknown = sorted(set(state) - set(targets))
    # Tied weights may come under either name.
    held = {targets[name].data_ptr() for name in state if name in targets}
    missing = sorted(
        name
        for name, target in targets.items()
        if isinstance(target, torch.nn.Parameter) and target.data_ptr() not in held
    )
    misshapen = [
        f"{name} is {tuple(value.shape)}, expected {tuple(targets[name].shape)}"
        for name, value in state.items()
        if name in targets and value.shape != targets[name].shape
    ]
    problems = [
        *(f"unknown tensor {name}" for name in unknown),
        *(f"missing tensor {name}" for name in missing),
        *misshapen,
    ]
    if problems:
        shown = "; ".join(problems[:5])
        more = f" (and {len(problems) - 5} more)" if len(problems) > 5 else ""
        raise ValueError(f"weights do not fit: {shown}{more}")
