"""TRL's own GRPOTrainer on a tiny random language model, with our reward functions."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from arr_fast.images import CanonicalImage, to_image
from arr_fast.integrations.trl import async_reward, sync_reward
from arr_fast.judge import Judge
from tests.engine import scenes

pytestmark = pytest.mark.trl

GENERATIONS, STEPS = 4, 2
WORDS = ("red", "blue", "square", "circle", "left", "of", "a", "two")


def tiny_model() -> tuple[Any, Any]:
    """A random decoder of eight words, and its tokenizer."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    names = ("<pad>", "<eos>", "<unk>", *WORDS)
    raw = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(names),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    return Qwen2ForCausalLM(config), tokenizer


def picture(completion: str) -> CanonicalImage:
    """A completion as an image: stripes whose colours are its words."""
    words = completion.split() or ["<none>"]
    colours = [[hash_of(word, channel) for channel in range(3)] for word in words]
    pixels = np.repeat(np.array(colours, np.uint8)[None], 56, 0)
    return to_image(np.repeat(pixels, 56 // len(words) + 1, 1)[:, :56].copy(), name=completion)


def hash_of(word: str, channel: int) -> int:
    return (sum(map(ord, word)) * (37 + 50 * channel)) % 256


@pytest.mark.parametrize("kind", ["sync", "async"])
def test_a_training_run_calls_the_reward_and_learns_from_it(tmp_path, kind):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    judge = Judge.from_pretrained(
        "random:qwen3_vl-tiny[layers=2,vision_depth=2,deepstack=0]", device="cpu"
    )
    shown: list[tuple[str, dict[str, Any]]] = []

    def image_of(completion: str, row: dict[str, Any]) -> CanonicalImage | bytes:
        shown.append((completion, row))
        # The judge cannot read what the first prompt's images are in the second step.
        return b"broken" if row["hard"] and len(shown) > GENERATIONS else picture(completion)

    make = sync_reward if kind == "sync" else async_reward
    reward = make(judge, image_of, rubric=scenes.rubric(2), reward="bradley_terry")
    model, tokenizer = tiny_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    data = datasets.Dataset.from_list([{"prompt": "two red square", "hard": True}])
    trainer = trl.GRPOTrainer(
        model=model,
        reward_funcs=[reward],
        args=trl.GRPOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=GENERATIONS,
            num_generations=GENERATIONS,
            max_completion_length=6,
            max_steps=STEPS,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            bf16=False,
            seed=1,
        ),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trainer.train()
    assert len(shown) == GENERATIONS * STEPS
    logs = [log for log in trainer.state.log_history if "reward" in log]
    assert len(logs) == STEPS
    # The first step's rewards differ inside the group, so it moved the weights; strengths of a
    # group have mean 0. The second step's group abstained: TRL got None for each.
    images = [picture(completion) for completion, _ in shown[:GENERATIONS]]
    wanted = judge.rank(["two red square"], [images], scenes.rubric(2)).bradley_terry[0]
    assert logs[0]["reward_std"] == pytest.approx(np.std(wanted, ddof=1), rel=1e-3)
    assert logs[0]["reward_std"] > 0.0
    assert logs[0]["rewards/arr_fast_reward/mean"] == pytest.approx(0.0, abs=1e-5)
    assert any(not torch.equal(before[n], p.cpu()) for n, p in model.named_parameters())
    nothing = logs[1]["rewards/arr_fast_reward/mean"]
    assert nothing is None or math.isnan(nothing)
