"""What an acceptance result is bound to; tests/rpo/test_acceptance.py has the run itself."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from arr_fast.bench.rpo_acceptance import Setting, _kept
from arr_fast.errors import ArrFastError
from arr_fast.rpo.config import read_config
from arr_fast.rpo.presets import demo_path
from arr_fast.shapes import generator_directory, judge_directory


def touch(weights: Path) -> None:
    """Changes one bit of a file."""
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("what", "file", "named"),
    [
        ("base", "transformer/diffusion_pytorch_model.safetensors", "base_weights"),
        ("base", "words.safetensors", "base_weights"),
        ("judge", "model.safetensors", "judge"),
    ],
)
def test_results_of_other_weights_under_the_same_path_are_refused(tmp_path, what, file, named):
    base, judge = tmp_path / "base", tmp_path / "judge"
    shutil.copytree(generator_directory("shapes"), base)
    shutil.copytree(judge_directory(), judge)
    recipe = read_config(demo_path()).changed(judges={"rubric": {"model": str(judge)}})
    setting = Setting(tmp_path, base, recipe, minutes=1.0, prompts=(), steps=3)
    result = tmp_path / "base.json"
    kept = _kept(result, setting.facts, lambda: {"success": [1.0]})
    assert _kept(result, setting.facts, dict) == kept
    touch(tmp_path / what / file)
    with pytest.raises(ArrFastError, match=rf"made with another {named}:"):
        _kept(result, setting.facts, dict)
