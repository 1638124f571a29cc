"""Caches with byte budgets: image features, and the prefix-KV pool.

Every key holds what the value depends on: image content, processor settings, token ids, positions
and the weights epoch. A change in any of them is a miss; nothing stale can be returned.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from arr_fast.engine.forest import PoolRun


class Sized(Protocol):
    """A value that knows how many bytes it holds."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""


V = TypeVar("V", bound=Sized)


@dataclass(slots=True)
class CacheStats:
    """Counters of one cache; `bytes` never exceeds `budget`."""

    budget: int
    bytes: int = 0
    hits: int = 0
    misses: int = 0
    evictions: int = 0
    rejected: int = 0

    def as_dict(self) -> dict[str, int | float]:
        """The counters with the hit rate (0 when nothing was asked)."""
        asked = self.hits + self.misses
        return {
            "budget_bytes": self.budget,
            "bytes": self.bytes,
            "hits": self.hits,
            "misses": self.misses,
            "evictions": self.evictions,
            "rejected": self.rejected,
            "hit_rate": self.hits / asked if asked else 0.0,
        }


class ByteLRU(Generic[V]):
    """Least-recently-used cache bounded by the bytes of its values.

    Args:
        budget: Most bytes held; 0 keeps nothing.
    """

    def __init__(self, budget: int) -> None:
        if budget < 0:
            raise ValueError(f"budget must be at least 0 bytes, got {budget}")
        self.stats = CacheStats(budget)
        self._entries: OrderedDict[Hashable, V] = OrderedDict()

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: Hashable) -> V | None:
        """The value, now the most recently used, or None."""
        value = self._entries.get(key)
        if value is None:
            self.stats.misses += 1
            return None
        self._entries.move_to_end(key)
        self.stats.hits += 1
        return value

    def put(self, key: Hashable, value: V) -> None:
        """Keeps a value, evicting the least recently used; one over the budget is not kept."""
        size = value.nbytes
        if size > self.stats.budget:
            self.stats.rejected += 1
            return
        old = self._entries.pop(key, None)
        if old is not None:
            self.stats.bytes -= old.nbytes
        while self.stats.bytes + size > self.stats.budget:
            _, evicted = self._entries.popitem(last=False)
            self.stats.bytes -= evicted.nbytes
            self.stats.evictions += 1
        self._entries[key] = value
        self.stats.bytes += size

    def clear(self) -> None:
        """Drops everything."""
        self._entries.clear()
        self.stats.bytes = 0


BLOCK = 16


class PrefixPool:
    """Cached keys and values of prompt prefixes, in blocks of 16 tokens, for all layers.

    A block is keyed by the chain of everything before it: token ids, positions, image contents,
    processor settings and weights epoch. Any prompt that starts alike finds it, wherever the tree
    happens to branch.

    Args:
        layers: Decoder layers.
        kv_heads: Key/value heads.
        head_dim: Head dimension.
        budget: Most bytes of keys and values; rounded down to whole blocks.
        dtype: Of keys and values.
        device: Where they live.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        head_dim: int,
        budget: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        row = 2 * layers * kv_heads * head_dim * torch.empty(0, dtype=dtype).element_size()
        self.block_bytes = row * BLOCK
        self.blocks = budget // self.block_bytes
        self.stats = CacheStats(budget)
        self._shape = (layers, self.blocks * BLOCK, kv_heads, head_dim)
        self._dtype, self._device = dtype, device
        self._k: Tensor | None = None
        self._v: Tensor | None = None
        self._empty = torch.empty((0, kv_heads, head_dim), dtype=dtype, device=device)
        self._slots: OrderedDict[bytes, int] = OrderedDict()
        self._free = list(range(self.blocks - 1, -1, -1))
        self._pinned: set[bytes] = set()

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """Keys and values [C, Hkv, D] of one layer; C is 0 until something is stored."""
        if self._k is None or self._v is None:
            return self._empty, self._empty
        return self._k[index], self._v[index]

    def allocate(self) -> None:
        """Takes the pool's memory now; compiled graphs then never see its shape change."""
        if self.blocks and self._k is None:
            # Both or neither: memory may end between them.
            k, v = (
                torch.zeros(self._shape, dtype=self._dtype, device=self._device) for _ in range(2)
            )
            self._k, self._v = k, v

    def lookup(self, chain: Sequence[bytes]) -> list[PoolRun]:
        """The cached blocks that lead a chain, joined where they are neighbours; pins them."""
        slots = []
        for key in chain:
            slot = self._slots.get(key)
            if slot is None:
                break
            slots.append(slot)
        for key in reversed(chain[: len(slots)]):
            self._slots.move_to_end(key)
            self._pinned.add(key)
        self.stats.hits += len(slots)
        self.stats.misses += len(chain) - len(slots)
        runs: list[PoolRun] = []
        for slot in slots:
            first = slot * BLOCK
            if runs and runs[-1].first + runs[-1].length == first:
                runs[-1] = PoolRun(runs[-1].first, runs[-1].length + BLOCK)
            else:
                runs.append(PoolRun(first, BLOCK))
        return runs

    def reserve(self, key: bytes) -> int | None:
        """A slot's first row for a new block, or None when all others are in use.

        The block must be written by the forward that is being planned.
        """
        if not self.blocks or key in self._slots:
            return None
        if not self._free and not self._evict():
            self.stats.rejected += 1
            return None
        self.allocate()
        slot = self._free.pop()
        self._slots[key] = slot
        self._pinned.add(key)
        self.stats.bytes += self.block_bytes
        return slot * BLOCK

    def discard(self, keys: Iterable[bytes]) -> None:
        """Takes back blocks whose forward failed before it wrote them."""
        for key in keys:
            slot = self._slots.pop(key, None)
            self._pinned.discard(key)
            if slot is not None:
                self._free.append(slot)
                self.stats.bytes -= self.block_bytes

    def unpin(self) -> None:
        """Ends a plan: its blocks may be evicted again."""
        self._pinned.clear()

    def clear(self) -> None:
        """Drops every block and the memory behind them."""
        self._slots.clear()
        self._pinned.clear()
        self._free = list(range(self.blocks - 1, -1, -1))
        self._k = self._v = None
        self.stats.bytes = 0

    def _evict(self) -> bool:
        for key in self._slots:
            if key not in self._pinned:
                self._free.append(self._slots.pop(key))
                self.stats.bytes -= self.block_bytes
                self.stats.evictions += 1
                return True
        return False


def chain_keys(
    ids: np.ndarray, positions: np.ndarray, salt: bytes, images: Sequence[tuple[int, bytes]]
) -> list[bytes]:
    """Keys of the whole blocks of a path.

    Args:
        ids: int64 [T].
        positions: int64 [P, T].
        salt: Weights epoch and processor settings.
        images: (row of the first feature, image content hash), in order.

    Returns:
        One 32-byte key per whole block, each a hash over everything up to its end.
    """
    keys = []
    state = hashlib.sha256(salt)
    waiting = list(images)
    for end in range(BLOCK, len(ids) + 1, BLOCK):
        span = slice(end - BLOCK, end)
        state.update(ids[span].tobytes())
        state.update(np.ascontiguousarray(positions[:, span]).tobytes())
        while waiting and waiting[0][0] < end:
            row, content = waiting.pop(0)
            state.update(row.to_bytes(8, "little") + content)
        keys.append(state.digest())
    return keys
