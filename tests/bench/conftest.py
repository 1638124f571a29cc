"""Checkpoints that the benchmark tests share, built once per session."""

from __future__ import annotations

from pathlib import Path

import pytest

from arr_fast.bench.random_models import resolve_model


@pytest.fixture(scope="session")
def model_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("random-models")


@pytest.fixture(scope="session")
def tiny_qwen3(model_cache: Path) -> str:
    return resolve_model("random:qwen3_vl-tiny", model_cache)
