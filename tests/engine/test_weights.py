"""Weights that change or go away under a judge: updates, sleep and wake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from arr_fast.errors import ArrFastError
from arr_fast.judge import Judge
from tests.engine import scenes

MODEL = "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0]"
A, B = scenes.image(70, 100, 1), scenes.image(64, 64, 2)


@pytest.fixture
def own_judge() -> Judge:
    return Judge.from_pretrained(MODEL, device="cpu")


def preference(judge: Judge) -> np.ndarray:
    return judge.compare(["a caption"], [A], [B], scenes.rubric(5)).preference[0]


def revision_of(judge: Judge) -> str:
    return judge.compare(["x"], [A], [B], scenes.rubric(1)).provenance.revision


def test_new_weights_are_used_at_once(own_judge: Judge, tmp_path: Path) -> None:
    base = preference(own_judge)
    source = Path(own_judge.engine.loaded.path)
    state = load_file(source / "model.safetensors")
    changed = {name: tensor * 1.05 for name, tensor in state.items()}
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    save_file(changed, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old = own_judge.engine.loaded.revision
    own_judge.update_weights(tmp_path)
    assert revision_of(own_judge) == f"{old}#update1"
    fresh = Judge.from_pretrained(tmp_path, device="cpu")
    updated = preference(own_judge)
    np.testing.assert_allclose(updated, preference(fresh), atol=1e-4)
    assert np.abs(updated - base).max() > 1e-2
    with pytest.raises(ValueError, match=r"missing tensor"):
        own_judge.update_weights({"lm_head.weight": torch.zeros(1)})
    np.testing.assert_allclose(preference(own_judge), updated, atol=1e-5)
    with pytest.raises(ArrFastError, match="would lose them"):
        own_judge.sleep(2)
    # What was fitted for the old weights says nothing of the new ones.
    fitted = scenes.rubric(2).with_calibration(old, "log_odds_mean", temperature=3.0, margin=1e6)
    verdicts = own_judge.compare(["x"], [A], [B], fitted)
    assert (verdicts.temperature[0], verdicts.margin[0]) == (1.0, 0.0)
    own_judge.sleep(1)
    own_judge.wake()
    assert revision_of(own_judge) == f"{old}#update1"
    own_judge.update_weights(own_judge.engine.loaded.model.state_dict())
    assert revision_of(own_judge) == f"{old}#update2"


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake(own_judge: Judge, level: Any) -> None:
    base = preference(own_judge)
    own_judge.sleep(level)
    assert own_judge.stats()["asleep"]
    with pytest.raises(ArrFastError, match="call wake"):
        preference(own_judge)
    own_judge.wake()
    own_judge.wake()
    np.testing.assert_allclose(preference(own_judge), base, atol=1e-5)


@pytest.mark.parametrize("levels", [(2, 1), (1, 2), (2, 1, 2)])
def test_a_sleeper_only_sinks(own_judge: Judge, levels: tuple[Any, ...]) -> None:
    base = preference(own_judge)
    for level in levels:
        own_judge.sleep(level)
    weight = next(own_judge.engine.adapter.layers.parameters())
    assert weight.numel() == 0
    own_judge.wake()
    np.testing.assert_allclose(preference(own_judge), base, atol=1e-5)


def test_an_update_does_not_slip_into_a_judge_that_fell_asleep(own_judge: Judge) -> None:
    """While it waited for the lock, say."""
    state = dict(own_judge.engine.loaded.model.state_dict())
    lock = own_judge.engine.lock

    class FallsAsleep:
        def __enter__(self) -> None:
            own_judge.engine.lock = lock
            own_judge.sleep(2)
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    own_judge.engine.lock = FallsAsleep()  # type: ignore[assignment]
    with pytest.raises(ArrFastError, match="call wake"):
        own_judge.update_weights(state)
