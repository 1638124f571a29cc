"""The forest's tables as lists of sequences: what the packaged attention kernels take.

flash-attn and xFormers know pairs of (queries, keys), not trees. Rows that share their ancestors
form one sequence for the ancestors' part; every segment is one causal sequence for the own part.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Run = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Family:
    """Rows with one path of ancestors.

    Attributes:
        rows: Their numbers, ascending.
        path: (0 new | 1 pool, first row, length) of the ancestors, never of length 0.
    """

    rows: list[int]
    path: tuple[Run, ...]

    def gather(self, new: Tensor, pool: Tensor) -> Tensor:
        """The ancestors' keys or values [m, Hkv, D]."""
        return torch.cat([(pool if source else new)[a : a + n] for source, a, n in self.path])


@dataclass(frozen=True, slots=True)
class OwnPiece:
    """Queries row .. stop - 1 that see the keys start .. their own row."""

    start: int
    row: int
    stop: int


def families_of(runs: Tensor, tiles: Tensor) -> list[Family]:
    """Joins the parts of split tiles, then tiles with equal paths; waits for the device."""
    run_list = [(a, b, c) for a, b, c in runs.tolist()]
    parts: dict[tuple[int, int], list[tuple[int, int]]] = {}
    for first, count, begin, end, _, _ in tiles.tolist():
        if count:
            parts.setdefault((first, count), []).append((begin, end))
    rows_of: dict[tuple[Run, ...], list[int]] = {}
    for (first, count), spans in parts.items():
        path = tuple(run for a, b in sorted(spans) for run in run_list[a:b] if run[2])
        if path:
            rows_of.setdefault(path, []).extend(range(first, first + count))
    return [Family(sorted(rows), path) for path, rows in rows_of.items()]


def own_pieces_of(own_start: Tensor, tiles: Tensor) -> list[OwnPiece]:
    """The own part of every covered row, cut where a segment or a tile ends."""
    starts = own_start.tolist()
    pieces = []
    for first, count, _, _, with_own, _ in tiles.tolist():
        row = first
        while with_own and row < first + count:
            stop = row + 1
            while stop < first + count and starts[stop] == starts[row]:
                stop += 1
            pieces.append(OwnPiece(starts[row], row, stop))
            row = stop
    return pieces


def merge_parts(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Merges two softmax partials in float32.

    Args:
        out: [n, Hq, D] float32, normalised over its own keys.
        lse: [n, Hq] float32, natural log; -inf where it saw no key.
        part: [n, Hq, D], the other partial.
        part_lse: [n, Hq], as lse; finite.

    Returns:
        The merged pair, float32.
    """
    weight = torch.sigmoid(part_lse.float() - lse)[..., None]
    return torch.lerp(out, part.float(), weight), torch.logaddexp(lse, part_lse.float())


def own_part(
    q: Tensor, k: Tensor, v: Tensor, pieces: list[OwnPiece], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The own parts in plain float32, pieces of like length in one batched product.

    Args:
        q: [T, Hkv, G, D].
        k: [T, Hkv, D].
        v: [T, Hkv, D].
        pieces: What to compute.
        scale: Multiplies the scores.

    Returns:
        (row numbers [n], out float32 [n, Hkv, G, D], lse float32 [n, Hkv, G]).
    """
    by_length: dict[int, list[OwnPiece]] = {}
    for piece in pieces:
        by_length.setdefault((piece.stop - piece.start - 1).bit_length(), []).append(piece)
    rows, outs, lses = [], [], []
    for batch in by_length.values():
        bounds = torch.tensor([(p.start, p.row, p.stop) for p in batch], device=q.device)
        longest = max(p.stop - p.start for p in batch)
        number = bounds[:, :1] + torch.arange(longest, device=q.device)
        index = torch.minimum(number, bounds[:, 2:] - 1)
        scores = torch.einsum("plhgd,pmhd->phglm", q[index].float(), k[index].float()) * scale
        is_later = number[:, None, :] > number[:, :, None]
        scores = scores.masked_fill(is_later[:, None, None], float("-inf"))
        lse = scores.logsumexp(-1)
        out = torch.einsum("phglm,pmhd->plhgd", (scores - lse[..., None]).exp(), v[index].float())
        is_asked = (number >= bounds[:, 1:2]) & (number < bounds[:, 2:])
        rows.append(number[is_asked])
        outs.append(out[is_asked])
        lses.append(lse.permute(0, 3, 1, 2)[is_asked])
    return torch.cat(rows), torch.cat(outs), torch.cat(lses)
