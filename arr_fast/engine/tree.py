"""The prefix tree: what a judge reads, with every shared run of tokens held once.

A sequence is one root-to-leaf path: token ids, positions, and for image features which image and
which feature of it. Two tokens are the same only if all four agree; ids alone would merge the
placeholders of different images of equal size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

MIN_SHARED = 16


@dataclass(frozen=True, slots=True)
class TokenSequence:
    """One conversation, ready to be packed.

    Attributes:
        ids: int64 [T] token ids.
        keys: int64 [T]; the token id for text, a negative number unique to (image, feature) for an
            image feature.
        positions: int64 [P, T].
    """

    ids: np.ndarray
    keys: np.ndarray
    positions: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(slots=True)
class Segment:
    """A run of tokens that all its readers share.

    Attributes:
        parent: Index of the parent segment, or -1.
        begin: Depth of the first token (tokens on the path before this segment).
        end: Depth after the last token.
        sequence: Index of a sequence that runs through the segment; it supplies the tokens.
        children: Indices of the child segments.
    """

    parent: int
    begin: int
    end: int
    sequence: int
    children: list[int] = field(default_factory=list)

    def __len__(self) -> int:
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """A forest of segments over a list of sequences.

    Attributes:
        sequences: The sequences, as given.
        segments: Parents before children; siblings in order of their first sequence.
        roots: Indices of the root segments.
        ends: For each sequence the segment that holds its last token.
    """

    sequences: tuple[TokenSequence, ...]
    segments: tuple[Segment, ...]
    roots: tuple[int, ...]
    ends: tuple[int, ...]

    @property
    def tokens(self) -> int:
        """Tokens that are computed when nothing is cached."""
        return sum(len(segment) for segment in self.segments)


def build_tree(sequences: Sequence[TokenSequence], min_shared: int = MIN_SHARED) -> PrefixTree:
    """Builds the tree of longest common prefixes.

    Args:
        sequences: At least one non-empty sequence each; equal sequences share their leaf.
        min_shared: A run shared by siblings but shorter than this is copied into each of them, so
            that criteria with alike openings do not fragment the tree.

    Returns:
        The tree; every path from a root to `ends[i]` spells sequence i.

    Raises:
        ValueError: An empty sequence.
    """
    for number, sequence in enumerate(sequences):
        if not len(sequence):
            raise ValueError(f"sequence {number} is empty")
    segments: list[Segment] = []
    ends = [-1] * len(sequences)
    roots: list[int] = []
    # Work items: (members, depth where the next segment begins, depth known to be shared, parent).
    stack = [(members, 0, 0, -1) for members in reversed(_split(sequences, range(len(ends)), 0))]
    while stack:
        members, begin, known, parent = stack.pop()
        shared = _common_depth(sequences, members, known)
        ends_here = [m for m in members if len(sequences[m]) == shared]
        goes_on = [m for m in members if len(sequences[m]) > shared]
        keep = not goes_on or bool(ends_here) or shared - begin >= min_shared
        if keep and shared > begin:
            index = len(segments)
            segments.append(Segment(parent, begin, shared, members[0]))
            (roots if parent < 0 else segments[parent].children).append(index)
            for member in ends_here:
                ends[member] = index
            begin, parent = shared, index
        for group in reversed(_split(sequences, goes_on, shared)):
            stack.append((group, begin, shared, parent))
    return PrefixTree(tuple(sequences), tuple(segments), tuple(roots), tuple(ends))


def _split(
    sequences: Sequence[TokenSequence], members: Sequence[int], depth: int
) -> list[list[int]]:
    """Groups sequences by their token at a depth, in order of first appearance."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for member in members:
        sequence = sequences[member]
        token = (int(sequence.keys[depth]), *sequence.positions[:, depth].tolist())
        groups.setdefault(token, []).append(member)
    return list(groups.values())


def _common_depth(sequences: Sequence[TokenSequence], members: Sequence[int], known: int) -> int:
    """Depth up to which all members agree; they are known to agree up to `known`."""
    first = sequences[members[0]]
    limit = min(len(sequences[m]) for m in members)
    for member in members[1:]:
        other = sequences[member]
        same = first.keys[known:limit] == other.keys[known:limit]
        if first.positions is not other.positions:
            same &= (first.positions[:, known:limit] == other.positions[:, known:limit]).all(0)
        if not same.all():
            limit = known + int(same.argmin())
    return limit
