"""Stage 2: the decoder learns captions and verdicts together, on packed branches.

Verdicts alone stay at chance for long. Three helpers make them learnable, and none is kept in the
checkpoint: caption branches (what is in Image 1, what is in Image 2); linear probes that read from
the token before the label, at half depth and at the end, whether each picture meets the criterion;
and a loss that makes image tokens carry the word that their picture goes by, "1", "2" or "Source",
from the second layer on. The winner's number is what a verdict has to say.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration

from arr_fast.prompts import PAIR_LABELS, POINT_LABELS
from arr_fast.shapes.forward import VisionForward, decode
from arr_fast.shapes.packing import PackedBatch
from arr_fast.shapes.rows import BatchMaker

EARLY_LAYER = 2
PROBE_LAYER = 3
OWNER_SCALE = 12.0
MIX = {
    "pair": 0.48,
    "edit": 0.2,
    "point": 0.13,
    "point_edit": 0.05,
    "vqa": 0.06,
    "write": 0.08,
}


class TruthProbes(nn.Module):
    """Reads the truth on either picture off a hidden state; used in training only."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.middle = nn.Linear(hidden, 2)
        self.end = nn.Linear(hidden, 2)

    def loss(self, half_VD: Tensor, end_VD: Tensor, truths_V2: Tensor) -> Tensor:
        """Mean binary cross-entropy over the known truths."""
        known = ~truths_V2.isnan()
        wanted = truths_V2[known]
        scaled = F.rms_norm(half_VD, half_VD.shape[-1:])
        losses = [
            F.binary_cross_entropy_with_logits(head(states)[known], wanted, reduction="sum")
            for head, states in ((self.middle, scaled), (self.end, end_VD))
        ]
        return (losses[0] + losses[1]) / max(1, len(wanted))


class JudgeLoss:
    """The losses of stage 2 over a packed batch."""

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        vision: VisionForward,
        probes: TruthProbes,
        maker: BatchMaker,
    ) -> None:
        self.model, self.vision, self.probes, self.maker = model, vision, probes, maker
        ids = maker.tokenizer.convert_tokens_to_ids
        self.pair_ids = torch.tensor([ids(v[0]) for v in PAIR_LABELS])
        self.point_ids = torch.tensor([ids(v[0]) for v in POINT_LABELS])
        self.owner_ids = torch.tensor([ids(word) for word in ("Source", "1", "2")])

    def losses(
        self,
        batch: PackedBatch,
        patches: Tensor,
        caption_weight: float,
        probe_weight: float,
        owner_weight: float,
    ) -> dict[str, Tensor]:
        """Named losses; "loss" is their weighted sum."""
        logits, half, end, answers, early = self._forward(batch, patches)
        first = torch.tensor([v.first for v in batch.verdicts])
        truths = torch.tensor([v.truths for v in batch.verdicts]).view(-1, 2)
        labels = self._labels(batch)
        log_p = logits.log_softmax(-1).gather(1, labels)
        verdict = -(first * log_p[:, 0] + (1 - first) * log_p[:, 1]).sum() / max(1, len(first))
        probe = self.probes.loss(half, end, truths)
        caption = verdict.new_zeros(())
        if len(batch.answer_ids):
            caption = F.cross_entropy(answers, batch.answer_ids)
        owner = self._owner_loss(batch.owner, early)
        total = verdict + caption_weight * caption + probe_weight * probe + owner_weight * owner
        return {
            "loss": total,
            "verdict": verdict,
            "caption": caption,
            "probe": probe,
            "owner": owner,
        }

    def _owner_loss(self, owner_BT: Tensor, early_BTD: Tensor) -> Tensor:
        """Cross-entropy of the word that names an image token's picture, over those of pairs."""
        known = owner_BT >= 0
        states = F.normalize(early_BTD[known], dim=-1)
        words: Any = self.model.get_input_embeddings().weight[self.owner_ids]
        logits = OWNER_SCALE * states @ F.normalize(words, dim=-1).T
        total = F.cross_entropy(logits, owner_BT[known], reduction="sum")
        return total / known.sum().clamp(min=1)

    def _labels(self, batch: PackedBatch) -> Tensor:
        return torch.where(batch.pairwise[:, None], self.pair_ids, self.point_ids)

    def _forward(
        self, batch: PackedBatch, patches: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        states = decode(
            self.model,
            batch.ids,
            batch.positions,
            batch.groups,
            batch.feature,
            self.vision(patches),
            EARLY_LAYER,
            PROBE_LAYER,
        )
        row, at = batch.verdict_at.T
        end = states.final[row, at]
        head: Any = self.model.get_input_embeddings().weight
        answer_row, answer_at = batch.answer_at.T
        answers = states.final[answer_row, answer_at] @ head.T
        return end @ head.T, states.probe[row, at], end, answers, states.early

    @torch.no_grad()
    def log_odds(self, batch: PackedBatch, patches: Tensor) -> Tensor:
        """Log-odds of the first label at every verdict, [V]."""
        logits = self._forward(batch, patches)[0].gather(1, self._labels(batch))
        return logits[:, 0] - logits[:, 1]


@torch.no_grad()
def evaluate_reading(loss: JudgeLoss, seed: int, rows: int) -> dict[str, float]:
    """Accuracy of yes/no criteria on fresh training-like pictures, per kind, and caption loss."""
    rng = np.random.default_rng([seed, 99])
    hits: dict[str, list[float]] = defaultdict(list)
    for _ in range(0, rows, 4):
        batch, patches = loss.maker.reading_batch(rng, 4)
        hits["caption"].append(float(loss.losses(batch, patches, 1.0, 0.0, 0.0)["caption"]))
        for verdict, z in zip(batch.verdicts, loss.log_odds(batch, patches).tolist(), strict=True):
            hit = float((z > 0) == (verdict.first > 0.5))
            hits["read"].append(hit)
            hits[f"read/{verdict.kind}"].append(hit)
    return {k: float(np.mean(v)) for k, v in sorted(hits.items())}


@torch.no_grad()
def evaluate(loss: JudgeLoss, seed: int, rows: int) -> dict[str, float]:
    """Accuracy on held-out scenes and phrasings: pairwise and pointwise, per kind, and ties.

    Returns:
        "pair", "point", "edit", "tie" overall, "pair/KIND" and "point/KIND" for every kind, and
        "first", the pairwise accuracy where the first image wins minus where the second does.
    """
    rng = np.random.default_rng([seed, 88])
    hits: dict[str, list[float]] = defaultdict(list)
    mixes = (({"pair": 0.7, "edit": 0.3}, rows), ({"point": 0.7, "point_edit": 0.3}, rows // 2))
    answers, loss.maker.answers = loss.maker.answers, False
    for mix, total in mixes:
        for _ in range(0, total, 8):
            batch, patches = loss.maker.batch(rng, 8, "held_out", mix)
            scores = loss.log_odds(batch, patches)
            for verdict, pairwise, z in zip(
                batch.verdicts, batch.pairwise.tolist(), scores.tolist(), strict=True
            ):
                if verdict.first == 0.5:
                    hits["tie"].append(abs(z) <= 1.0)
                    continue
                hit = float((z > 0) == (verdict.first > 0.5))
                mode = "pair" if pairwise else "point"
                hits[mode].append(hit)
                hits[f"{mode}/{verdict.kind}"].append(hit)
                if pairwise:
                    hits["won_first" if verdict.first > 0.5 else "won_second"].append(hit)
    loss.maker.answers = answers
    means = {k: float(np.mean(v)) for k, v in sorted(hits.items())}
    means["first_minus_second"] = means.pop("won_first") - means.pop("won_second")
    return means
