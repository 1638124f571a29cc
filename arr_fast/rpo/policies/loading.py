"""Which policy class a diffusers directory needs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from arr_fast.errors import UnsupportedModelError
from arr_fast.rpo.policies.diffusers_policy import DiffusersPolicy
from arr_fast.rpo.policies.flux import FluxPolicy
from arr_fast.rpo.policies.qwen_edit import QwenEditPolicy
from arr_fast.rpo.policies.sd3 import SD3Policy

POLICY_CLASSES: dict[str, type[DiffusersPolicy]] = {
    policy.name: policy for policy in (FluxPolicy, SD3Policy, QwenEditPolicy)
}


def load_policy(model: str | Path, *, revision: str | None = None, **options: Any) -> Any:
    """Loads a policy by the pipeline class that its model_index.json names.

    Args:
        model: Directory or hub id in diffusers' format.
        revision: Of a hub id.
        **options: Of `DiffusersPolicy.from_pretrained` and of the policy's class.

    Raises:
        UnsupportedModelError: A pipeline class that no policy knows (lists those that are).
    """
    from diffusers import DiffusionPipeline

    found = DiffusionPipeline.load_config(str(model), revision=revision).get("_class_name", "?")
    by_pipeline = {name: p for p in POLICY_CLASSES.values() for name in p.pipeline_classes}
    if found not in by_pipeline:
        raise UnsupportedModelError(found, by_pipeline)
    return by_pipeline[found].from_pretrained(model, revision=revision, **options)
