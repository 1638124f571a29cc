"""Runs a packed forest: embeddings, rotary, decoder layers, verdict head.

The runner owns the decoder loop. Layers are transformers' own modules, called unmodified, except
the last: it computes keys and values for all rows, and everything else only for the rows that are
read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from arr_fast.engine.attention import ForestTables, attend
from arr_fast.engine.cache import PrefixPool
from arr_fast.engine.families import FamilyAdapter, ImageFeatures
from arr_fast.engine.forest import PackedForest, bucket_rows
from arr_fast.ops import verdict_head
from arr_fast.ops.tiling import SPLIT_TOKENS, should_split, tile_rows

LayerCall = Callable[..., Tensor]


@dataclass(frozen=True)
class LabelHead:
    """The rows of the output embedding that are read, and nothing else of it.

    Attributes:
        rows: [R, H] gathered label rows.
        ptr: int32 [L + 1], label l owns rows ptr[l] to ptr[l + 1].
        vocab: [V, H] when label_mass is asked for, else [0, H].
    """

    rows: Tensor
    ptr: Tensor
    vocab: Tensor


@dataclass(frozen=True)
class StorePlan:
    """Rows of a forest whose keys and values go to the prefix pool.

    Attributes:
        rows: int64 [S], rows of the forest.
        slots: int64 [S], rows of the pool.
    """

    rows: np.ndarray
    slots: np.ndarray


class ForestRunner:
    """Runs forests through one model.

    Args:
        adapter: The model's family adapter.
        impl: Resolved impl of the ops.
        layer_calls: One callable per decoder layer (compiled or not).
        pad: Pad row counts to buckets, so that compiled graphs see few shapes.
    """

    def __init__(
        self,
        adapter: FamilyAdapter,
        impl: str,
        layer_calls: Sequence[LayerCall],
        pad: bool = False,
    ) -> None:
        self.adapter = adapter
        self.impl = impl
        self.layer_calls = list(layer_calls)
        self.pad = pad
        self.device = next(adapter.model.parameters()).device

    @torch.inference_mode()
    def run(
        self,
        forest: PackedForest,
        features: Sequence[ImageFeatures],
        spans: Sequence[tuple[int, int, int]],
        head: LabelHead,
        pool: PrefixPool,
        store: StorePlan,
    ) -> tuple[Tensor, Tensor]:
        """One forward over a forest.

        Args:
            forest: The packed rows.
            features: The images that appear in it.
            spans: (first row, first feature, length) of each stretch of image rows.
            head: Label rows to read.
            pool: Cached prefixes that the forest's runs refer to.
            store: Rows to keep in the pool.

        Returns:
            (label logits float32 [S, L], vocabulary log-sum-exp float32 [S] or [0]), on the
            device, one row per sequence.
        """
        hidden = self._embed(forest, features, spans)
        positions = self._device(_padded(forest.positions, hidden.shape[0]))
        cos_sin = self.adapter.rotary(hidden[None], positions)
        tables = self._tables(forest, hidden.shape[0], store)
        levels = zip(*(f.deepstack for f in features), strict=True)
        deepstack = [torch.cat(level) for level in levels]
        layers = self.adapter.layers
        for index, call in enumerate(self.layer_calls[:-1]):
            forest_tables = tables._replace(
                k_pool=pool.layer(index)[0], v_pool=pool.layer(index)[1]
            )
            hidden = call(hidden[None], position_embeddings=cos_sin, forest=forest_tables)[0]
            if index < len(deepstack):
                for row, source, length in spans:
                    hidden[row : row + length] += deepstack[index][source : source + length]
        last = len(layers) - 1
        forest_tables = tables._replace(k_pool=pool.layer(last)[0], v_pool=pool.layer(last)[1])
        read_rows, back = np.unique(forest.read_rows, return_inverse=True)
        rows = read_rows_of_last_layer(
            layers[last],
            hidden,
            self._device(read_rows),
            cos_sin,
            forest_tables._replace(tiles=self._device(forest.read_tiles(read_rows))),
        )
        logits, mass = self._head(rows, head)
        order = self._device(back)
        return logits[order], mass[order] if len(mass) else mass

    def _device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor.to(self.device)

    def _embed(
        self,
        forest: PackedForest,
        features: Sequence[ImageFeatures],
        spans: Sequence[tuple[int, int, int]],
    ) -> Tensor:
        total = bucket_rows(forest.rows) if self.pad else forest.rows
        hidden: Tensor = self.adapter.decoder.embed_tokens(self._device(_padded(forest.ids, total)))
        if spans:
            embeds = torch.cat([f.embeds for f in features])
            for row, source, length in spans:
                hidden[row : row + length] = embeds[source : source + length]
        return hidden

    def _tables(self, forest: PackedForest, total: int, store: StorePlan) -> ForestTables:
        own = np.arange(total, dtype=np.int32)
        own[: forest.rows] = forest.own_start
        runs, tiles = self._runs_and_tiles(forest)
        rows, slots = store.rows, store.slots
        if self.pad:
            # Empty runs and tiles change nothing; a block stored twice is the same block.
            runs, tiles = (_padded_to_bucket(x, mode="constant") for x in (runs, tiles))
            rows, slots = (_padded_to_bucket(x, mode="edge") for x in (rows, slots))
        empty = torch.empty(0, device=self.device)
        return ForestTables(
            own_start=self._device(own),
            runs=self._device(runs),
            tiles=self._device(tiles),
            k_pool=empty,
            v_pool=empty,
            store_rows=self._device(rows),
            store_slots=self._device(slots),
            impl=self.impl,
        )

    def _runs_and_tiles(self, forest: PackedForest) -> tuple[np.ndarray, np.ndarray]:
        config = self.adapter.text_config
        kv_heads = config.num_key_value_heads
        group = config.num_attention_heads // kv_heads
        rows = tile_rows(self.impl, group, self.adapter.head_dim, self.device)
        tiles = forest.tiles(rows)
        if should_split(self.impl, len(tiles), forest.longest_path(), kv_heads, self.device):
            return forest.split_tiles(rows, SPLIT_TOKENS)
        return forest.runs, tiles

    def _head(self, rows: Tensor, head: LabelHead) -> tuple[Tensor, Tensor]:
        norm = self.adapter.decoder.norm
        result: tuple[Tensor, Tensor] = verdict_head(
            rows,
            norm.weight,
            float(norm.variance_epsilon),
            False,
            head.rows,
            head.ptr,
            head.vocab,
            self.impl if self.impl in ("torch", "triton", "reference") else "torch",
        )
        return result


def read_rows_of_last_layer(
    layer: Any,
    hidden: Tensor,
    rows: Tensor,
    cos_sin: tuple[Tensor, Tensor],
    forest: ForestTables,
) -> Tensor:
    """The last decoder layer, computed only where its output is read.

    Keys and values need every row; queries, the output projection and the MLP need only `rows`.

    Args:
        layer: A Llama-shaped decoder layer of transformers.
        hidden: [T, H].
        rows: int64 [N], the rows that are read.
        cos_sin: Rotary tables [1, T, D].
        forest: Tables whose tiles cover exactly `rows`.

    Returns:
        [N, H], the layer's output at `rows`.
    """
    attn = layer.self_attn
    x = layer.input_layernorm(hidden)
    dim = attn.head_dim
    k = attn.k_proj(x).unflatten(-1, (-1, dim))
    v = attn.v_proj(x).unflatten(-1, (-1, dim))
    q = attn.q_proj(x[rows]).unflatten(-1, (-1, dim))
    if hasattr(attn, "q_norm"):
        q, k = attn.q_norm(q), attn.k_norm(k)
    cos, sin = (table[0].unsqueeze(1) for table in cos_sin)
    q = _rotate(q, cos[rows], sin[rows])
    k = _rotate(k, cos, sin)
    q_all = q.new_zeros((len(hidden), *q.shape[1:])).index_copy(0, rows, q)
    scale = getattr(attn, "scaling", dim**-0.5)
    out = attend(q_all, k, v, forest, scale)[rows].flatten(1)
    residual = hidden[rows] + attn.o_proj(out)
    mlp = layer.mlp(layer.post_attention_layernorm(residual)[None])
    if isinstance(mlp, tuple):
        mlp = mlp[0]
    output: Tensor = residual + mlp[0]
    return output


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding in transformers' half-split convention."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _padded(array: np.ndarray, total: int) -> np.ndarray:
    """Zero-pads the last axis to `total`."""
    missing = total - array.shape[-1]
    if not missing:
        return array
    return np.pad(array, [(0, 0)] * (array.ndim - 1) + [(0, missing)])


def _padded_to_bucket(array: np.ndarray, mode: Literal["constant", "edge"]) -> np.ndarray:
    """Pads the first axis to a power of two of at least 8; an empty array stays empty."""
    if not len(array):
        return array
    missing = max(8, 1 << (len(array) - 1).bit_length()) - len(array)
    return np.pad(array, [(0, missing)] + [(0, 0)] * (array.ndim - 1), mode=mode)
