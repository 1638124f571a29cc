"""Writes with the model that judges: batched generation by transformers, JSON held by a mask."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList

from arr_fast.autorubric.constrained import CriteriaProcessor, GumbelSampling, TokenMasks
from arr_fast.autorubric.text_backend import OnResult, TextBackendError, TextReply, TextRequest
from arr_fast.errors import ArrFastError
from arr_fast.replay import Replayer

if TYPE_CHECKING:
    from arr_fast.judge import Judge

_BY_PATCH = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe")
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids")


@dataclass(frozen=True, slots=True)
class _Prepared:
    place: int
    request: TextRequest
    inputs: dict[str, Tensor]

    @property
    def length(self) -> int:
        return int(self.inputs["input_ids"].shape[1])


class LocalBackend:
    """The judge's own model as a writer. It holds the engine's lock while it writes.

    Args:
        judge: Whose model writes.
        batch_size: Requests per call of generate.
        constrained: Hold answers that are lists of criteria to their JSON form.
    """

    def __init__(self, judge: Judge, *, batch_size: int = 8, constrained: bool = True) -> None:
        self.judge = judge
        self.batch_size = batch_size
        self.constrained = constrained
        loaded = judge.engine.loaded
        self._model = loaded.model
        self._tokenizer = loaded.adapter.tokenizer
        self._replayer = Replayer(loaded.model, loaded.adapter.image_processor)
        self._masks: TokenMasks | None = None

    @property
    def identity(self) -> str:
        """Model, revision, number format, weights epoch, and whether answers are held to JSON."""
        loaded = self.judge.engine.loaded
        return ":".join(
            [
                *("local", loaded.name, loaded.revision, str(loaded.dtype)),
                *(str(loaded.quantization), str(self.judge.engine.epoch), str(self.constrained)),
            ]
        )

    def generate(self, requests: Sequence[TextRequest], on_result: OnResult) -> None:
        """Answers requests in batches of like length; see `TextBackend`."""
        if self.judge.stats()["asleep"]:
            raise ArrFastError("the judge sleeps; wake it before it writes")
        with self.judge.engine.lock, self._plain_attention():
            groups: dict[Any, list[_Prepared]] = {}
            for place, request in enumerate(requests):
                try:
                    prepared = self._prepare(place, request)
                except ArrFastError as error:
                    on_result(place, TextBackendError(f"request {place}: {error}"))
                    continue
                groups.setdefault(self._shape(prepared), []).append(prepared)
            for group in groups.values():
                group.sort(key=lambda each: each.length)
                for start in range(0, len(group), self.batch_size):
                    self._run(group[start : start + self.batch_size], on_result)

    def _prepare(self, place: int, request: TextRequest) -> _Prepared:
        engine = self.judge.engine
        features = engine.image_features(request.images)
        counts = [features[image.content_hash].count for image in request.images]
        runs = engine.prompts.encode(request.parts, counts)
        ids = np.concatenate([run.ids for run in runs])
        limit = int(engine.adapter.text_config.max_position_embeddings)
        if len(ids) + request.max_tokens > limit:
            raise ArrFastError(
                f"the prompt has {len(ids)} tokens and the answer up to {request.max_tokens}; "
                f"the model's context holds {limit}"
            )
        shown = [request.images[run.image] for run in runs if run.image >= 0]
        return _Prepared(place, request, self._replayer.model_inputs(ids, shown))

    def _shape(self, prepared: _Prepared) -> Any:
        """Requests of one batch have image tensors that can be joined along their first axis."""
        pixels = prepared.inputs.get("pixel_values")
        if pixels is None or self._model.config.model_type in _BY_PATCH:
            return pixels is None
        return tuple(pixels.shape[1:])

    def _run(self, batch: list[_Prepared], on_result: OnResult) -> None:
        """One batch; on lack of memory its halves, down to a single request."""
        started = time.perf_counter()
        try:
            answers = self._answers(batch)
        except (torch.OutOfMemoryError, MemoryError) as error:
            if len(batch) == 1:
                on_result(batch[0].place, TextBackendError(f"request {batch[0].place}: {error}"))
                return
            middle = len(batch) // 2
            self._run(batch[:middle], on_result)
            self._run(batch[middle:], on_result)
            return
        seconds = (time.perf_counter() - started) / len(batch)
        for prepared, (text, count, ended) in zip(batch, answers, strict=True):
            reply = TextReply(text, "stop" if ended else "length", prepared.length, count, seconds)
            on_result(prepared.place, reply)

    @torch.inference_mode()
    def _answers(self, batch: list[_Prepared]) -> list[tuple[str, int, bool]]:
        """(text, tokens, whether it ended by itself) of each request."""
        inputs = self._join(batch)
        start = inputs["input_ids"].shape[1]
        requests = [prepared.request for prepared in batch]
        limits = [request.max_tokens for request in requests]
        ends = self._end_tokens()
        output = self._model.generate(
            **inputs,
            max_new_tokens=max(limits),
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            no_repeat_ngram_size=0,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=self._pad_token(),
            logits_processor=self._processors(requests, start, ends[0]),
        )
        answers = []
        for row, limit in zip(output[:, start:].tolist(), limits, strict=True):
            length = next((n for n, token in enumerate(row) if token in ends), None)
            ended = length is not None and length <= limit
            kept = row[: min(limit, len(row) if length is None else length)]
            text = self._tokenizer.decode(kept, clean_up_tokenization_spaces=False)
            answers.append((text, len(kept), ended))
        return answers

    def _processors(
        self, requests: Sequence[TextRequest], start: int, end: int
    ) -> LogitsProcessorList:
        processors = LogitsProcessorList()
        if self.constrained and all(request.answer == "criteria" for request in requests):
            if self._masks is None:
                width = int(self.judge.engine.adapter.output_weight().shape[0])
                self._masks = TokenMasks(self._tokenizer, width)
            limits = [request.limit for request in requests]
            banned = [request.banned for request in requests]
            processors.append(CriteriaProcessor(self._masks, end, start, limits, banned))
        if any(request.temperature > 0.0 for request in requests):
            temperatures = [request.temperature for request in requests]
            processors.append(GumbelSampling(temperatures, [r.seed for r in requests]))
        return processors

    def _join(self, batch: list[_Prepared]) -> dict[str, Tensor]:
        """The inputs of a batch: text padded on the left, images in a row."""
        longest = max(prepared.length for prepared in batch)
        joined: dict[str, Tensor] = {}
        for name in batch[0].inputs:
            tensors = [prepared.inputs[name] for prepared in batch]
            if name in _PER_TOKEN:
                fill = self._pad_token() if name == "input_ids" else 0
                tensors = [
                    torch.nn.functional.pad(t, (longest - t.shape[1], 0), value=fill)
                    for t in tensors
                ]
            joined[name] = torch.cat(tensors)
        if "pixel_values" in joined and joined["pixel_values"].is_floating_point():
            joined["pixel_values"] = joined["pixel_values"].to(self._model.dtype)
        return joined

    def _end_tokens(self) -> list[int]:
        """The token that ends a turn first, then others that end an answer."""
        own = self._tokenizer.eos_token_id
        known = self._model.generation_config.eos_token_id
        more = known if isinstance(known, list) else [known]
        return [int(t) for t in dict.fromkeys([own, *more]) if t is not None]

    def _pad_token(self) -> int:
        pad = self._tokenizer.pad_token_id
        return int(self._end_tokens()[0] if pad is None else pad)

    @contextmanager
    def _plain_attention(self) -> Iterator[None]:
        """The decoder's attention as transformers generates with; the engine's own afterwards."""
        config = self._model.config.get_text_config()
        engine_attention = config._attn_implementation
        config._attn_implementation = "sdpa"
        try:
            yield
        finally:
            config._attn_implementation = engine_attention
