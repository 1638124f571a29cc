"""Stage 2: the decoder learns captions and verdicts together, on packed branches.

Verdicts alone stay at chance for long: one bit each, behind a search, a comparison and a second
search. Seven helpers make them learnable, and none is kept in the checkpoint:

- caption branches: what is in Image 1, what is in Image 2;
- evidence: the tokens that end the user's turn hold, two layers before the end, one word for what
  each picture shows where the criterion looks (the circle's colour, the number of stars) and after
  it what is wanted there;
- cells: at half depth an image token of an edited picture says whether its place is as in the
  source;
- twins: the layer before that, one head lets an image token of an edited picture attend to the same
  place of the source;
- linear probes that read from the token before the label, at half depth and at the end, whether
  each picture meets the criterion;
- facts: two layers before the end a caption's word for an object holds whether either picture shows
  that object, and a word for an aspect, where criteria are to be written, whether the preferred
  picture and the other are right in it;
- owners: from the second layer on, image tokens hold the word that their picture goes by, "1", "2"
  or "Source". The winner's number is what a verdict has to say.
"""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import Qwen3VLForConditionalGeneration
from transformers.models.qwen3_vl.modeling_qwen3_vl import rotate_half

from arr_fast.prompts import PAIR_LABELS, POINT_LABELS
from arr_fast.shapes.evidence import CELL_WORDS
from arr_fast.shapes.forward import VisionForward, decode
from arr_fast.shapes.model import IMAGE_TOKENS
from arr_fast.shapes.packing import PackedBatch
from arr_fast.shapes.rows import BatchMaker

OWNER_LAYER, PROBE_LAYER, EVIDENCE_LAYER = 2, 3, 4
IMAGE_SCALE = 12.0
# A verdict is read this many tokens after the end of the user's turn.
TURN_END = 4
WEIGHTS = {"verdict": 1.5, "caption": 0.7, "evidence": 1.0, "probe": 0.5}
WEIGHTS |= {"owner": 0.3, "cell": 0.5, "twin": 0.2, "fact": 1.0}
MIX = {
    "pair": 0.48,
    "edit": 0.2,
    "point": 0.13,
    "point_edit": 0.05,
    "vqa": 0.06,
    "write": 0.08,
}
# The last stage: whole captions and instructions, once single objects are read well; and criteria
# to write, which copy what a caption or a picture says.
WHOLE_MIX = {
    "pair": 0.27,
    "edit": 0.14,
    "point": 0.18,
    "point_edit": 0.04,
    "vqa": 0.03,
    "write": 0.28,
    "write_caption": 0.06,
}
CONTRASTS = 0.5


class TruthProbes(nn.Module):
    """Reads the truth on either picture off a hidden state; used in training only."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.middle = nn.Linear(hidden, 2)
        self.end = nn.Linear(hidden, 2)
        self.fact = nn.Linear(hidden, 4)

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

    def fact_loss(self, states_FD: Tensor, truths_F4: Tensor) -> Tensor:
        """Mean binary cross-entropy over the known truths; 0 where there is none."""
        known = ~truths_F4.isnan()
        if not known.any():
            return states_FD.new_zeros(())
        logits = self.fact(F.rms_norm(states_FD, states_FD.shape[-1:]))
        return F.binary_cross_entropy_with_logits(logits[known], truths_F4[known])


class JudgeLoss:
    """The losses of stage 2 over a packed batch.

    Args:
        model: The judge.
        vision: Its tower.
        probes: Linear probes of the truth.
        maker: Made the batches.
        whole: Also teach what is wanted, and how cells stand to their caption.
    """

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        vision: VisionForward,
        probes: TruthProbes,
        maker: BatchMaker,
        *,
        whole: bool = False,
    ) -> None:
        self.model, self.vision, self.probes, self.maker = model, vision, probes, maker
        self.whole = whole
        ids = maker.tokenizer.convert_tokens_to_ids
        self.pair_ids = torch.tensor([ids(v[0]) for v in PAIR_LABELS])
        self.point_ids = torch.tensor([ids(v[0]) for v in POINT_LABELS])
        self.owner_ids = torch.tensor([ids(word) for word in ("Source", "1", "2")])
        self.cell_ids = torch.tensor([ids("Ġ" + word) for word in CELL_WORDS])

    def losses(self, batch: PackedBatch, patches: Tensor) -> dict[str, Tensor]:
        """Named losses; "loss" is their sum under WEIGHTS."""
        logits, end, answers, taps = self._forward(batch, patches)
        owner, half, evidence = taps
        first = torch.tensor([v.first for v in batch.verdicts])
        truths = torch.tensor([v.truths for v in batch.verdicts]).view(-1, 2)
        labels = self._labels(batch)
        log_p = logits.log_softmax(-1).gather(1, labels)
        verdict = -(first * log_p[:, 0] + (1 - first) * log_p[:, 1]).sum() / max(1, len(first))
        row, at = batch.verdict_at.T
        caption = verdict.new_zeros(())
        if len(batch.answer_ids):
            caption = F.cross_entropy(answers, batch.answer_ids)
        losses = {
            "verdict": verdict,
            "caption": caption,
            "evidence": self._evidence_loss(batch, evidence),
            "probe": self.probes.loss(half[row, at], end, truths),
            "owner": self._image_loss(batch.owner, owner, self.owner_ids),
        }
        if self.whole:
            losses["cell"] = self._image_loss(batch.cell, half, self.cell_ids)
            losses["twin"] = self._twin_loss(batch, owner)
            row, at = batch.fact_at.T
            losses["fact"] = self.probes.fact_loss(evidence[row, at], batch.facts)
        total = sum(WEIGHTS[name] * loss for name, loss in losses.items())
        return {"loss": torch.as_tensor(total), **losses}

    def _evidence_loss(self, batch: PackedBatch, states_BTD: Tensor) -> Tensor:
        """Cross-entropy of the evidence words, over all verdicts that have some."""
        places: list[tuple[int, int]] = []
        words: list[int] = []
        for verdict, (row, at) in zip(batch.verdicts, batch.verdict_at.tolist(), strict=True):
            wanted = verdict.wanted if self.whole else ()
            for number, word in (*enumerate(verdict.evidence), *enumerate(wanted, 2)):
                if word:
                    places.append((row, at - TURN_END + number))
                    words.append(self._word_id(word))
        if not words:
            return states_BTD.new_zeros(())
        row, at = torch.tensor(places).T
        states = states_BTD[row, at]
        head: Any = self.model.get_input_embeddings().weight
        logits = F.rms_norm(states, states.shape[-1:]) @ head.T
        return F.cross_entropy(logits, torch.tensor(words))

    def _word_id(self, word: str) -> int:
        token: int = self.maker.tokenizer.convert_tokens_to_ids("Ġ" + word)
        return token

    def _image_loss(self, wanted_BT: Tensor, states_BTD: Tensor, words: Tensor) -> Tensor:
        """Cross-entropy of the word that an image token is to hold, over those that have one."""
        known = wanted_BT >= 0
        states = F.normalize(states_BTD[known], dim=-1)
        table: Any = self.model.get_input_embeddings().weight
        logits = IMAGE_SCALE * states @ F.normalize(table[words], dim=-1).T
        total = F.cross_entropy(logits, wanted_BT[known], reduction="sum")
        return total / known.sum().clamp(min=1)

    def _twin_loss(self, batch: PackedBatch, states_BTD: Tensor) -> Tensor:
        """How little the best head of the layer before PROBE_LAYER attends to the source's cells.

        Mean negative log of the attention of an edited picture's image token to the source's token
        of the same cell.

        Args:
            batch: The rows.
            states_BTD: What enters that layer.
        """
        if not len(batch.edited):
            return states_BTD.new_zeros(())
        text = self.model.model.language_model
        layer: Any = text.layers[PROBE_LAYER - 1]
        tree, source, own = batch.edited.T
        reach = torch.arange(int((own - tree).max()) + IMAGE_TOKENS)
        keys_EK = (tree[:, None] + reach).clamp(max=batch.ids.numel() - 1)
        cells = torch.arange(IMAGE_TOKENS)
        queries_EC = own[:, None] + cells
        attn = layer.self_attn
        normed = layer.input_layernorm(states_BTD.flatten(0, 1))
        positions = text.rotary_emb(normed, batch.positions)
        cos, sin = (wave.flatten(0, 1) for wave in positions)

        def heads(projection: nn.Linear, norm: nn.Module, at: Tensor) -> Tensor:
            rows = norm(projection(normed[at]).unflatten(-1, (-1, attn.head_dim)))
            cos_at, sin_at = cos[at].unsqueeze(-2), sin[at].unsqueeze(-2)
            turned: Tensor = rows * cos_at + rotate_half(rows) * sin_at
            return turned.transpose(1, 2)

        q_EHCD = heads(attn.q_proj, attn.q_norm, queries_EC)
        k_EHKD = heads(attn.k_proj, attn.k_norm, keys_EK)
        k_EHKD = k_EHKD.repeat_interleave(q_EHCD.shape[1] // k_EHKD.shape[1], 1)
        scores = q_EHCD @ k_EHKD.transpose(-1, -2) * attn.scaling
        hidden = keys_EK[:, None] > queries_EC[:, :, None]
        log_p = scores.masked_fill(hidden[:, None], -torch.inf).log_softmax(-1)
        twins_EC = source[:, None] - tree[:, None] + cells
        twins = twins_EC[:, None, :, None].expand(-1, log_p.shape[1], -1, 1)
        found: Tensor = log_p.gather(-1, twins)[..., 0]
        return -found.amax(1).mean()

    def _labels(self, batch: PackedBatch) -> Tensor:
        return torch.where(batch.pairwise[:, None], self.pair_ids, self.point_ids)

    def _forward(
        self, batch: PackedBatch, patches: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, ...]]:
        states = decode(
            self.model,
            batch.ids,
            batch.positions,
            batch.groups,
            batch.feature,
            self.vision(patches),
            (OWNER_LAYER, PROBE_LAYER, EVIDENCE_LAYER),
        )
        row, at = batch.verdict_at.T
        end = states.final[row, at]
        head: Any = self.model.get_input_embeddings().weight
        answer_row, answer_at = batch.answer_at.T
        answers = states.final[answer_row, answer_at] @ head.T
        return end @ head.T, end, answers, states.taps

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
        hits["caption"].append(float(loss.losses(batch, patches)["caption"]))
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
