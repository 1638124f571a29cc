"""The engine: conversations in, label log-odds out, with caches, batching and retries."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arr_fast.engine.cache import ByteLRU, PrefixPool
from arr_fast.engine.config import EngineConfig, resolve_compile, resolve_prepack
from arr_fast.engine.families import ImageFeatures
from arr_fast.engine.model import LoadedModel
from arr_fast.engine.packed_linear import pack_linears, repack_linears
from arr_fast.engine.planner import (
    ImageTable,
    Path,
    build_paths,
    cut_item,
    plan_forest,
    token_batches,
)
from arr_fast.engine.runner import ForestRunner, LabelHead
from arr_fast.errors import PromptTooLongError
from arr_fast.images import CanonicalImage
from arr_fast.ops import resolve_impl
from arr_fast.prompts import Part, PromptEncoder

logger = logging.getLogger("arr_fast")

LabelIds = tuple[tuple[int, ...], ...]
# Label sets whose rows are kept gathered; a server's clients may bring any number of sets.
_MOST_HEADS = 64
# On a CPU: bytes of one forward's hidden states, and rows that one forward holds all the same.
_CACHED_BYTES = 4 << 20
_LEAST_CACHED_ROWS = 1024


@dataclass
class EngineCounters:
    """What an engine has done since it was made."""

    forwards: int = 0
    rows: int = 0
    path_tokens: int = 0
    verdicts: int = 0
    splits: int = 0
    image_encodes: int = 0
    vision_seconds: float = 0.0
    decoder_seconds: float = 0.0
    plan_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class PathResult:
    """Log-sum-exp of each label's logits at the end of one path, and of the vocabulary.

    Attributes:
        labels: float32 [L].
        vocab_lse: Natural-log normaliser, or NaN when label_mass was not asked for.
    """

    labels: np.ndarray
    vocab_lse: float


@dataclass
class _Pending:
    """Label logits still on the device, with the paths they belong to."""

    where: list[tuple[int, int]] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)
    lse: list[Tensor] = field(default_factory=list)


class Engine:
    """Scores conversations with one loaded model. Calls are serialised by a lock.

    Args:
        loaded: The model.
        config: Settings.
    """

    def __init__(self, loaded: LoadedModel, config: EngineConfig | None = None) -> None:
        self.loaded = loaded
        self.config = config or EngineConfig()
        self.adapter = loaded.adapter
        self.impl = resolve_impl(self.config.impl, str(loaded.device))
        self.compiled = resolve_compile(self.config.compile, loaded.device)
        self.prompts = PromptEncoder(
            self.adapter.tokenizer,
            image_token=self.adapter.image_token,
            expand_image=self.adapter.expand_image,
        )
        self.epoch = 0
        self.counters = EngineCounters()
        self.features_cache: ByteLRU[ImageFeatures] = ByteLRU(self.config.feature_cache_bytes)
        self.pool = self._make_pool()
        self._heads: dict[tuple[LabelIds, bool], LabelHead] = {}
        self.lock = threading.RLock()
        if resolve_prepack(self.config.prepack, loaded):
            pack_linears(self.adapter.layers)
        self.runner = self._make_runner()

    def image_features(
        self, images: Sequence[CanonicalImage], failed: dict[str, BaseException] | None = None
    ) -> dict[str, ImageFeatures]:
        """Features of some images, from the cache or the vision tower.

        Args:
            images: Any images; equal content is encoded once.
            failed: Takes content hash -> error of images that not even alone find memory; without
                it the first of them raises.

        Returns:
            content hash -> features.
        """
        found: dict[str, ImageFeatures] = {}
        missing: dict[str, CanonicalImage] = {}
        settings = self.adapter.settings_hash()
        for image in images:
            key = image.content_hash
            if key in found or key in missing:
                continue
            features = self.features_cache.get((key, settings, self.epoch))
            if features is None:
                missing[key] = image
            else:
                found[key] = features
        todo = list(missing.values())
        patches = [self.adapter.vision_tokens(image) for image in todo]
        started = time.perf_counter()
        for batch in token_batches(patches, self.config.max_vision_patches):
            encoded = self._encode_images([todo[i] for i in batch])
            for i, result in zip(batch, encoded, strict=True):
                key = todo[i].content_hash
                if isinstance(result, ImageFeatures):
                    found[key] = result
                    self.features_cache.put((key, settings, self.epoch), result)
                elif failed is None:
                    raise result
                else:
                    failed[key] = result
        self.counters.image_encodes += len(todo)
        self.counters.vision_seconds += time.perf_counter() - started
        return found

    def paths(
        self,
        parts: Sequence[Part],
        leaves: Sequence[str],
        images: Sequence[CanonicalImage],
        features: dict[str, ImageFeatures],
        table: ImageTable,
        name: str,
    ) -> list[Path]:
        """Conversations of one item that share everything up to their last image.

        Args:
            parts: The shared part; image slots index `images`.
            leaves: What each conversation adds.
            images: The item's images, as the slots number them.
            features: Content hash -> features, for all of them.
            table: The call's image numbers.
            name: What to call the item in an error.

        Raises:
            PromptTooLongError: A path is longer than the model's context.
        """
        shown = [features[image.content_hash] for image in images]
        runs, tails = self.prompts.encode_leaves(parts, leaves, [f.count for f in shown])
        positions = self.adapter.positions(runs, [f.grid for f in shown])
        paths = build_paths(runs, tails, positions, images, table)
        limit = int(self.adapter.text_config.max_position_embeddings)
        longest = max(len(path.sequence) for path in paths)
        if longest > limit:
            raise PromptTooLongError(
                f"{name}: the prompt has {longest} tokens, the model's context holds {limit}"
            )
        return paths

    def score(
        self,
        items: Sequence[Sequence[Path]],
        labels: LabelIds,
        table: ImageTable,
        features: dict[str, ImageFeatures],
        label_mass: bool = False,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[PathResult] | BaseException]:
        """Reads the labels at the end of every path.

        Args:
            items: Paths by item; an item that fails does not take others down.
            labels: Token variants of each label.
            table: The call's image numbers.
            features: Content hash -> features.
            label_mass: Also read the vocabulary's log-sum-exp.
            progress: Told how many items each finished batch held.

        Returns:
            For each item its results in order, or the exception that it raised.
        """
        with self.lock:
            head = self._head(labels, label_mass)
            pending = _Pending()
            failed: dict[int, BaseException] = {}
            budget, piece = self._batch_rows()
            units = [
                unit for i, paths in enumerate(items) for unit in cut_item(i, paths, budget, piece)
            ]
            rows = [unit.rows for unit in units]
            for batch in token_batches(rows, piece):
                work = [(units[n].item, j) for n in batch for j in units[n].paths]
                self._run(items, work, head, table, features, pending, failed)
                if progress is not None:
                    progress(sum(units[n].is_last for n in batch))
            return self._collect(items, pending, failed)

    def reset_weights(self) -> None:
        """Call after the weights changed: nothing computed from the old ones is used again."""
        with self.lock:
            self.forget_weights()
            repack_linears(self.adapter.layers)

    def forget_weights(self) -> None:
        """Drops what was computed from the weights; packed copies of them stay."""
        with self.lock:
            self.epoch += 1
            self._heads.clear()
            self.clear_caches()

    def clear_caches(self) -> None:
        """Drops image features and cached prefixes."""
        with self.lock:
            self.features_cache.clear()
            self.pool.clear()

    def stats(self) -> dict[str, Any]:
        """Counters, cache statistics and choices."""
        counters = self.counters
        shared = 1 - counters.rows / counters.path_tokens if counters.path_tokens else 0.0
        return {
            "impl": self.impl,
            "compiled": self.compiled,
            "weights_epoch": self.epoch,
            **{name: getattr(counters, name) for name in counters.__dataclass_fields__},
            "tokens_not_recomputed": shared,
            "image_features": self.features_cache.stats.as_dict(),
            "prefix_kv": self.pool.stats.as_dict(),
        }

    def _encode_images(
        self, images: Sequence[CanonicalImage]
    ) -> Sequence[ImageFeatures | BaseException]:
        """One vision forward; on lack of memory its halves, down to a single image's error."""
        try:
            with torch.inference_mode():
                return self.adapter.encode_images(images)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            # The traceback holds the tensors of the forward.
            error.__traceback__ = None
            if len(images) == 1:
                return [error]
        if self.loaded.device.type == "cuda":
            torch.cuda.empty_cache()
        self.counters.splits += 1
        middle = len(images) // 2
        return [*self._encode_images(images[:middle]), *self._encode_images(images[middle:])]

    def _run(
        self,
        items: Sequence[Sequence[Path]],
        work: list[tuple[int, int]],
        head: LabelHead,
        table: ImageTable,
        features: dict[str, ImageFeatures],
        pending: _Pending,
        failed: dict[int, BaseException],
    ) -> None:
        """One forward; on lack of memory its halves, down to a single path."""
        try:
            logits, lse = self._forward([items[i][j] for i, j in work], head, table, features)
        except (torch.OutOfMemoryError, RuntimeError, MemoryError) as error:
            if not _is_out_of_memory(error):
                raise
            if len(work) == 1:
                failed[work[0][0]] = error
                return
            self.counters.splits += 1
            logger.warning("out of memory on %d paths; splitting the forest", len(work))
            error.__traceback__ = None
            if self.loaded.device.type == "cuda":
                torch.cuda.empty_cache()
            middle = _split_point(work)
            for half in (work[:middle], work[middle:]):
                self._run(items, half, head, table, features, pending, failed)
            return
        pending.where += work
        pending.logits.append(logits)
        pending.lse.append(lse)

    def _forward(
        self,
        paths: Sequence[Path],
        head: LabelHead,
        table: ImageTable,
        features: dict[str, ImageFeatures],
    ) -> tuple[Tensor, Tensor]:
        started = time.perf_counter()
        if self.compiled:
            self.pool.allocate()
        salt = f"{self.epoch}:{self.adapter.settings_hash()}".encode()
        plan = plan_forest(paths, table, features, self.pool, self.config.prefix_cache, salt)
        planned = time.perf_counter()
        try:
            result = self.runner.run(
                plan.forest, plan.features, plan.spans, head, self.pool, plan.store
            )
        except BaseException:
            self.pool.discard(plan.reserved)
            raise
        finally:
            self.pool.unpin()
        counters = self.counters
        counters.forwards += 1
        counters.rows += plan.forest.rows
        counters.path_tokens += sum(len(path.sequence) for path in paths)
        counters.verdicts += len(paths)
        counters.plan_seconds += planned - started
        counters.decoder_seconds += time.perf_counter() - planned
        return result

    def _collect(
        self,
        items: Sequence[Sequence[Path]],
        pending: _Pending,
        failed: dict[int, BaseException],
    ) -> list[list[PathResult] | BaseException]:
        """One copy from the device for the whole call."""
        results: list[list[Any]] = [[None] * len(paths) for paths in items]
        if pending.where:
            logits = torch.cat(pending.logits).cpu().numpy()
            lse = torch.cat(pending.lse).cpu().numpy()
            for number, (i, j) in enumerate(pending.where):
                mass = float(lse[number]) if len(lse) else float("nan")
                results[i][j] = PathResult(logits[number], mass)
        return [failed[i] if i in failed else results[i] for i in range(len(items))]

    def _head(self, labels: LabelIds, label_mass: bool) -> LabelHead:
        key = (labels, label_mass)
        if key not in self._heads:
            if len(self._heads) >= _MOST_HEADS:
                self._heads.pop(next(iter(self._heads)))
            weight = self.adapter.output_weight()
            flat = [token for variants in labels for token in variants]
            bounds = np.cumsum([0, *(len(variants) for variants in labels)]).astype(np.int32)
            self._heads[key] = LabelHead(
                rows=weight[torch.tensor(flat, device=weight.device)].contiguous(),
                ptr=torch.from_numpy(bounds).to(weight.device),
                vocab=weight if label_mass else weight[:0],
            )
        return self._heads[key]

    def _batch_rows(self) -> tuple[int, int]:
        """(rows that one forward may hold, rows from which on work is cut where that is free).

        On a CPU one forward's rows should stay in the cache; a GPU wants as many as fit.
        """
        if self.config.max_batch_rows is not None:
            return self.config.max_batch_rows, self.config.max_batch_rows
        on_gpu = self.loaded.device.type == "cuda"
        memory = self.config.activation_bytes or 2 << 30
        if self.config.activation_bytes is None and on_gpu:
            memory = torch.cuda.mem_get_info(self.loaded.device)[0] // 2
        budget = max(1, memory // self.row_bytes())
        if on_gpu:
            return budget, budget
        hidden = int(self.adapter.text_config.hidden_size) * self.loaded.dtype.itemsize
        return budget, min(budget, max(_LEAST_CACHED_ROWS, _CACHED_BYTES // hidden))

    def row_bytes(self) -> int:
        """Bytes of activations that one row needs at the widest point of a decoder layer."""
        config = self.adapter.text_config
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        width = int(getattr(config, "intermediate_size", 0) or 0)
        experts = int(getattr(config, "num_experts_per_tok", 0) or 0)
        width = max(width, experts * int(getattr(config, "moe_intermediate_size", 0) or 0))
        attention = 4 * config.hidden_size + self.adapter.head_dim * 4 * (heads + kv_heads)
        mlp = 3 * config.hidden_size + 3 * width
        return int(max(attention, mlp)) * self.loaded.dtype.itemsize

    def _make_pool(self) -> PrefixPool:
        config = self.adapter.text_config
        budget = 0 if self.config.prefix_cache == "off" else self.config.prefix_cache_bytes
        return PrefixPool(
            layers=len(self.adapter.layers),
            kv_heads=config.num_key_value_heads,
            head_dim=self.adapter.head_dim,
            budget=budget,
            dtype=self.loaded.dtype,
            device=self.loaded.device,
        )

    def _make_runner(self) -> ForestRunner:
        layers = list(self.adapter.layers)
        calls: list[Any] = layers
        if self.compiled:
            calls = [torch.compile(layer, dynamic=False) for layer in layers]
        return ForestRunner(self.adapter, self.impl, calls, pad=self.compiled)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    text = str(error)
    return "DefaultCPUAllocator" in text or "not enough memory" in text or "out of memory" in text


def _split_point(work: list[tuple[int, int]]) -> int:
    """The middle of the work, moved to a border between items where there is one."""
    middle = len(work) // 2
    borders = [n for n in range(1, len(work)) if work[n][0] != work[n - 1][0]]
    return min(borders, key=lambda n: abs(n - middle)) if borders else middle
