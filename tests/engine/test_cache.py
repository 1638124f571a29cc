"""Caches never exceed their budget and never return what was made from something else."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from arr_fast.engine.cache import BLOCK, ByteLRU, PrefixPool, chain_keys
from arr_fast.engine.forest import PoolRun


@dataclass
class Value:
    nbytes: int


@settings(max_examples=200, deadline=None)
@given(
    st.integers(0, 50),
    st.lists(st.tuples(st.integers(0, 8), st.integers(1, 40)), min_size=1, max_size=60),
)
def test_lru_stays_within_its_budget(budget: int, operations: list[tuple[int, int]]) -> None:
    cache: ByteLRU[Value] = ByteLRU(budget)
    held: dict[int, int] = {}
    for key, size in operations:
        found = cache.get(key)
        assert found is None or found.nbytes == held[key]
        cache.put(key, Value(size))
        if size <= budget:
            held[key] = size
            assert cache.get(key) is not None
        assert cache.stats.bytes <= budget
    present = [k for k in held if cache.get(k) is not None]
    assert cache.stats.bytes == sum(held[k] for k in present)


def test_lru_evicts_the_least_recently_used() -> None:
    cache: ByteLRU[Value] = ByteLRU(30)
    for key in "abc":
        cache.put(key, Value(10))
    cache.get("a")
    cache.put("d", Value(10))
    assert [key for key in "abcd" if cache.get(key)] == ["a", "c", "d"]
    assert cache.stats.evictions == 1
    with pytest.raises(ValueError, match="budget must be at least 0"):
        ByteLRU(-1)


def pool(blocks: int) -> PrefixPool:
    made = PrefixPool(2, 2, 4, 0, torch.float32, torch.device("cpu"))
    budget = made.block_bytes * blocks + 5
    return PrefixPool(2, 2, 4, budget, torch.float32, torch.device("cpu"))


def test_pool_finds_the_longest_cached_lead_and_joins_neighbours() -> None:
    cache = pool(4)
    keys = [b"0", b"1", b"2"]
    firsts = [cache.reserve(key) for key in keys[:2]]
    assert firsts == [0, BLOCK]
    assert cache.lookup(keys) == [PoolRun(0, 2 * BLOCK)]
    assert cache.lookup([b"x", b"0"]) == []
    assert (cache.stats.hits, cache.stats.misses) == (2, 3)


def test_pool_evicts_the_oldest_block_that_no_plan_uses() -> None:
    cache = pool(2)
    cache.reserve(b"old")
    cache.reserve(b"new")
    # Both are pinned by the plan that reserved them.
    assert cache.reserve(b"third") is None
    cache.unpin()
    cache.lookup([b"old"])
    assert cache.reserve(b"third") is not None
    assert cache.lookup([b"new"]) == []
    assert len(cache.lookup([b"old"])) == 1
    assert cache.stats.bytes == 2 * cache.block_bytes <= cache.stats.budget


def test_pool_takes_back_blocks_that_were_never_written() -> None:
    cache = pool(2)
    cache.reserve(b"a")
    cache.discard([b"a"])
    assert cache.lookup([b"a"]) == [] and cache.stats.bytes == 0
    assert cache.reserve(b"b") is not None


def test_a_pool_that_was_half_allocated_is_allocated_again(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, zeros, calls = pool(2), torch.zeros, []

    def runs_out(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("simulated")
        return zeros(*args, **kwargs)

    monkeypatch.setattr(torch, "zeros", runs_out)
    with pytest.raises(torch.OutOfMemoryError):
        cache.reserve(b"a")
    assert cache.reserve(b"a") == 0
    keys, values = cache.layer(0)
    assert keys.shape == values.shape == (2 * BLOCK, 2, 4)


def keys(
    ids: np.ndarray, positions: np.ndarray | None = None, salt: bytes = b"s", image: bytes = b"i"
) -> list[bytes]:
    where = np.arange(len(ids))[None] if positions is None else positions
    return chain_keys(ids, where, salt, [(20, image)])


def test_chain_keys_depend_on_everything_before_them() -> None:
    ids = np.arange(50)
    base = keys(ids)
    assert len(base) == 3 and len(set(base)) == 3
    assert keys(np.append(ids, 7)) == base
    changed = ids.copy()
    changed[17] = 99
    assert [a == b for a, b in zip(keys(changed), base, strict=True)] == [True, False, False]
    shifted = np.arange(50)[None] + (np.arange(50) >= 40)
    assert [a == b for a, b in zip(keys(ids, shifted), base, strict=True)] == [True, True, False]
    other_image = keys(ids, image=b"j")
    assert [a == b for a, b in zip(other_image, base, strict=True)] == [True, False, False]
    assert not set(keys(ids, salt=b"t")) & set(base)
