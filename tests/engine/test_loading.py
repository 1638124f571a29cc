"""Judges from directories, adapters, quantised weights, and compiled layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForImageTextToText

from arr_fast.bench.random_models import resolve_model
from arr_fast.engine.model import _revision_of, directory_hash, resolve_device, resolve_dtype
from arr_fast.errors import ArrFastError, ConfigError
from arr_fast.judge import Judge
from arr_fast.replay import Replayer
from tests.engine import scenes

MODEL = "random:qwen3_vl-tiny[layers=3,vision_depth=2,deepstack=0]"
A, B = scenes.image(70, 100, 1), scenes.image(64, 64, 2)


def verdicts(judge: Judge) -> np.ndarray:
    return judge.compare(["a caption"], [A], [B], scenes.rubric(6)).preference[0]


@pytest.fixture(scope="module")
def adapter_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    base = AutoModelForImageTextToText.from_pretrained(resolve_model(MODEL))
    config = LoraConfig(r=4, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    model: Any = get_peft_model(base, config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.05)
    target = tmp_path_factory.mktemp("adapter")
    model.save_pretrained(target)
    return target


def test_a_directory_is_a_model_and_its_hash_is_its_revision(tmp_path: Path) -> None:
    source = Path(resolve_model(MODEL))
    for file in source.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copied, original = (Judge.from_pretrained(p, device="cpu") for p in (tmp_path, source))
    assert copied.engine.loaded.revision == original.engine.loaded.revision
    np.testing.assert_allclose(verdicts(copied), verdicts(original), atol=1e-5)
    config = tmp_path / "config.json"
    config.write_text(config.read_text() + " ")
    assert directory_hash(tmp_path) != original.engine.loaded.revision


def test_an_adapter_is_merged(adapter_directory: Path) -> None:
    plain = Judge.from_pretrained(MODEL, device="cpu")
    adapted = Judge.from_pretrained(MODEL, device="cpu", adapter=adapter_directory)
    assert np.abs(verdicts(adapted) - verdicts(plain)).max() > 1e-2
    assert adapted.engine.loaded.revision.startswith(plain.engine.loaded.revision + "+")
    provenance = adapted.compare(["x"], [A], [B], scenes.rubric(1)).provenance
    assert provenance.settings["adapter"] == str(adapter_directory)
    replayer = Replayer.from_pretrained(resolve_model(MODEL), adapter=adapter_directory)
    for trace in adapted.trace(["a caption"], [A], [B], scenes.rubric(4)):
        assert abs(replayer.log_odds(trace) - trace.log_odds) <= 1e-4


@pytest.mark.parametrize("name", ["adapter_model.bin", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_part_of_a_directorys_hash(tmp_path: Path, name: str) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"one")
    before = directory_hash(tmp_path)
    (tmp_path / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "training_args.bin").write_bytes(b"arguments")
    assert directory_hash(tmp_path) == before
    (tmp_path / name).write_bytes(b"two")
    assert directory_hash(tmp_path) != before


def test_an_adapter_of_the_hub_is_named_with_its_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    base = _revision_of("user/base", None, "main", None)
    assert _revision_of("user/base", None, "main", "user/lora") == f"{base}+user/lora"
    commit = "0123456789abcdef" * 2 + "01234567"
    cached = tmp_path / "models--user--lora"
    (cached / "refs").mkdir(parents=True)
    (cached / "refs" / "main").write_text(commit)
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "adapter_config.json").write_text("{}")
    assert _revision_of("user/base", None, "main", "user/lora") == f"{base}+user/lora@{commit}"


@pytest.mark.parametrize(
    "model",
    [
        "random:qwen3_vl-tiny[layers=3,vision_depth=2,deepstack=1]",
        "random:smolvlm-tiny",
        "random:llava_onevision-tiny",
    ],
)
def test_kept_image_features_hold_no_more_memory_than_they_count(model: str) -> None:
    judge = Judge.from_pretrained(model, device="cpu")
    shown = [scenes.image(64, 96, seed) for seed in range(3)]
    for batch in (shown[:1], shown):
        judge.engine.clear_caches()
        judge.engine.image_features(batch)
        for features in judge.engine.features_cache._entries.values():
            tensors = (features.embeds, *features.deepstack)
            assert features.nbytes == sum(t.untyped_storage().nbytes() for t in tensors) > 0


def test_int8_weights_keep_most_verdicts() -> None:
    exact = Judge.from_pretrained(MODEL, device="cpu")
    small = Judge.from_pretrained(MODEL, device="cpu", quantization="int8")
    args = (["x", "y"], [A, B], [B, A], scenes.rubric(20))
    reference, got = (judge.compare(*args).preference for judge in (exact, small))
    clear = np.abs(reference) > np.std(reference) / 4
    assert np.abs(got - reference).max() > 0
    assert (np.sign(got) == np.sign(reference))[clear].mean() >= 0.9
    assert small.compare(*args).provenance.settings["quantization"] == "int8"
    with pytest.raises(ArrFastError, match="quantised judge cannot be updated"):
        small.update_weights({})
    with pytest.raises(ValueError, match="quantization must be one of"):
        Judge.from_pretrained(MODEL, device="cpu", quantization="int3")  # type: ignore[arg-type]


def test_without_a_compiler_auto_says_so_and_true_is_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("arr_fast.engine.config.shutil.which", lambda name: None)
    judge = Judge.from_pretrained(MODEL, device="cpu", compile="auto")
    assert judge.stats()["compiled"] is False
    assert "no C++ compiler found" in caplog.text
    with pytest.raises(ConfigError, match="C\\+\\+ compiler"):
        Judge.from_pretrained(MODEL, device="cpu", compile=True)


@pytest.mark.compile
def test_compiled_equals_eager_and_lengths_share_graphs() -> None:
    torch._dynamo.reset()
    eager = Judge.from_pretrained(MODEL, device="cpu")
    compiled = Judge.from_pretrained(MODEL, device="cpu", compile=True)
    np.testing.assert_allclose(verdicts(compiled), verdicts(eager), atol=1e-4)
    # Captions of like length fall into the same bucket of rows; cached text would shorten them.
    steady = Judge.from_pretrained(MODEL, device="cpu", compile=True, prefix_cache="off")
    steady.compare(["a caption 1"], [A], [B], scenes.rubric(6))
    counters = torch._dynamo.utils.counters
    graphs = counters["stats"]["unique_graphs"]
    for caption in ("a caption 2", "a caption 3", "a caption 4"):
        steady.compare([caption], [A], [B], scenes.rubric(6))
    assert counters["stats"]["unique_graphs"] == graphs


@pytest.mark.compile
@pytest.mark.parametrize("level", [1, 2])
def test_compiled_layers_follow_their_weights(level: int) -> None:
    """Packed copies are found again after an update and after sleep, which may move weights."""
    torch._dynamo.reset()
    judge = Judge.from_pretrained(MODEL, device="cpu", compile=True)
    eager = Judge.from_pretrained(MODEL, device="cpu", prepack=False)
    before = verdicts(judge)
    judge.sleep(level)
    judge.wake()
    np.testing.assert_allclose(verdicts(judge), before, atol=1e-5)
    state = {
        name: value * 1.1 if "layers.0.mlp" in name else value
        for name, value in eager.engine.loaded.model.state_dict().items()
    }
    judge.update_weights(state)
    eager.update_weights(state)
    updated = verdicts(judge)
    assert np.abs(updated - before).max() > 1e-3
    np.testing.assert_allclose(updated, verdicts(eager), atol=1e-4)


def test_bfloat16_verdicts_are_as_good_as_plain_bfloat16() -> None:
    exact = Judge.from_pretrained(MODEL, device="cpu", dtype="float32")
    half = Judge.from_pretrained(MODEL, device="cpu", dtype="bfloat16")
    plain = Replayer.from_pretrained(resolve_model(MODEL), dtype=torch.bfloat16)
    args = (["a caption"], [A], [B], scenes.rubric(20))
    truth = np.array([t.log_odds for t in exact.trace(*args)])
    traces = half.trace(*args)
    ours = np.array([t.log_odds for t in traces])
    theirs = np.array([plain.log_odds(t) for t in traces])
    scale = np.abs(truth).max() * torch.finfo(torch.bfloat16).eps
    assert np.abs(ours - truth).mean() <= np.abs(theirs - truth).mean() * 1.25 + scale


def test_devices_and_dtypes_are_resolved_or_refused() -> None:
    cpu = torch.device("cpu")
    assert resolve_dtype("auto", cpu) is torch.float32
    assert resolve_dtype("auto", torch.device("cuda")) is torch.bfloat16
    with pytest.raises(ValueError, match="dtype must be auto or one of"):
        resolve_dtype("int4", cpu)
    if not torch.cuda.is_available():
        assert resolve_device("auto") == cpu
        with pytest.raises(ArrFastError, match="CUDA is not available"):
            resolve_device("cuda")


@pytest.mark.parametrize("device", ["auto", "cuda", torch.device("cuda")])
def test_a_gpu_is_the_one_current_where_the_judge_was_asked_for(
    device: str | torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert resolve_device(device) == torch.device("cuda", 3)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    assert resolve_device("cpu") == torch.device("cpu")
