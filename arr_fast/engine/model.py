"""Loading a judge: checkpoint, tokenizer and image processor in the transformers format."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import try_to_load_from_cache
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer
from transformers.utils.hub import extract_commit_hash

from arr_fast.engine import attention
from arr_fast.engine.families import FAMILIES, FamilyAdapter, adapter_for
from arr_fast.errors import ArrFastError, MissingDependencyError, UnsupportedModelError

logger = logging.getLogger("arr_fast")

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
QUANTIZATIONS = ("int8", "fp8")
_CHECKPOINT_SUFFIXES = (".json", ".safetensors", ".jinja", ".txt", ".model")


@dataclass(frozen=True)
class LoadedModel:
    """A judge in memory.

    Attributes:
        model: The transformers model, in eval mode, without gradients.
        adapter: What its family needs.
        name: What the user asked for.
        path: The directory or hub id it came from.
        revision: Commit hash of a hub checkpoint, or a content hash of a local directory; then
            "+" and the same of a PEFT adapter; "#update<n>" once the weights were updated n times.
        device: Where it runs.
        dtype: Of its activations.
        quantization: "int8", "fp8" or None.
        peft_adapter: The PEFT adapter that was merged into the weights, as asked for, or None.
        reload: Reads the weights again, on the CPU, adapter merged.
    """

    model: Any
    adapter: FamilyAdapter
    name: str
    path: str
    revision: str
    device: torch.device
    dtype: torch.dtype
    quantization: str | None
    peft_adapter: str | None
    reload: Callable[[], Any]


def resolve_device(device: str | torch.device) -> torch.device:
    """ "auto" is the current CUDA device, or the CPU; a CUDA device always comes with its number.

    The judge may run in a thread of its own, where another device is current.
    """
    if str(device) == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    resolved = torch.device(device)
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ArrFastError(f"device {device!s} was asked for, but CUDA is not available")
    if resolved.type == "cuda" and resolved.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return resolved


def resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> torch.dtype:
    """ "auto" is float32 on a CPU (its bfloat16 is emulated) and bfloat16 on a GPU."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be auto or one of {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]


def resolve_path(name: str | Path) -> str:
    """The checkpoint behind `builtin:shapes`, `random:<family>-<size>`, a directory or a hub id."""
    text = str(name)
    if text == "builtin:shapes":
        from arr_fast.shapes import judge_directory

        return str(judge_directory())
    if text.startswith("builtin:"):
        raise UnsupportedModelError(text, ["builtin:shapes"], "no such bundled model")
    if text.startswith("random:"):
        from arr_fast.bench.random_models import resolve_model

        return str(resolve_model(text))
    return text


def load_model(
    name: str | Path,
    *,
    device: str | torch.device = "auto",
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    adapter: str | Path | None = None,
    quantization: str | None = None,
) -> LoadedModel:
    """Loads a checkpoint and puts the engine's attention in place.

    Args:
        name: `builtin:shapes`, `random:<family>-<size>`, a directory, or a hub id.
        device: "auto" or a torch device.
        dtype: "auto", "float32", "bfloat16", "float16" or a torch dtype.
        revision: Branch, tag or commit of a hub id.
        adapter: A PEFT adapter's directory or hub id; merged into the weights.
        quantization: "int8" (dynamic activations) or "fp8", through torchao.

    Raises:
        UnsupportedModelError: The checkpoint's family or its attention is not supported.
        MissingDependencyError: An extra is needed and missing.
    """
    attention.register()
    path = resolve_path(name)
    target, kind = resolve_device(device), resolve_dtype(dtype, resolve_device(device))
    config = AutoConfig.from_pretrained(path, revision=revision)
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(config.model_type, FAMILIES)

    def read() -> Any:
        model = AutoModelForImageTextToText.from_pretrained(
            path, revision=revision, dtype=kind, attn_implementation="sdpa"
        )
        return model if adapter is None else _merge_adapter(model, adapter)

    model = read()
    tokenizer = AutoTokenizer.from_pretrained(path, revision=revision)
    processor = AutoImageProcessor.from_pretrained(path, revision=revision, backend="pil")
    model = model.to(target).eval().requires_grad_(False)
    family = adapter_for(model, tokenizer, processor)
    model.config.get_text_config()._attn_implementation = attention.TREE
    if family.vision_attention:
        model.config.vision_config._attn_implementation = family.vision_attention
    if quantization is not None:
        quantize_decoder(family, quantization)
    return LoadedModel(
        model=model,
        adapter=family,
        name=str(name),
        path=path,
        revision=_revision_of(path, config, revision, adapter),
        device=target,
        dtype=kind,
        quantization=quantization,
        peft_adapter=None if adapter is None else str(adapter),
        reload=read,
    )


def quantize_decoder(family: FamilyAdapter, quantization: str) -> None:
    """Quantises the decoder's linear weights in place; embeddings, norms and head stay.

    Args:
        family: The adapter whose decoder layers are quantised.
        quantization: "int8" or "fp8".

    Raises:
        ValueError: Unknown scheme.
        MissingDependencyError: torchao is missing.
    """
    if quantization not in QUANTIZATIONS:
        raise ValueError(f"quantization must be one of {QUANTIZATIONS}, got {quantization!r}")
    try:
        from torchao.quantization import (
            Float8DynamicActivationFloat8WeightConfig,
            Int8DynamicActivationInt8WeightConfig,
            quantize_,
        )
    except ImportError as error:
        raise MissingDependencyError("torchao", "quant") from error
    schemes = {
        "int8": Int8DynamicActivationInt8WeightConfig,
        "fp8": Float8DynamicActivationFloat8WeightConfig,
    }
    for layer in family.layers:
        quantize_(layer, schemes[quantization]())


def _merge_adapter(model: Any, adapter: str | Path) -> Any:
    try:
        from peft import PeftModel
    except ImportError as error:
        raise MissingDependencyError("peft") from error
    return PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()


def _revision_of(path: str, config: Any, revision: str | None, adapter: str | Path | None) -> str:
    """A commit hash where the hub gave one; else a hash over the files that define the model."""
    found = getattr(config, "_commit_hash", None) or revision
    if Path(path).is_dir():
        found = directory_hash(Path(path))
    suffix = "" if adapter is None else f"+{_adapter_revision(adapter)}"
    return f"{found or 'unknown'}{suffix}"


def _adapter_revision(adapter: str | Path) -> str:
    """A directory's content hash; else the hub id, with the commit that the hub's cache holds."""
    if Path(adapter).is_dir():
        return directory_hash(Path(adapter))
    cached = try_to_load_from_cache(str(adapter), "adapter_config.json")
    commit = extract_commit_hash(cached if isinstance(cached, str) else None, None)
    return str(adapter) if commit is None else f"{adapter}@{commit}"


def directory_hash(directory: Path) -> str:
    """sha256 (first 16 hex digits) over the names, sizes and contents of a checkpoint's files."""
    digest = hashlib.sha256()
    for file in sorted(directory.iterdir()):
        # Of .bin files only weights: a trainer leaves its arguments and optimiser beside them.
        is_read = file.suffix in _CHECKPOINT_SUFFIXES or file.match("*_model*.bin")
        if not is_read:
            continue
        digest.update(file.name.encode())
        with file.open("rb") as stream:
            for chunk in iter(lambda: stream.read(1 << 22), b""):
                digest.update(chunk)
    return digest.hexdigest()[:16]
