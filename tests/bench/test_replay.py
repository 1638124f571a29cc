"""The oracle equals a hand-written forward through model(**processor output)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoImageProcessor, AutoModelForImageTextToText, AutoTokenizer

from arr_fast.bench.random_models import resolve_model
from arr_fast.bench.workloads import noise_image
from arr_fast.images import CanonicalImage
from arr_fast.replay import Replayer
from arr_fast.trace import VerdictTrace


def _images() -> tuple[CanonicalImage, CanonicalImage]:
    rng = np.random.default_rng(3)
    return noise_image(rng, 128, 192), noise_image(rng, 192, 128)


def _trace(
    ids: np.ndarray, images: tuple[CanonicalImage, ...], labels: tuple[tuple[int, ...], ...]
) -> VerdictTrace:
    wrong_positions = np.full((3, len(ids)), -7)
    first, second = labels
    return VerdictTrace(0, "c", "AB", ids, wrong_positions, images, (first, second), 123.0)


def _by_hand(path: str) -> tuple[np.ndarray, torch.Tensor]:
    """Token ids and logits of a two-image prompt, placeholders expanded by string pieces."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    processor = AutoImageProcessor.from_pretrained(path, backend="pil")
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation="eager").eval()
    vision = processor(images=[image.to_pil() for image in _images()], return_tensors="pt")
    content = [
        {"type": "image"},
        {"type": "image"},
        {"type": "text", "text": "Which image is better, 1 or 2?"},
    ]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    pieces = text.split("<|image_pad|>")
    counts = (vision["image_grid_thw"].prod(-1) // 4).tolist()
    text = pieces[0] + "".join(
        "<|image_pad|>" * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
    )
    encoded = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    types = (encoded["input_ids"] == tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    with torch.inference_mode():
        logits = model(**encoded, **vision, mm_token_type_ids=types).logits[0, -1]
    return encoded["input_ids"][0].numpy(), logits


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_log_odds_equal_a_forward_by_hand(family: str, model_cache: Path) -> None:
    path = resolve_model(f"random:{family}-tiny", model_cache)
    ids, logits = _by_hand(path)
    replayer = Replayer.from_pretrained(path)
    labels = ((16, 40, 41), (17,))
    expected = torch.logsumexp(logits[[16, 40, 41]].double(), 0) - logits[17].double()
    found = replayer.log_odds(_trace(ids, _images(), labels))
    assert found == pytest.approx(float(expected), abs=2e-5)
    # The two images have equally many tokens: only pixels and positions tell them apart.
    swapped = replayer.log_odds(_trace(ids, _images()[::-1], labels))
    assert abs(swapped - found) > 1e-2
    mass = logits.double().softmax(0)[[16, 40, 41, 17]].sum()
    assert replayer.label_mass(_trace(ids, _images(), labels)) == pytest.approx(float(mass), 1e-4)


def test_float64_replay_bounds_the_float32_one(tiny_qwen3: str) -> None:
    ids, _ = _by_hand(tiny_qwen3)
    trace = _trace(ids, _images(), ((16,), (17,)))
    exact = Replayer.from_pretrained(tiny_qwen3, dtype=torch.float64).log_odds(trace)
    assert Replayer.from_pretrained(tiny_qwen3).log_odds(trace) == pytest.approx(exact, abs=5e-5)


def test_adapter_changes_the_verdict(tiny_qwen3: str, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    base = AutoModelForImageTextToText.from_pretrained(tiny_qwen3)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    tuned.save_pretrained(tmp_path / "adapter")
    ids, _ = _by_hand(tiny_qwen3)
    trace = _trace(ids, _images(), ((16,), (17,)))
    plain = Replayer.from_pretrained(tiny_qwen3).log_odds(trace)
    adapted = Replayer.from_pretrained(tiny_qwen3, adapter=tmp_path / "adapter").log_odds(trace)
    assert abs(adapted - plain) > 1e-3


def test_router_gaps(model_cache: Path, tiny_qwen3: str) -> None:
    path = resolve_model("random:qwen3_vl_moe-tiny", model_cache)
    ids, _ = _by_hand(path)
    trace = _trace(ids, _images(), ((16,), (17,)))
    replayer = Replayer.from_pretrained(path)
    gap = replayer.router_gaps(trace)
    routers = [
        (module, [])
        for module in replayer.model.modules()
        if type(module).__name__.endswith("Router")
    ]
    handles = [
        module.register_forward_pre_hook(lambda _m, args, kept=kept: kept.append(args[0]))
        for module, kept in routers
    ]
    replayer.log_odds(trace)
    for handle in handles:
        handle.remove()
    gaps = []
    for number, (module, kept) in enumerate(routers):
        rows = kept[0].reshape(-1, kept[0].shape[-1])
        rows = rows[-1:] if number == len(routers) - 1 else rows
        with torch.inference_mode():
            top = (rows @ module.weight.T).topk(module.top_k + 1).values
        gaps.append(float((top[:, -2] - top[:, -1]).min()))
    assert gap == pytest.approx(min(gaps), abs=1e-6)
    assert Replayer.from_pretrained(tiny_qwen3).router_gaps(trace) == float("inf")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_llava_onevision_sees_the_base_view(count: int, model_cache: Path) -> None:
    path = resolve_model("random:llava_onevision-tiny", model_cache)
    replayer = Replayer.from_pretrained(path)
    rng = np.random.default_rng(0)
    images = [noise_image(rng, 60, 100) for _ in range(count)]
    inputs = replayer.model_inputs(np.zeros(4, dtype=np.int64), images)
    output = replayer.model.get_image_features(
        inputs["pixel_values"], inputs["image_sizes"], batch_num_images=inputs["batch_num_images"]
    )
    assert [len(features) for features in output.pooler_output] == [65] * count


def test_unknown_model_type_is_named(tiny_qwen3: str) -> None:
    replayer = Replayer.from_pretrained(tiny_qwen3)
    replayer.config.model_type = "mystery"
    with pytest.raises(ValueError, match="mystery"):
        replayer.model_inputs(np.zeros(2, dtype=np.int64), _images())
