"""The engines that are compared: one protocol, and the registry by name."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from arr_fast.bench.workloads import Inputs


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How engines are set up.

    Attributes:
        threads: Intra-op threads of every engine.
        vllm_python: Interpreter of an environment that holds vLLM.
        judge: Keyword arguments of `Judge.from_pretrained` for `ours`.
    """

    threads: int = 2
    vllm_python: str | None = None
    judge: dict[str, Any] = field(default_factory=dict)


class BenchEngine(Protocol):
    """What the runner needs of an engine.

    Attributes:
        name: As on the command line.
        gated: Whether its log-odds must agree with plain transformers.
        note: What a reader of its numbers has to know.
    """

    name: str
    gated: bool
    note: str

    def prepare(self, model_dir: str) -> None:
        """Loads a checkpoint in float32 on the CPU."""
        ...

    def reset(self, inputs: Inputs, *, warm: bool) -> None:
        """Forgets everything computed so far; with `warm`, then encodes the images again."""
        ...

    def run(self, inputs: Inputs) -> np.ndarray:
        """Judges all items.

        Returns:
            float64 [items, legs, K]: log-odds that the first-shown image is better; NaN where the
            engine gives none.
        """
        ...

    def close(self) -> None:
        """Frees what the engine holds outside this process."""
        ...


ENGINE_NAMES = (
    "ours",
    "ours-compiled",
    "ours-separate",
    "transformers",
    "transformers-batched",
    "transformers-kv-copied",
    "json-decoding",
    "vllm",
)


def make_engine(name: str, options: EngineOptions) -> BenchEngine:
    """An engine by name.

    Raises:
        ValueError: Unknown name.
    """
    from arr_fast.bench import engine_json, engine_ours, engine_transformers, engine_vllm

    if name == "ours":
        return engine_ours.OursEngine(options)
    if name == "ours-compiled":
        return engine_ours.OursEngine(options, compiled=True)
    if name == "ours-separate":
        return engine_ours.SeparateEngine(options)
    if name == "transformers":
        return engine_transformers.PlainEngine()
    if name == "transformers-batched":
        return engine_transformers.BatchedEngine()
    if name == "transformers-kv-copied":
        return engine_transformers.CopiedCacheEngine()
    if name == "json-decoding":
        return engine_json.JsonDecodingEngine()
    if name == "vllm":
        return engine_vllm.VllmEngine(options)
    raise ValueError(f"unknown engine {name!r}; there are {', '.join(ENGINE_NAMES)}")
