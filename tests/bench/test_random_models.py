"""Random checkpoints: real, deterministic, and with verdicts that move with the input."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from arr_fast.bench.plain_prompts import PlainPrompts
from arr_fast.bench.random_models import FAMILIES, build, parse_spec, resolve_model
from arr_fast.bench.workloads import build_inputs, named
from arr_fast.replay import Replayer
from arr_fast.trace import VerdictTrace


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoint_runs_under_plain_transformers(family: str, model_cache: Path) -> None:
    path = resolve_model(f"random:{family}-tiny", model_cache)
    replayer = Replayer.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path)
    prompts = PlainPrompts(tokenizer, replayer.config, replayer.image_processor)
    labels = prompts.label_ids()
    assert [len(ids) for ids in labels] == [1, 1]
    inputs = build_inputs(named("smoke-K8"), prompts)
    images = inputs.images[0]
    log_odds = []
    for ids in inputs.sequences(prompts, 0, (0, 1)):
        trace = VerdictTrace(0, "c", "AB", ids, np.zeros((1, len(ids))), images, labels, 0.0)
        log_odds.append(replayer.log_odds(trace))
    swapped = VerdictTrace(0, "c", "AB", ids, np.zeros((1, len(ids))), images[::-1], labels, 0.0)
    assert np.std(log_odds) >= 1.0
    assert abs(replayer.log_odds(swapped) - log_odds[-1]) > 1e-2


def test_labels_and_words_are_single_tokens(tiny_qwen3: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_qwen3)
    for text in ("1", "2", "Yes", "No", "assistant", "Criterion"):
        assert len(tokenizer(text, add_special_tokens=False).input_ids) == 1, text
    text = "Grüße, 你好 🎈\n\ttabs"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text


def test_same_spec_same_bytes(tmp_path: Path) -> None:
    spec = "random:qwen3_vl-tiny[layers=2,vision_depth=2,seed=5]"
    digests = []
    for name in ("one", "two"):
        files = sorted(build(spec, tmp_path / name).iterdir())
        digests.append({f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in files})
    assert digests[0] == digests[1]
    assert "chat_template.jinja" in digests[0]
    assert "preprocessor_config.json" in digests[0]
    other = build("random:qwen3_vl-tiny[layers=2,vision_depth=2,seed=6]", tmp_path / "three")
    weights = hashlib.sha256((other / "model.safetensors").read_bytes()).hexdigest()
    assert weights != digests[0]["model.safetensors"]


def test_options_reach_the_config(model_cache: Path) -> None:
    name = "random:qwen2_vl-tiny[heads=8,kv_heads=1,head_dim=64,tied=true,layers=2]"
    path = resolve_model(name, model_cache)
    model = AutoModelForImageTextToText.from_pretrained(path)
    text = model.config.get_text_config()
    assert (text.num_attention_heads, text.num_key_value_heads, text.hidden_size) == (8, 1, 512)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert AutoImageProcessor.from_pretrained(path, backend="pil").merge_size == 2


def test_design_model_has_the_published_size() -> None:
    spec = parse_spec("random:qwen3_vl-29m")
    attention = spec.hidden * spec.head_dim * 2 * (spec.heads + spec.kv_heads)
    decoder = spec.layers * (attention + 3 * spec.hidden * spec.mlp)
    assert 28.5e6 < decoder < 29.5e6
    assert (spec.layers, spec.hidden, spec.heads, spec.kv_heads, spec.head_dim) == (
        8,
        512,
        8,
        4,
        64,
    )


def test_cache_is_keyed_by_the_whole_spec(model_cache: Path) -> None:
    first = resolve_model("random:qwen3_vl-tiny[layers=2]", model_cache)
    stamp = (Path(first) / "model.safetensors").stat().st_mtime_ns
    assert resolve_model("random:qwen3_vl-tiny[layers=2]", model_cache) == first
    assert (Path(first) / "model.safetensors").stat().st_mtime_ns == stamp
    assert parse_spec("random:qwen3_vl-tiny[seed=1]").content_hash not in first
    assert resolve_model("some/model", model_cache) == "some/model"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("random:qwen3_vl", "not of the form"),
        ("random:gpt-tiny", "unknown family 'gpt'"),
        ("random:qwen3_vl-huge", "unknown size 'huge'"),
        ("random:qwen3_vl-tiny[colour=3]", "unknown option 'colour'"),
        ("random:qwen3_vl-tiny[heads=3,kv_heads=2]", "must be a multiple"),
        ("random:qwen3_vl-tiny[tied=maybe]", "true or false"),
    ],
)
def test_bad_names_are_refused(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_spec(name)
