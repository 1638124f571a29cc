"""Randomly initialised but complete checkpoints, built on the fly and cached.

A name reads `random:<family>-<size>` or `random:<family>-<size>[key=value,...]`, for example
`random:qwen3_vl-29m` or `random:qwen2_vl-tiny[heads=8,kv_heads=1,tied=true,seed=3]`. What is built
is a directory as transformers writes it: config, safetensors, tokenizer, image processor, chat
template. It loads with AutoModelForImageTextToText, AutoTokenizer and AutoImageProcessor.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, get_type_hints

FAMILIES = (
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "qwen3_vl_moe",
    "smolvlm",
    "idefics3",
    "llava_onevision",
)
PREFIX = "random:"
# Part of the cache key: raise it when the same spec would give other files.
_BUILDER_VERSION = 4
_NAME = re.compile(r"random:([a-z0-9_]+)-([a-z0-9]+)(?:\[([^\]]*)\])?")


@dataclass(frozen=True, slots=True)
class RandomModelSpec:
    """Sizes of a random checkpoint.

    Attributes:
        family: One of `FAMILIES`.
        layers, hidden, heads, kv_heads, head_dim, mlp: The decoder. Qwen2-VL, Qwen2.5-VL and
            LLaVA-OneVision need hidden == heads * head_dim. For Qwen3-VL-MoE `mlp` is the width
            of one expert.
        tied: The output head is the embedding.
        vocab: Rows of the embedding; more than the tokenizer has, as in published checkpoints.
        vision_depth, vision_hidden, vision_heads, vision_mlp: The vision tower.
        patch, merge: Patch side in pixels; patches merged per side (pixel shuffle for Idefics3).
        vision_grid: Side of the learnt position grid in patches (Qwen3-VL).
        deepstack: Vision layers whose features are added to the first decoder layers (Qwen3-VL).
        image_size: Side in pixels of the square that SmolVLM, Idefics3 and LLaVA-OneVision see.
        min_pixels, max_pixels: The Qwen image processor's limits.
        experts, experts_per_token: Mixture of experts.
        max_positions: Context length.
        log_odds_std: Standard deviation of log-odds over the criteria of one random prompt, nats.
        calibration_pixels: Side of the images of those prompts.
        seed: Seed of all weights.
    """

    family: str
    layers: int = 3
    hidden: int = 128
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    mlp: int = 192
    tied: bool = False
    vocab: int = 1280
    vision_depth: int = 3
    vision_hidden: int = 64
    vision_heads: int = 2
    vision_mlp: int = 128
    patch: int = 14
    merge: int = 2
    vision_grid: int = 8
    deepstack: tuple[int, ...] = (0, 1)
    image_size: int = 64
    min_pixels: int = 4 * 28 * 28
    max_pixels: int = 28 * 28 * 1280
    experts: int = 8
    experts_per_token: int = 2
    max_positions: int = 8192
    log_odds_std: float = 2.5
    calibration_pixels: int = 112
    seed: int = 0

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"unknown family {self.family!r}; there are {', '.join(FAMILIES)}")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})"
            )
        if self.family in ("qwen2_vl", "qwen2_5_vl") and self.hidden != self.heads * self.head_dim:
            raise ValueError(
                f"{self.family} needs hidden == heads * head_dim, "
                f"got {self.hidden} and {self.heads} * {self.head_dim}"
            )

    @property
    def content_hash(self) -> str:
        """sha256 hex over the spec, this builder's version and transformers' version."""
        import transformers

        text = json.dumps(
            [_BUILDER_VERSION, transformers.__version__, asdict(self)], sort_keys=True
        )
        return hashlib.sha256(text.encode()).hexdigest()


def parse_spec(name: str) -> RandomModelSpec:
    """Reads a `random:` name.

    Args:
        name: `random:<family>-<size>[options]`; sizes are `tiny`, and for qwen3_vl also `29m`
            (the model of the published engine numbers).

    Raises:
        ValueError: The name, the family, the size or an option is unknown.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise ValueError(f"{name!r} is not of the form random:<family>-<size>[key=value,...]")
    family, size, options = match.groups()
    spec = _sized(family, size)
    types = get_type_hints(RandomModelSpec)
    changes: dict[str, Any] = {}
    for item in filter(None, (options or "").replace(" ", "").split(",")):
        key, _, value = item.partition("=")
        if key not in types or key == "family":
            known = ", ".join(f.name for f in fields(RandomModelSpec) if f.name != "family")
            raise ValueError(f"{name!r}: unknown option {key!r}; there are {known}")
        changes[key] = _option(key, value, types[key])
    if changes.keys() & {"heads", "head_dim"} and "hidden" not in changes:
        heads = changes.get("heads", spec.heads)
        changes["hidden"] = heads * changes.get("head_dim", spec.head_dim)
    return replace(spec, **changes)


def build(spec: str | RandomModelSpec, directory: str | os.PathLike[str]) -> Path:
    """Writes the checkpoint of a spec into a directory.

    The directory appears complete or not at all. The same spec gives the same bytes.

    Args:
        spec: A `random:` name or a spec.
        directory: Where to write; it must not exist yet, or be empty.

    Returns:
        The directory.
    """
    spec = parse_spec(spec) if isinstance(spec, str) else spec
    target = Path(directory)
    if target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty")
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        _write(spec, scratch)
        scratch.chmod(0o755)
        os.replace(scratch, target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return target


def resolve_model(name: str, cache_dir: str | os.PathLike[str] | None = None) -> str:
    """Turns a `random:` name into a directory, building it at first use; other names pass through.

    Args:
        name: A `random:` name, a directory or a hub id.
        cache_dir: Where built checkpoints are kept; by default `$ARR_FAST_CACHE_DIR`, else a
            folder of the platform's temporary directory.
    """
    if not name.startswith(PREFIX):
        return name
    spec = parse_spec(name)
    target = _cache_root(cache_dir) / f"{spec.family}-{spec.content_hash[:16]}"
    if not (target / "config.json").is_file():
        try:
            build(spec, target)
        except OSError:
            # Another process may have finished the same checkpoint first.
            if not (target / "config.json").is_file():
                raise
    return str(target)


def _cache_root(cache_dir: str | os.PathLike[str] | None) -> Path:
    chosen = cache_dir or os.environ.get("ARR_FAST_CACHE_DIR")
    return Path(chosen) if chosen else Path(tempfile.gettempdir()) / "arr_fast_models"


def _sized(family: str, size: str) -> RandomModelSpec:
    if size == "tiny":
        spec = RandomModelSpec(family)
        if family == "qwen3_vl_moe":
            spec = replace(spec, mlp=96)
        if family.startswith("qwen3"):
            return replace(spec, patch=16, min_pixels=4 * 32 * 32, max_pixels=32 * 32 * 1280)
        if not family.startswith("qwen"):
            return replace(spec, patch=8, image_size=64)
        return spec
    if size == "29m" and family == "qwen3_vl":
        # 8 x (0.79M attention + 2.85M MLP) = 29.1M; vision 9.0M with its three mergers.
        return RandomModelSpec(
            family,
            layers=8,
            hidden=512,
            heads=8,
            kv_heads=4,
            head_dim=64,
            mlp=1856,
            tied=True,
            vocab=4096,
            calibration_pixels=512,
            log_odds_std=1.2,
            vision_depth=5,
            vision_hidden=256,
            vision_heads=4,
            vision_mlp=896,
            patch=16,
            vision_grid=32,
            deepstack=(1, 3),
            min_pixels=4 * 32 * 32,
            max_pixels=32 * 32 * 1280,
        )
    if family not in FAMILIES:
        raise ValueError(f"unknown family {family!r}; there are {', '.join(FAMILIES)}")
    raise ValueError(f"unknown size {size!r} for {family}; there are tiny, and 29m for qwen3_vl")


def _option(key: str, value: str, kind: Any) -> Any:
    if kind is bool:
        if value not in ("true", "false", ""):
            raise ValueError(f"option {key} is true or false, got {value!r}")
        return value != "false"
    if kind is int:
        return int(value)
    if kind is float:
        return float(value)
    return tuple(int(part) for part in value.split("+") if part)


def _write(spec: RandomModelSpec, directory: Path) -> None:
    import torch
    from transformers import AutoModelForImageTextToText

    from arr_fast.bench.random_configs import build_config, build_image_processor
    from arr_fast.bench.random_tokenizer import build_tokenizer, save_tokenizer
    from arr_fast.bench.random_weights import calibrate, randomise

    tokenizer = build_tokenizer(spec.family, merges=spec.vocab - 64)
    if len(tokenizer) > spec.vocab:
        raise ValueError(f"vocab={spec.vocab} is too small for {len(tokenizer)} tokens")
    config = build_config(spec, tokenizer)
    model = AutoModelForImageTextToText.from_config(
        config, dtype=torch.float32, attn_implementation="sdpa"
    ).eval()
    image_processor = build_image_processor(spec)
    randomise(model, spec.seed)
    calibrate(
        model,
        tokenizer,
        image_processor,
        pixels=spec.calibration_pixels,
        target=spec.log_odds_std,
        seed=spec.seed,
    )
    model.save_pretrained(directory)
    save_tokenizer(tokenizer, directory)
    image_processor.save_pretrained(directory)
