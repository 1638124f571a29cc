"""Packed rows for training: one prefix, many branches, one forward.

A tree is a prefix (task, caption, pictures) and branches that each continue it alone: criteria that
end at a verdict, and captions of one picture. Branches never see each other, and their positions
start where the prefix ends, so every path is what a plain causal model would have read. Several
trees share a row of fixed length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from arr_fast.prompts import Part, PromptEncoder, TokenRun
from arr_fast.shapes.branch_attention import Group, Span, make_group
from arr_fast.shapes.evidence import UNKNOWN
from arr_fast.shapes.model import IMAGE_TOKENS

IMAGE_SIDE_TOKENS = 4

# Place; truth on the first picture and the second, on the preferred one and the other.
Fact = tuple[int, tuple[float, float, float, float]]


@dataclass(frozen=True, slots=True)
class Path:
    """A root-to-leaf path: token ids, the picture of every token (or -1), M-RoPE positions.

    Attributes:
        ids: int64 [L].
        picture: int64 [L]; index of the item's picture, -1 for text.
        positions: int64 [3, L].
    """

    ids: np.ndarray
    picture: np.ndarray
    positions: np.ndarray


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one branch end is asked.

    Attributes:
        kind: Kind of claim, for the curves.
        first: Target probability of the first label.
        truths: Truth on the first and second picture; nan where there is none.
        evidence: For each judged picture the word for what it shows; may be empty.
        wanted: Up to two words for what is asked for; "" where one does not apply.
    """

    kind: str
    first: float
    truths: tuple[float, float] = (float("nan"), float("nan"))
    evidence: tuple[str, ...] = ()
    wanted: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Tree:
    """A prefix and its branches.

    Attributes:
        paths: One full path per branch; they share their first `prefix` tokens.
        prefix: Length of the shared part.
        verdicts: One per path, None for a caption branch.
        answers: For a caption branch the number of its last tokens that are predicted.
        pictures: Global indices of the tree's pictures within the batch.
        pairwise: Whether its verdicts compare two pictures.
        cells: For each of the last pictures its cells' indices into CELL_WORDS; may be empty.
        facts: Words of the prefix at which a truth is to be known; 0, 1 or nan.
        branch_facts: The same for every path, of words after the prefix; may be empty.
    """

    paths: tuple[Path, ...]
    prefix: int
    verdicts: tuple[Verdict | None, ...]
    answers: tuple[int, ...]
    pictures: tuple[int, ...]
    pairwise: bool
    cells: tuple[np.ndarray, ...] = ()
    facts: tuple[Fact, ...] = ()
    branch_facts: tuple[tuple[Fact, ...], ...] = ()


def path_of(runs: Sequence[TokenRun], answer: Sequence[int] = ()) -> Path:
    """Token runs (and an answer after them) as one path with its positions."""
    ids: list[np.ndarray] = []
    picture: list[np.ndarray] = []
    positions: list[np.ndarray] = []
    start = 0
    tail = [TokenRun(np.asarray(answer, dtype=np.int64))] if len(answer) else []
    for run in (*runs, *tail):
        count = len(run.ids)
        ids.append(run.ids)
        picture.append(np.full(count, run.image, np.int64))
        if run.image < 0:
            positions.append(np.broadcast_to(np.arange(start, start + count), (3, count)))
            start += count
        else:
            cells = np.arange(count)
            rows, columns = cells // IMAGE_SIDE_TOKENS, cells % IMAGE_SIDE_TOKENS
            positions.append(np.stack([np.zeros_like(cells), rows, columns]) + start)
            start += IMAGE_SIDE_TOKENS
    return Path(np.concatenate(ids), np.concatenate(picture), np.concatenate(positions, axis=1))


def encode_path(
    encoder: PromptEncoder, parts: Sequence[Part], pictures: int, answer: Sequence[int] = ()
) -> Path:
    """A conversation as a path, exactly as inference encodes it."""
    return path_of(encoder.encode(parts, [IMAGE_TOKENS] * pictures), answer)


def shared_prefix(paths: Sequence[Path]) -> int:
    """How many leading tokens all paths have in common."""
    first = paths[0]
    shared = min(len(p.ids) for p in paths)
    for other in paths[1:]:
        same = (first.ids[:shared] == other.ids[:shared]) & (
            first.picture[:shared] == other.picture[:shared]
        )
        shared = shared if same.all() else int(same.argmin())
    return shared


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows as tensors.

    Attributes:
        ids: int64 [B, T].
        positions: int64 [3, B, T].
        groups: Who attends to whom: prefixes, verdict branches, caption branches.
        feature: int64 [B, T]; row of the batch's flat image features, -1 for text.
        owner: int64 [B, T]; 0 on the source picture of a pair, 1 and 2 on Image 1 and Image 2, -1
            elsewhere.
        cell: int64 [B, T]; index into CELL_WORDS on image tokens, UNKNOWN elsewhere.
        edited: int64 [E, 3]: for every edited picture the flat tokens at which its tree, the image
            tokens of its source and its own begin.
        verdict_at: int64 [V, 2] (row, token) where a label is read.
        verdicts: The V verdicts.
        pairwise: bool [V].
        answer_at: int64 [A, 2] (row, token) whose next token is predicted.
        answer_ids: int64 [A].
        fact_at: int64 [F, 2] (row, token) of words about which the truth on the pictures is known.
        facts: float32 [F, 4]; whether it holds on the first picture and on the second, or on the
            preferred one and the other; nan where it is not to be known.
    """

    ids: Tensor
    positions: Tensor
    groups: tuple[Group, ...]
    feature: Tensor
    owner: Tensor
    cell: Tensor
    edited: Tensor
    verdict_at: Tensor
    verdicts: tuple[Verdict, ...]
    pairwise: Tensor
    answer_at: Tensor
    answer_ids: Tensor
    fact_at: Tensor
    facts: Tensor


@dataclass(slots=True)
class RowPacker:
    """Fills rows of T tokens with trees; a branch that no longer fits is left out."""

    length: int
    rows: list[dict[str, np.ndarray]] = field(default_factory=list)
    spans: list[tuple[int, Span | None, Span]] = field(default_factory=list)
    _used: int = 0
    _edited: list[tuple[int, int, int]] = field(default_factory=list)
    _verdict_at: list[tuple[int, int]] = field(default_factory=list)
    _verdicts: list[Verdict] = field(default_factory=list)
    _pairwise: list[bool] = field(default_factory=list)
    _answer_at: list[tuple[int, int]] = field(default_factory=list)
    _answer_ids: list[int] = field(default_factory=list)
    _fact_at: list[tuple[int, int]] = field(default_factory=list)
    _facts: list[tuple[float, float, float, float]] = field(default_factory=list)

    def new_row(self) -> None:
        """Starts the next row."""
        t = self.length
        row = {k: np.zeros(t, np.int64) for k in ("ids",)}
        row["feature"] = np.full(t, -1, np.int64)
        row["owner"] = np.full(t, -1, np.int64)
        row["cell"] = np.full(t, UNKNOWN, np.int64)
        row["positions"] = np.zeros((3, t), np.int64)
        self.rows.append(row)
        self._used = 0

    @property
    def free(self) -> int:
        """Tokens left in the current row."""
        return self.length - self._used

    def add(self, tree: Tree) -> int:
        """Adds a tree to the current row and returns how many of its branches fitted."""
        prefix = self._write(tree, tree.paths[0], 0, tree.prefix)
        self.spans.append((0, None, prefix))
        self._add_facts(tree.facts, prefix.start)
        fitted = 0
        for number, path in enumerate(tree.paths):
            if len(path.ids) - tree.prefix > self.free:
                continue
            start = self._used - tree.prefix
            own = self._write(tree, path, tree.prefix, len(path.ids))
            self.spans.append((1 if tree.verdicts[number] else 2, prefix, own))
            fitted += 1
            row, verdict = len(self.rows) - 1, tree.verdicts[number]
            if verdict is not None:
                self._verdict_at.append((row, self._used - 1))
                self._verdicts.append(verdict)
                self._pairwise.append(tree.pairwise)
            for k in range(len(path.ids) - tree.answers[number], len(path.ids)):
                self._answer_at.append((row, start + k - 1))
                self._answer_ids.append(int(path.ids[k]))
            if tree.branch_facts:
                self._add_facts(tree.branch_facts[number], row * self.length + start)
        return fitted

    def _add_facts(self, facts: Sequence[Fact], start: int) -> None:
        for place, truths in facts:
            self._fact_at.append(divmod(start + place, self.length))
            self._facts.append(truths)

    def _write(self, tree: Tree, path: Path, begin: int, end: int) -> Span:
        if end - begin > self.free:
            raise ValueError(f"a prefix of {end - begin} tokens exceeds the {self.free} left")
        at = slice(self._used, self._used + end - begin)
        row = self.rows[-1]
        row["ids"][at] = path.ids[begin:end]
        row["positions"][:, at] = path.positions[:, begin:end]
        local = path.picture[begin:end]
        start = (len(self.rows) - 1) * self.length + at.start
        if begin == 0 and len(tree.pictures) > len(tree.cells) > 0:
            starts = [start + int(np.argmax(local == n)) for n in range(len(tree.pictures))]
            self._edited += [(start, starts[0], own) for own in starts[1:]]
        for place, number in enumerate(tree.pictures):
            here = np.flatnonzero(local == place)
            row["feature"][self._used + here] = number * IMAGE_TOKENS + np.arange(len(here))
            if tree.pairwise:
                row["owner"][self._used + here] = place + 3 - len(tree.pictures)
            judged = place + len(tree.cells) - len(tree.pictures)
            if judged >= 0 and len(here):
                row["cell"][self._used + here] = tree.cells[judged]
        self._used += end - begin
        return Span(start, end - begin)

    def finish(self) -> PackedBatch:
        """The rows as tensors."""
        stack = {k: torch.from_numpy(np.stack([r[k] for r in self.rows])) for k in self.rows[0]}
        dummy = len(self.rows) * self.length
        kinds = sorted({kind for kind, _, _ in self.spans})
        sorted_spans = [[(p, o) for k, p, o in self.spans if k == kind] for kind in kinds]
        return PackedBatch(
            ids=stack["ids"],
            positions=stack["positions"].transpose(0, 1).contiguous(),
            groups=tuple(make_group(spans, dummy) for spans in sorted_spans),
            feature=stack["feature"],
            owner=stack["owner"],
            cell=stack["cell"],
            edited=torch.tensor(self._edited, dtype=torch.int64).view(-1, 3),
            verdict_at=torch.tensor(self._verdict_at, dtype=torch.int64).view(-1, 2),
            verdicts=tuple(self._verdicts),
            pairwise=torch.tensor(self._pairwise, dtype=torch.bool),
            answer_at=torch.tensor(self._answer_at, dtype=torch.int64).view(-1, 2),
            answer_ids=torch.tensor(self._answer_ids, dtype=torch.int64),
            fact_at=torch.tensor(self._fact_at, dtype=torch.int64).view(-1, 2),
            facts=torch.tensor(self._facts, dtype=torch.float32).view(-1, 4),
        )
