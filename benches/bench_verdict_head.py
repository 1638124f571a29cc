"""verdict_head against the full language-model head: `pytest benches/bench_verdict_head.py`.

40 read rows of a Qwen3-VL-2B shaped head (hidden 2048); the CPU run cuts the vocabulary to 32,000
rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from arr_fast.ops.verdict_head import verdict_head
from benches.measure import report

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
ROWS, HIDDEN = 40, 2048
VOCABULARY = 151936 if DEVICE == "cuda" else 32000
EPS = 1e-6


@pytest.mark.parametrize("label_mass", [False, True], ids=["labels", "label-mass"])
def test_verdict_head(label_mass: bool, benchmark: Any) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device=DEVICE, dtype=DTYPE)

    hidden, weight = draw(ROWS, HIDDEN), draw(HIDDEN)
    vocabulary = draw(VOCABULARY, HIDDEN) / HIDDEN**0.5
    variants = torch.tensor([16, 352, 17, 362], device=DEVICE)
    label_rows = vocabulary[variants]
    label_ptr = torch.tensor([0, 2, 4], dtype=torch.int32, device=DEVICE)
    asked = vocabulary if label_mass else vocabulary[:0]
    impl = "triton" if DEVICE == "cuda" else "torch"

    def ours() -> tuple[Tensor, Tensor]:
        return verdict_head(hidden, weight, EPS, False, label_rows, label_ptr, asked, impl)

    def full_head() -> tuple[Tensor, Tensor]:
        normed = F.rms_norm(hidden.float(), (HIDDEN,), None, EPS).to(DTYPE) * weight
        logits = F.linear(normed, vocabulary).float()
        labels = logits[:, variants].view(ROWS, 2, 2).logsumexp(-1)
        return labels, logits.logsumexp(-1) if label_mass else logits[:0, 0]

    for got, want in zip(ours(), full_head(), strict=True):
        torch.testing.assert_close(got, want, rtol=2e-2 if DEVICE == "cuda" else 1e-4, atol=1e-3)
    runs: dict[str, Callable[[], Any]] = {"ours": ours, "full head": full_head}
    name = "label mass" if label_mass else "labels"
    rows = report(benchmark, "verdict_head", f"{ROWS}x{HIDDEN}x{VOCABULARY} {name}", DTYPE, runs)
    assert label_mass or rows["full head"].ratio > 1
