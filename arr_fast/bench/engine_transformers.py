"""Baselines on plain transformers: one call per criterion, batched, and with the KV cache copied.

All of them encode an image once where images are warm, and hand its features to the model through
`mm_encoder_outputs`: the comparison is about the criteria, not about a careless baseline.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from arr_fast.bench.plain_prompts import PlainPrompts
from arr_fast.bench.workloads import Inputs, Leg
from arr_fast.images import CanonicalImage
from arr_fast.replay import Replayer

_NOT_FOR_DECODER = ("pixel_values", "pixel_attention_mask", "image_sizes", "batch_num_images")


class PlainEngine:
    """One forward per criterion over the whole sequence; the reference of the gate."""

    name = "transformers"
    gated = True
    note = "one forward per criterion; images encoded once per leg; last-token logits only"

    def __init__(self) -> None:
        self._features: dict[tuple[str, ...], Any] = {}
        self._keep = False

    def prepare(self, model_dir: str) -> None:
        """Loads the checkpoint with transformers."""
        from transformers import AutoTokenizer

        self.replayer = Replayer.from_pretrained(model_dir)
        self.model = self.replayer.model
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        self.prompts = PlainPrompts(tokenizer, self.model.config, self.replayer.image_processor)
        self.first, self.second = (list(ids) for ids in self.prompts.label_ids())

    def reset(self, inputs: Inputs, *, warm: bool) -> None:
        """Drops image features; with `warm`, encodes every shown pair of images again."""
        self._features.clear()
        self._keep = warm
        if warm:
            for images in inputs.images:
                for leg in inputs.workload.legs:
                    self._model_inputs([images[i] for i in leg])

    def run(self, inputs: Inputs) -> np.ndarray:
        """float64 [items, legs, K]."""
        with torch.inference_mode():
            return np.array(
                [
                    [self._leg(inputs, item, leg) for leg in inputs.workload.legs]
                    for item in range(inputs.workload.n_pairs)
                ]
            )

    def close(self) -> None:
        """Nothing is held outside."""

    def _leg(self, inputs: Inputs, item: int, leg: Leg) -> list[float]:
        return self.verdicts(inputs, item, leg, range(inputs.workload.criteria))

    def verdicts(self, inputs: Inputs, item: int, leg: Leg, which: Sequence[int]) -> list[float]:
        """Log-odds of some criteria of one leg, one forward each."""
        with torch.inference_mode():
            extra = self._model_inputs([inputs.images[item][index] for index in leg])
            sequences = inputs.sequences(self.prompts, item, leg)
            results: list[float] = []
            for number in which:
                results += self._read(self._forward(sequences[number][None], extra).logits[:, -1])
            return results

    def _forward(self, ids: np.ndarray, extra: dict[str, Any], **kwargs: Any) -> Any:
        tensor = torch.from_numpy(ids)
        if "image_grid_thw" in extra:
            is_image = (tensor == self.model.config.image_token_id).int()
            extra = {**extra, "mm_token_type_ids": is_image}
        options = {"use_cache": False, "logits_to_keep": 1, **kwargs}
        return self.model(input_ids=tensor, **extra, **options)

    def _model_inputs(self, shown: list[CanonicalImage]) -> dict[str, Any]:
        """Features of a pair of images as the model's forward takes them.

        Warm ones were encoded by `reset`; cold ones are processed and encoded here, once per leg.
        """
        key = tuple(image.content_hash for image in shown)
        if key in self._features:
            return dict(self._features[key])
        raw: dict[str, Any] = self.replayer.model_inputs(np.zeros(1, dtype=np.int64), shown)
        for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            raw.pop(name, None)
        with torch.inference_mode():
            output = self.model.get_image_features(**raw, return_dict=True)
        extra = {k: v for k, v in raw.items() if k not in _NOT_FOR_DECODER}
        extra["mm_encoder_outputs"] = {"image": output}
        if self._keep:
            self._features[key] = extra
        return dict(extra)

    def _read(self, logits: torch.Tensor) -> list[float]:
        wide = logits.double()
        odds = wide[:, self.first].logsumexp(-1) - wide[:, self.second].logsumexp(-1)
        values: list[float] = odds.tolist()
        return values


class BatchedEngine(PlainEngine):
    """The criteria of one leg as one batch of full sequences."""

    name = "transformers-batched"
    note = "the K full sequences of a leg as one batch; images encoded once per leg"

    def _leg(self, inputs: Inputs, item: int, leg: Leg) -> list[float]:
        shown = [inputs.images[item][index] for index in leg]
        sequences = inputs.sequences(self.prompts, item, leg)
        extra = _repeated(self._model_inputs(shown), len(sequences))
        return self._read(self._forward(np.stack(sequences), extra).logits[:, -1])


class CopiedCacheEngine(PlainEngine):
    """The prefix prefilled once, its KV cache copied K times, the leaves as one batch."""

    name = "transformers-kv-copied"
    note = "prefix prefilled once, KV cache copied K times, leaves batched"

    def _leg(self, inputs: Inputs, item: int, leg: Leg) -> list[float]:
        shown = [inputs.images[item][index] for index in leg]
        sequences = np.stack(inputs.sequences(self.prompts, item, leg))
        start = sequences.shape[1] - inputs.leaf_tokens
        extra = self._model_inputs(shown)
        prefill = self._forward(sequences[:1, :start], extra, use_cache=True)
        cache = prefill.past_key_values
        cache.batch_repeat_interleave(len(sequences))
        # Without an image argument the model goes on from its stored position offset.
        leaves = torch.from_numpy(np.ascontiguousarray(sequences[:, start:]))
        output = self.model(
            input_ids=leaves, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        return self._read(output.logits[:, -1])


def _repeated(extra: dict[str, Any], times: int) -> dict[str, Any]:
    """The same images for every sequence of a batch."""
    from transformers.utils.generic import ModelOutput

    repeated = dict(extra)
    if "image_grid_thw" in extra:
        repeated["image_grid_thw"] = extra["image_grid_thw"].repeat(times, 1)
    output = extra["mm_encoder_outputs"]["image"]
    changed: dict[str, Any] = {"pooler_output": _tiled(output.pooler_output, times)}
    if getattr(output, "deepstack_features", None) is not None:
        levels = output.deepstack_features
        changed["deepstack_features"] = [_tiled(level, times) for level in levels]
    kind = type(output)
    assert issubclass(kind, ModelOutput)
    repeated["mm_encoder_outputs"] = {"image": kind(**changed)}
    return repeated


def _tiled(features: Any, times: int) -> Any:
    if isinstance(features, torch.Tensor):
        return features.repeat(times, *[1] * (features.dim() - 1))
    return list(features) * times
