"""The Triton `verdict_head` under the interpreter against fp64 full logits."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from arr_fast_kernels.verdict_head import verdict_head

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])


def full_logits(
    arguments: dict[str, Tensor], eps: float, unit_offset: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Label and vocabulary log-sum-exps through full logits [N, V] computed in `dtype`, as a
    language model head does."""
    hidden = arguments["hidden"].to(torch.float64 if dtype == torch.float64 else torch.float32)
    weight = arguments["norm_weight"].to(hidden.dtype) + (1.0 if unit_offset else 0.0)
    normed = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps) * weight
    normed = normed.to(dtype)
    logits = (normed @ arguments["label_rows"].to(dtype).T).to(hidden.dtype)
    ptr = arguments["label_ptr"].tolist()
    labels = [logits[:, a:b].logsumexp(-1) for a, b in pairwise(ptr)]
    vocab = (normed @ arguments["vocab_weight"].to(dtype).T).to(hidden.dtype).logsumexp(-1)
    return torch.stack(labels, -1), vocab


def draw(
    rows: int, hidden: int, variants: tuple[int, ...], vocab: int, dtype: torch.dtype
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(11)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    ptr = torch.tensor([0, *torch.tensor(variants).cumsum(0).tolist()], dtype=torch.int32)
    return {
        "hidden": normal(rows, hidden) * 3,
        "norm_weight": normal(hidden),
        "label_rows": normal(sum(variants), hidden) / hidden**0.5 * 2,
        "label_ptr": ptr,
        "vocab_weight": normal(vocab, hidden) / hidden**0.5 * 2,
    }


def check(
    arguments: dict[str, Tensor],
    *,
    eps: float = 1e-6,
    unit_offset: bool = False,
    launch: Callable[..., tuple[Tensor, Tensor]] = verdict_head,
) -> None:
    """err(kernel, fp64) <= err(eager in the same dtype, fp64) + 16 fp32 eps of the largest
    logit."""
    asked = arguments["vocab_weight"].shape[0] > 0
    got = launch(**arguments, eps=eps, unit_offset=unit_offset)
    exact = full_logits(arguments, eps, unit_offset, torch.float64)
    eager = full_logits(arguments, eps, unit_offset, arguments["hidden"].dtype)
    assert got[0].dtype == torch.float32 and got[1].shape == ((len(exact[0]),) if asked else (0,))
    for ours, fp64, same_dtype in list(zip(got, exact, eager, strict=True))[: 1 + asked]:
        error = (ours.double() - fp64).abs().max().item()
        allowed = (same_dtype.double() - fp64).abs().max().item()
        bound = 16 * torch.finfo(torch.float32).eps * (1 + fp64.abs().max().item())
        assert error <= allowed + bound, (error, allowed, bound)


@DTYPES
@pytest.mark.parametrize(
    ("rows", "hidden", "variants", "vocab", "unit_offset"),
    [
        (1, 64, (1, 1), 0, False),
        (5, 100, (2, 1), 33, True),
        (17, 130, (3, 4), 1100, False),
        (19, 257, (1, 2, 5), 511, True),
        (3, 128, (31, 33), 513, False),
    ],
    ids=str,
)
def test_against_full_logits(
    rows: int,
    hidden: int,
    variants: tuple[int, ...],
    vocab: int,
    unit_offset: bool,
    dtype: torch.dtype,
) -> None:
    check(draw(rows, hidden, variants, vocab, dtype), unit_offset=unit_offset)


def test_large_logits_need_the_maximum() -> None:
    arguments = draw(4, 96, (2, 2), 700, torch.float32)
    arguments["hidden"] = arguments["hidden"] * 100
    arguments["vocab_weight"] = arguments["vocab_weight"] * 80
    arguments["label_rows"] = arguments["label_rows"] * 80
    check(arguments)


def test_epsilon_counts_for_small_rows() -> None:
    arguments = draw(4, 96, (2, 2), 40, torch.float32)
    arguments["hidden"] = arguments["hidden"] * 1e-4
    check(arguments, eps=1e-5)


def test_non_contiguous_inputs() -> None:
    plain = draw(6, 96, (2, 1), 70, torch.float32)
    strided = dict(plain)
    strided["hidden"] = torch.cat([plain["hidden"], plain["hidden"] * float("nan")], 1)[:, :96]
    strided["vocab_weight"] = plain["vocab_weight"].T.contiguous().T
    ours = verdict_head(**strided, eps=1e-6, unit_offset=False)
    expected = verdict_head(**plain, eps=1e-6, unit_offset=False)
    assert torch.equal(ours[0], expected[0]) and torch.equal(ours[1], expected[1])


def test_batch_of_n_equals_n_batches_of_one() -> None:
    arguments = draw(5, 64, (1, 1), 600, torch.float32)
    together = verdict_head(**arguments, eps=1e-6, unit_offset=False)
    for row in range(5):
        alone = verdict_head(
            **{**arguments, "hidden": arguments["hidden"][row : row + 1]},
            eps=1e-6,
            unit_offset=False,
        )
        assert torch.equal(alone[0][0], together[0][row])
        torch.testing.assert_close(alone[1][0], together[1][row], rtol=1e-6, atol=0)


def test_too_many_label_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="label_rows has 65 rows"):
        verdict_head(**draw(2, 64, (32, 33), 0, torch.float32), eps=1e-6, unit_offset=False)
