"""Constrained decoding: only {"criteria": ["...", "..."]} can be written, without repetitions.

A byte-level automaton says which continuations keep the answer a prefix of a valid one; a token is
allowed if all of its bytes are. Its states are few, so the mask over the vocabulary is computed
once for each. Inside a criterion there are no quotes, backslashes or control characters: no escape
is ever needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor

from arr_fast.autorubric.answers import MAX_CRITERION, normal_form
from arr_fast.errors import UnsupportedModelError

OPEN, BETWEEN, CLOSE = b'{"criteria": ["', b'", "', b'"]}'
_QUOTE, _BACKSLASH, _SPACE = 0x22, 0x5C, 0x20
LONGEST = min(240, MAX_CRITERION)


@dataclass(frozen=True, slots=True)
class State:
    """Where an answer stands.

    Attributes:
        phase: "open" (the head), "text" (in a criterion), "edge" (after its closing quote), "end".
        place: Bytes of the head, or of the edge, that are written.
        more: Whether another criterion may follow.
        begun: Whether the criterion has a first letter.
        full: Whether the criterion must close now.
        closing: At the edge: b", " was chosen (False), or the end (True); None while both fit.
    """

    phase: str = "open"
    place: int = 0
    more: bool = True
    begun: bool = False
    full: bool = False
    closing: bool | None = None


class Automaton:
    """One answer, byte by byte.

    Args:
        limit: Most criteria.
        longest: Most bytes of a criterion; one token may go beyond.
    """

    def __init__(self, limit: int, longest: int = LONGEST) -> None:
        self.limit, self.longest = limit, longest
        self.state = State(more=limit > 1)
        self.texts: list[bytes] = []
        self.current = b""

    def advance(self, data: bytes) -> None:
        """Takes the bytes of a token that `step` allows."""
        for byte in data:
            before = self.state
            after = step(before, byte)
            assert after is not None, (before, byte)
            if before.phase == "text":
                if after.phase == "text":
                    self.current += bytes([byte])
                else:
                    self.texts.append(self.current)
                    self.current = b""
            if after.phase == "text" and before.phase != "text":
                after = State("text", more=len(self.texts) + 1 < self.limit)
            self.state = after
        if self.state.phase == "text" and len(self.current) >= self.longest:
            self.state = State("text", more=self.state.more, begun=True, full=True)


def step(state: State, byte: int) -> State | None:
    """The next state, or None where a byte does not fit."""
    if state.phase == "open":
        if byte != OPEN[state.place]:
            return None
        if state.place + 1 < len(OPEN):
            return State("open", state.place + 1, state.more)
        return State("text", more=state.more)
    if state.phase == "text":
        if byte == _QUOTE:
            return State("edge", 1, state.more) if state.begun else None
        if state.full or byte < _SPACE or byte == _BACKSLASH or byte == 0x7F:
            return None
        if not state.begun and byte == _SPACE:
            return None
        return State("text", more=state.more, begun=True)
    if state.phase == "edge":
        return _edge(state, byte)
    return None


def _edge(state: State, byte: int) -> State | None:
    for closing, literal in ((False, BETWEEN), (True, CLOSE)):
        fits = state.closing in (None, closing) and (closing or state.more)
        if fits and state.place < len(literal) and literal[state.place] == byte:
            if state.place + 1 < len(literal):
                return State("edge", state.place + 1, state.more, closing=closing)
            return State("end") if closing else State("text", more=state.more)
    return None


class TokenMasks:
    """Which tokens fit in which state, for one vocabulary.

    Args:
        tokenizer: A byte-level fast tokenizer.
        size: Width of the logits.

    Raises:
        UnsupportedModelError: The vocabulary is not byte-level.
    """

    def __init__(self, tokenizer: Any, size: int) -> None:
        self.tokens = token_bytes(tokenizer, size)
        self._masks: dict[State, np.ndarray] = {}
        # Tokens that can complete a criterion: with a quote in them, or a final stop at their end.
        self.completing = [
            (number, token.partition(b'"')[0])
            for number, token in enumerate(self.tokens)
            if token is not None and (b'"' in token or token.endswith((b".", b"!")))
        ]

    def allowed(self, state: State) -> np.ndarray:
        """bool [size]."""
        if state not in self._masks:
            mask = np.fromiter(
                (token is not None and _fits(state, token) for token in self.tokens),
                dtype=bool,
                count=len(self.tokens),
            )
            self._masks[state] = mask
        return self._masks[state]


def _fits(state: State, token: bytes) -> bool:
    current: State | None = state
    for byte in token:
        current = step(current, byte) if current is not None else None
    return bool(token) and current is not None


def token_bytes(tokenizer: Any, size: int) -> list[bytes | None]:
    """The bytes that each token writes; None for control tokens and unused ids."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    byte_of = {character: byte for byte, character in bytes_to_unicode().items()}
    added = set(tokenizer.get_added_vocab())
    tokens: list[bytes | None] = [None] * size
    for text, number in tokenizer.get_vocab().items():
        if number < size and text not in added and all(c in byte_of for c in text):
            tokens[number] = bytes(byte_of[c] for c in text)
    known = {token for token in tokens if token is not None and len(token) == 1}
    lacking = {bytes([b]) for b in {*OPEN, *BETWEEN, *CLOSE}} - known
    if lacking:
        raise UnsupportedModelError(
            type(tokenizer).__name__, reason="its vocabulary is not byte-level, JSON cannot be held"
        )
    return tokens


class CriteriaProcessor(LogitsProcessor):
    """Masks logits so that every row of a batch writes a list of criteria.

    Args:
        masks: Of the vocabulary.
        eos: Token that ends an answer.
        prompt_length: Tokens before the answers.
        limits: Most criteria, per row.
        banned: Per row, criteria that must not be written.
    """

    def __init__(
        self,
        masks: TokenMasks,
        eos: int,
        prompt_length: int,
        limits: Sequence[int],
        banned: Sequence[Sequence[str]],
    ) -> None:
        self._masks, self._eos, self._start = masks, eos, prompt_length
        self._rows = [Automaton(limit) for limit in limits]
        self._banned = [{normal_form(text) for text in texts} for texts in banned]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V] with what does not fit at -inf."""
        if input_ids.shape[1] > self._start:
            for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
                data = self._masks.tokens[token]
                # After its end a row is padded.
                if row.state.phase != "end" and data is not None:
                    row.advance(data)
        allowed = np.stack([self._allowed(n) for n in range(len(self._rows))])
        mask = torch.from_numpy(allowed).to(scores.device)
        return scores.masked_fill(~mask, float("-inf"))

    def _allowed(self, number: int) -> np.ndarray:
        row = self._rows[number]
        if row.state.phase == "end":
            only = np.zeros(len(self._masks.tokens), dtype=bool)
            only[self._eos] = True
            return only
        mask = self._masks.allowed(row.state)
        if row.state.phase != "text" or row.state.full:
            return mask
        return self._without_repetitions(row, self._banned[number], mask)

    def _without_repetitions(
        self, row: Automaton, banned: set[str], mask: np.ndarray
    ) -> np.ndarray:
        """Refuses tokens that complete a criterion that is banned or written already."""
        taken = banned | {normal_form(text.decode("utf-8", "replace")) for text in row.texts}
        written = normal_form(row.current.decode("utf-8", "replace"))
        if not any(text.startswith(written) for text in taken):
            return mask
        changed = mask.copy()
        for token, body in self._masks.completing:
            if mask[token]:
                whole = normal_form((row.current + body).decode("utf-8", "replace"))
                changed[token] = whole not in taken
        return changed if changed.any() else mask


class GumbelSampling(LogitsProcessor):
    """Makes greedy search sample: argmax(scores / T + Gumbel noise), each row by its own seed.

    What a row draws depends on its seed and step alone, not on the batch around it.

    Args:
        temperatures: Per row; 0 stays greedy.
        seeds: Per row.
    """

    def __init__(self, temperatures: Sequence[float], seeds: Sequence[int]) -> None:
        self._temperatures = temperatures
        self._generators = [torch.Generator().manual_seed(seed) for seed in seeds]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [B, V]."""
        rows = []
        for row, temperature, generator in zip(
            scores, self._temperatures, self._generators, strict=True
        ):
            uniform = torch.rand(len(row), generator=generator, dtype=torch.float64)
            if temperature == 0.0:
                rows.append(row)
                continue
            noise = -torch.log(-torch.log(uniform.clamp(1e-300, 1 - 1e-16)))
            rows.append((row.double() / temperature + noise.to(row.device)).to(row.dtype))
        return torch.stack(rows)
