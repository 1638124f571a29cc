"""Encoded prompts are kept: a text encoder runs once per prompt, not once per epoch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from arr_fast.rpo.policies.base import Conditions, Policy
from arr_fast.rpo.prompts import Prompt, source_images


class ConditionsCache:
    """Least recently used conditions, in host memory.

    Args:
        policy: Encodes what is missing, all of a chunk at once.
        size: Most prompts that are kept; 0 keeps none.
        max_bytes: Most bytes that are kept.
    """

    def __init__(self, policy: Policy, size: int, max_bytes: int = 16_000_000_000) -> None:
        self._policy, self._size, self._max_bytes = policy, size, max_bytes
        self._bytes = 0
        self._kept: OrderedDict[int, dict[str, Tensor]] = OrderedDict()
        self.hits = self.misses = 0

    def of(self, prompts: Sequence[Prompt]) -> Conditions:
        """Conditions of P prompts on the policy's device."""
        rows: dict[int, dict[str, Tensor]] = {}
        missing: dict[int, Prompt] = {}
        for prompt in prompts:
            key = prompt.id
            if key in self._kept:
                self._kept.move_to_end(key)
                rows[key] = self._kept[key]
                self.hits += 1
            elif key not in missing:
                missing[key] = prompt
                self.misses += 1
        if missing:
            rows |= self._encode(missing)
        names = next(iter(rows.values()))
        return {
            name: torch.stack([rows[p.id][name] for p in prompts]).to(self._policy.device)
            for name in names
        }

    def _encode(self, missing: dict[int, Prompt]) -> dict[int, dict[str, Tensor]]:
        wanted = list(missing.values())
        encoded = self._policy.encode([p.text for p in wanted], source_images(wanted))
        found = {}
        for place, key in enumerate(missing):
            row = {
                name: tensor[place].detach().to("cpu", copy=True)
                for name, tensor in encoded.items()
            }
            found[key] = row
            self._kept[key] = row
            self._bytes += _bytes(row)
        while len(self._kept) > self._size or self._bytes > self._max_bytes:
            _, oldest = self._kept.popitem(last=False)
            self._bytes -= _bytes(oldest)
        return found


def _bytes(row: dict[str, Tensor]) -> int:
    return sum(tensor.untyped_storage().nbytes() for tensor in row.values())
