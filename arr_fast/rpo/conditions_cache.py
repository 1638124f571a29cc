"""Encoded prompts are kept: a text encoder runs once per prompt, not once per epoch."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from arr_fast.rpo.policies.base import Conditions, Policy
from arr_fast.rpo.prompts import Prompt


class ConditionsCache:
    """Least recently used conditions, in host memory.

    Args:
        policy: Encodes what is missing, all of a chunk at once.
        size: Most prompts that are kept; 0 keeps none.
    """

    def __init__(self, policy: Policy, size: int) -> None:
        self._policy, self._size = policy, size
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
        sources = [p.source for p in wanted if p.source is not None] or None
        encoded = self._policy.encode([p.text for p in wanted], sources)
        found = {}
        for place, key in enumerate(missing):
            row = {name: tensor[place].detach().cpu() for name, tensor in encoded.items()}
            found[key] = row
            if self._size:
                self._kept[key] = row
        while len(self._kept) > self._size:
            self._kept.popitem(last=False)
        return found
