"""Settings of an engine, and how "auto" is resolved on a machine."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass

import torch

from arr_fast.engine.model import LoadedModel
from arr_fast.engine.packed_linear import AUTO_LIMIT, can_pack, linear_bytes
from arr_fast.engine.planner import PrefixCacheMode
from arr_fast.errors import ConfigError

logger = logging.getLogger("arr_fast")


_LEAST = {
    **{"feature_cache_bytes": 0, "prefix_cache_bytes": 0},
    **{"max_batch_rows": 1, "activation_bytes": 1, "max_vision_patches": 1},
}
# May be None.
_DERIVED = ("max_batch_rows", "activation_bytes")


@dataclass(frozen=True)
class EngineConfig:
    """Settings of an engine; all sizes are bytes unless named otherwise.

    Attributes:
        impl: "auto", "torch", "triton", "flash", "xformers" or "reference".
        compile: True compiles every decoder layer, "auto" does so where a compiler is found.
        prepack: True packs linear weights for oneDNN, "auto" does so for float32 decoders of up to
            2 GiB on a CPU (the packed copy doubles their memory).
        feature_cache_bytes: Budget of the image-feature cache.
        prefix_cache_bytes: Budget of the prefix-KV pool.
        prefix_cache: What the pool keeps: "off", "text" before the first image, or "images".
        max_batch_rows: Rows of one forward; None derives it from `activation_bytes`.
        activation_bytes: Memory that one forward may use beside the weights; None is 2 GiB on a
            CPU and half of the free memory on a GPU.
        max_vision_patches: Patches of one vision forward.
    """

    impl: str = "auto"
    compile: bool | str = False
    prepack: bool | str = "auto"
    feature_cache_bytes: int = 1 << 30
    prefix_cache_bytes: int = 1 << 28
    prefix_cache: PrefixCacheMode = "text"
    max_batch_rows: int | None = None
    activation_bytes: int | None = None
    max_vision_patches: int = 65536

    def __post_init__(self) -> None:
        if self.prefix_cache not in ("off", "text", "images"):
            raise ValueError(f"prefix_cache must be off, text or images, got {self.prefix_cache!r}")
        if self.compile not in (True, False, "auto"):
            raise ValueError(f"compile must be True, False or 'auto', got {self.compile!r}")
        if self.prepack not in (True, False, "auto"):
            raise ValueError(f"prepack must be True, False or 'auto', got {self.prepack!r}")
        for name, least in _LEAST.items():
            size = getattr(self, name)
            if size is None and name in _DERIVED:
                continue
            if not isinstance(size, int) or size < least:
                raise ValueError(f"{name} must be an integer of at least {least}, got {size!r}")


def resolve_compile(choice: bool | str, device: torch.device) -> bool:
    """Whether to compile; "auto" says why not.

    Raises:
        ConfigError: True on a CPU without a C++ compiler.
    """
    if choice is False:
        return False
    if device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        if choice is True:
            raise ConfigError("compile=True needs a C++ compiler (g++ or clang++) on a CPU")
        logger.warning("compile=auto: no C++ compiler found, running eager")
        return False
    return True


def resolve_prepack(choice: bool | str, loaded: LoadedModel) -> bool:
    """Whether to pack linear weights."""
    possible = can_pack(loaded.device, loaded.dtype) and loaded.quantization is None
    if choice == "auto":
        return possible and linear_bytes(loaded.adapter.layers) <= AUTO_LIMIT
    if choice and not possible:
        raise ValueError(
            "prepack=True needs float32 on a CPU without quantization, got "
            f"{loaded.dtype} on {loaded.device}"
        )
    return bool(choice)
